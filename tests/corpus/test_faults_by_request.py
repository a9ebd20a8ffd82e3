"""Every fault of a network or a busy store on every kind of request: it passes unseen, or is told once the tries are spent."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import fsspec.config
import pytest

from embedding.corpus import ending, requests
from embedding.corpus.requests import with_retries
from embedding.corpus.storage import Storage, open_storage
from embedding.errors import ConfigError, StorageError
from tests.support.faulty_proxy import FaultyProxy
from tests.support.s3_server import S3Server

IMPATIENT = {"config_kwargs": {"read_timeout": 2.0}}
"""As FSSPEC_S3 says it: where the store does not answer, nobody wants to wait for the usual 30 s."""
BODY = bytes(range(256)) * 40
CALLS: dict[str, Callable[[Storage], Any]] = {
    "GET": lambda storage: storage.read("a"),
    "PUT": lambda storage: storage.put("new", BODY),
    "LIST": lambda storage: storage.list(""),
}
PASSING = {
    "slow down": 10,
    "internal error": 4,
    "too many requests": 3,
    "reset": 4,
    "truncate": 3,
    "stall": 1,
    "lose reply": 4,
    "trickle": 1,
}
"""How many in a row are survived, of four rounds of three tries; what no layer below sees costs a round each."""
COMBINATIONS = [(kind, fault) for kind in CALLS for fault in PASSING if (kind, fault) != ("PUT", "truncate")]  # whose answer is empty


@pytest.fixture
def storage(s3: S3Server, proxy: FaultyProxy) -> Storage:
    """A folder behind the proxy, with one object in it."""
    storage = open_storage(s3.folder())
    storage.put("a", BODY)
    proxy.requests.clear()
    return storage


@pytest.fixture
def impatient(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> Storage:
    """The same, with a client that does not wait for long."""
    monkeypatch.setitem(fsspec.config.conf, "s3", IMPATIENT)
    return open_storage(storage.url)


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize(("kind", "fault"), COMBINATIONS)
def test_a_fault_that_passes_is_not_seen(kind: str, fault: str, impatient: Storage, proxy: FaultyProxy) -> None:
    proxy.kinds = frozenset({kind})
    proxy.faults.extend([fault] * PASSING[fault])
    answer = CALLS[kind](impatient)
    assert not proxy.faults
    assert answer == {"GET": BODY, "PUT": None, "LIST": {"a": len(BODY)}}[kind]
    proxy.heal()
    name = "new" if kind == "PUT" else "a"
    assert impatient.list("") == {"a": len(BODY), name: len(BODY)}
    assert impatient.read(name) == BODY


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize("fault", ["slow down", "internal error", "reset"])
@pytest.mark.parametrize("kind", CALLS)
def test_tries_are_bounded_and_do_not_multiply(kind: str, fault: str, storage: Storage, proxy: FaultyProxy) -> None:
    proxy.kinds, proxy.always = frozenset({kind}), fault
    with pytest.raises(StorageError, match=r"; run the same command again to resume$"):
        CALLS[kind](storage)
    # aiohttp sends once more what meets a connection that was closed meanwhile
    method = kind if kind == "PUT" else "GET"
    assert sum(request.startswith(f"{method} ") for request in proxy.requests) in (12, 24)  # four rounds of three tries


@pytest.mark.usefixtures("no_waiting")
def test_an_upload_that_nobody_reads_ends(impatient: Storage, proxy: FaultyProxy) -> None:
    proxy.kinds = frozenset({"PUT"})
    proxy.faults.append("stall")
    impatient.put("large", bytes(2**24))  # more than what sockets buffer
    assert impatient.list("") == {"a": len(BODY), "large": 2**24}


def test_a_store_is_tried_for_as_long_as_patience_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter([0.0, 30.0, 59.0, 61.0])
    monkeypatch.setattr(requests, "_WAIT", lambda _: 0.0)
    clock, tries = [0.0], []
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def fail() -> None:
        clock[0] = next(moments)
        tries.append(clock[0])
        raise TimeoutError

    with pytest.raises(TimeoutError):
        with_retries(fail)
    assert tries == [0.0, 30.0, 59.0, 61.0]


def test_patience_that_is_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBED_STORE_SECONDS", "long")
    with pytest.raises(
        ConfigError, match="EMBED_STORE_SECONDS=long is not a number of seconds; unset it, or set it to a number such as 60"
    ):
        with_retries(lambda: None)


def test_waits_are_jittered_and_grow(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(requests, "sleep_using_event", lambda _: lambda _seconds: None)
    failures = iter([TimeoutError()] * 30)

    def fail() -> None:
        for error in failures:
            raise error

    with caplog.at_level("DEBUG", logger="embedding"):
        with_retries(fail)
    waits = [float(seconds) for seconds in re.findall(r" in (\S+) seconds", caplog.text)]
    assert len(waits) == 30
    assert max(waits[:3]) <= 1.0
    assert 1.0 < max(waits) <= 10.0
    assert len(set(waits)) > 25


@pytest.fixture
def asked_to_end() -> Iterator[None]:
    """The process was asked to end, in a twentieth of a second."""
    ending.end_within(0.05)
    yield
    ending.asked.clear()


@pytest.mark.usefixtures("asked_to_end")
def test_a_process_that_ends_waits_for_no_store() -> None:
    never = threading.Event()
    with pytest.raises(TimeoutError, match="no answer before this process had to end"):
        with_retries(never.wait)
    ending.end_within(30.0)
    assert with_retries(lambda: "at once") == "at once"


def test_a_wait_between_tries_ends_with_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "_WAIT", lambda _: 3600.0)
    tries = []

    def fail() -> None:
        tries.append(threading.Timer(0.05, ending.end_within, [0.0]))
        tries[-1].start()
        raise TimeoutError

    with pytest.raises(TimeoutError):
        with_retries(fail)
    for timer in tries:
        timer.join()
    ending.asked.clear()
    assert len(tries) <= 2
