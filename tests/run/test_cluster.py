"""A cluster that cannot be joined is one sentence, and soon."""

from __future__ import annotations

import socket

import pytest
import ray

from embedding.errors import ClusterError, ConfigError
from embedding.run.cluster import Cluster


@pytest.fixture(autouse=True)
def _not_connected() -> None:
    assert not ray.is_initialized()


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def test_a_cluster_that_is_not_there(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    address = f"127.0.0.1:{closed_port()}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    with (
        Cluster() as cluster,
        pytest.raises(
            ClusterError, match=rf"^joining the Ray cluster at RAY_ADDRESS={address} failed: .*refused; check it, or unset it to "
        ),
    ):
        cluster.nodes()
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("address", ["http://127.0.0.1:8265", "127.0.0.1:port"])
def test_what_is_no_address_of_a_cluster(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first is what `ray job submit` takes."""
    monkeypatch.setenv("RAY_ADDRESS", address)
    said = f"^RAY_ADDRESS={address} is not the address of a Ray cluster; set it to the head's host and port, such as head:6379, or unset it"
    with Cluster() as cluster, pytest.raises(ConfigError, match=said):
        cluster.nodes()
