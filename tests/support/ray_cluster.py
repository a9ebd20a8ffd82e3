"""Real Ray clusters on this machine: one of one node that many test runs share, and one of several nodes to lose some of."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
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

_HOLD_NODES = """
import json, sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}, shutdown_at_exit=False)
print(cluster.address, flush=True)
for line in sys.stdin:
    node = cluster.add_node(**json.loads(line))
    print(node.all_processes["raylet"][0].process.pid, node.node_id, flush=True)
for node in cluster.list_all_nodes():
    node.kill_all_processes(check_alive=False, allow_graceful=False)
"""
"""Answers each line of its input, resources as JSON, with one more node's raylet and id. Nodes have no way out but being killed."""

NODE_SECONDS = 180
"""A node starts in two seconds, on a machine that is not too busy."""

_NODES_ENVIRONMENT = {
    "RAY_health_check_period_ms": "500",  # a dead node is noticed after seconds, not after a minute
    "RAY_health_check_failure_threshold": "3",
    "RAY_prestart_worker_first_driver": "0",  # idle workers on every node would take the tests' CPUs
    "RAY_raylet_start_wait_time_s": str(NODE_SECONDS),
    "RAY_worker_register_timeout_seconds": str(NODE_SECONDS),
    "RAY_worker_niceness": "0",  # by default workers wait for everything else that the machine does
}

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


@dataclass(frozen=True)
class RayNodes(RayCluster):
    """A cluster of a head without CPUs, which drivers join, and of nodes that can die and be replaced."""

    raylets: list[int]
    """Process ids of the living nodes' raylets, in the order in which they joined."""
    ids: dict[int, str]
    """Ray's ids of all nodes that ever joined, by raylet."""
    _holder: subprocess.Popen[bytes]
    _answers: Path
    _node_cpus: int

    def add_node(self, **resources: float) -> int:
        """Let a node join; the process id of its raylet. `resources` are Ray's, such as num_gpus=1: nobody looks for the GPU."""
        known = len(self._lines())
        assert self._holder.stdin is not None
        self._holder.stdin.write(json.dumps({"num_cpus": self._node_cpus, **resources}).encode() + b"\n")
        self._holder.stdin.flush()
        wait_until(lambda: self._holder.poll() is not None or len(self._lines()) > known, seconds=NODE_SECONDS, what="a node to join")
        assert self._holder.poll() is None, self._answers.with_name("stderr").read_text()
        raylet, _, node = self._lines()[known].partition(" ")
        self.raylets.append(int(raylet))
        self.ids[int(raylet)] = node
        return self.raylets[-1]

    def kill_node(self, raylet: int) -> None:
        """SIGKILL to the node's raylet: the node is lost to the cluster at once, and its worker processes end themselves."""
        self.raylets.remove(raylet)
        psutil.Process(raylet).kill()

    def lose_node(self, raylet: int) -> None:
        """The node and all its processes are gone at one moment, as a spot instance is."""
        processes = psutil.Process(raylet).children(recursive=True)
        self.kill_node(raylet)
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def _lines(self) -> list[str]:
        return self._answers.read_text().rpartition("\n")[0].splitlines()


@contextmanager
def ray_nodes(nodes: int, node_cpus: int, env: Mapping[str, str] | None = None) -> Iterator[RayNodes]:
    """Start a cluster of a head and `nodes` nodes; its workers see the environment of now, plus `env`."""
    with tempfile.TemporaryDirectory(prefix="ray-nodes-") as name:
        folder = Path(name)
        variables = {**NO_TOKEN, **_NODES_ENVIRONMENT, "RAY_TMPDIR": name, **(env or {})}
        with running([sys.executable, "-c", _HOLD_NODES], folder, variables) as process:
            answers = folder / "stdout"

            def address() -> str:
                assert process.poll() is None, (folder / "stderr").read_text()
                return answers.read_text().partition("\n")[0]

            head = wait_until(address, seconds=NODE_SECONDS, what="the Ray head's address")
            cluster = RayNodes(process.pid, head, [], {}, process, answers, node_cpus)
            for _ in range(nodes):
                cluster.add_node()
            yield cluster


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
