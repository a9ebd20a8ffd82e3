"""Fixtures of the corpus tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import s3fs
from botocore.retries.standard import ExponentialBackoff
from tenacity import stop_after_attempt, wait_none

from embedding.corpus import requests
from tests.support.faulty_proxy import FaultyProxy, faulty_proxy
from tests.support.s3_server import S3Server

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


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tries follow each other at once, and end by number where time would end them."""
    monkeypatch.setattr(requests, "_WAIT", wait_none())
    monkeypatch.setattr(requests, "stop_after_delay", lambda _: stop_after_attempt(4))
    monkeypatch.setattr(ExponentialBackoff, "delay_amount", lambda *_: 0)


@pytest.fixture
def fresh_clients(s3: S3Server) -> Iterator[None]:
    """File systems made in the test see the environment as the test sets it, and none later does."""
    del s3
    s3fs.S3FileSystem.clear_instance_cache()
    yield
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def proxy(s3: S3Server, fresh_clients: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """A proxy that all clients of the test go through."""
    del fresh_clients
    with faulty_proxy(s3.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy
