"""Fixtures of the corpus tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

NOBODY = 65534


@pytest.fixture
def unprivileged() -> Iterator[None]:
    """The test runs without root's right to read and write everything."""
    if os.geteuid():
        yield
        return
    os.seteuid(NOBODY)
    yield
    os.seteuid(0)
