"""A store that offers no conditional put by version: the lease still works, and the run says what it cannot promise."""

from __future__ import annotations

import logging

import pytest

from embedding.corpus.lease import Lease
from embedding.corpus.storage import open_storage
from embedding.errors import OutputBusyError
from tests.corpus.test_lease import LIVELY


def test_conditions_are_looked_at_before_the_put() -> None:
    storage = open_storage("memory://conditions")
    assert storage.put_if_absent("a", b"one")
    assert not storage.put_if_absent("a", b"two")
    seen = storage.read_version("a")
    assert seen is not None
    assert not storage.put_if_version("a", b"three", "another version")
    assert storage.put_if_version("a", b"three", seen[1])
    assert storage.read("a") == b"three"
    assert storage.put_if_absent("a", b"three")  # as on S3 and disks: these bytes stand there, perhaps put by this very call
    assert storage.put_if_version("a", b"three", "another version")
    assert not storage.put_if_version("b", b"three", "another version")


def test_the_lease_is_held_and_what_is_not_promised_is_said(caplog: pytest.LogCaptureFixture) -> None:
    storage = open_storage("memory://lease")
    with caplog.at_level(logging.WARNING, logger="embedding"), Lease.acquire(storage, "first", LIVELY):
        assert "ignores conditional puts" in caplog.text
        with pytest.raises(OutputBusyError, match="is held by run first"):
            Lease.acquire(storage, "second", LIVELY)
    Lease.acquire(storage, "third", LIVELY).release()
