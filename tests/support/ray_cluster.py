"""A real Ray cluster on this machine that many test runs share, so that each does not start its own."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.support.processes import running, session_members
from tests.support.waiting import wait_until

_HOLD_A_CLUSTER = """
import sys, ray
context = ray.init(num_cpus=int(sys.argv[1]), _temp_dir=sys.argv[2], include_dashboard=False, log_to_driver=False)
print(context.address_info["gcs_address"], flush=True)
sys.stdin.read()
"""
"""Its cluster goes when its input ends, and so with the tests, even when they are killed."""

NO_TOKEN = {"RAY_AUTH_MODE": "disabled"}
"""By default a cluster that ray.init() starts asks for a token, which a driver that joins it by address does not send."""


@dataclass(frozen=True)
class RayCluster:
    """A cluster of one node, held by the process `pid`."""

    pid: int
    address: str

    def environment(self) -> dict[str, str]:
        """The variables that make a job join this cluster instead of starting one."""
        return {"RAY_ADDRESS": self.address, **NO_TOKEN}

    def processes(self, title: str = "ray::") -> list[psutil.Process]:
        """The cluster's own processes by title; the worker processes of the class or function X are titled `ray::X`."""
        return session_members(self.pid, title)


@contextmanager
def ray_cluster(cpus: int = 2, env: Mapping[str, str] | None = None) -> Iterator[RayCluster]:
    """Start a cluster; a worker of it sees the environment of now, plus `env`, and not that of the job that joins."""
    with tempfile.TemporaryDirectory(prefix="ray-cluster-") as name:
        folder = Path(name)
        command = [sys.executable, "-c", _HOLD_A_CLUSTER, str(cpus), name]
        with running(command, folder, {**NO_TOKEN, **(env or {})}) as process:

            def address() -> str:
                assert process.poll() is None, (folder / "stderr").read_text()
                text = (folder / "stdout").read_text()
                return text.strip() if text.endswith("\n") else ""

            yield RayCluster(process.pid, wait_until(address, what="the Ray cluster's address"))
