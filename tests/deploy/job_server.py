"""A real Ray cluster with its job server, as `ray start --head` and `ray up` leave one."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from ray.job_submission import JobSubmissionClient

from tests.support.processes import running
from tests.support.waiting import wait_until

PORTS = ("port", "dashboard-port", "dashboard-agent-listen-port", "ray-client-server-port")
"""Of fixed defaults, which another Ray on this machine may hold; without its own one the node's agent takes no submission."""
START_SECONDS = 120


@dataclass(frozen=True)
class JobServer:
    """Where the server listens, and the token without which it answers 401; None: it asks for none."""

    address: str
    token: str | None

    def client(self) -> JobSubmissionClient:
        """With the token by hand: a process that has used Ray already does not look at its environment again."""
        return JobSubmissionClient(self.address, headers={"Authorization": f"Bearer {self.token}"} if self.token else None)

    def takes_submissions(self) -> bool:
        """Whether a submission is accepted: the server answers some seconds before the node does."""
        try:
            self.client().submit_job(entrypoint="true")
        except (OSError, RuntimeError):
            return False
        return True

    def environment(self) -> dict[str, str]:
        """What a client of this server has in its environment."""
        return {"RAY_API_SERVER_ADDRESS": self.address, **_authentication(self.token)}


@contextmanager
def job_server(python: str = sys.executable, *, asks_for_token: bool = True) -> Iterator[JobServer]:
    """Start a cluster of one node with 2 CPUs on this interpreter, `python` to submissions; it is gone when the block is left."""
    token = secrets.token_hex(16) if asks_for_token else None
    path = f"{Path(python).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**_authentication(token), "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0", "PATH": path}
    with tempfile.TemporaryDirectory(prefix="job-server-") as name:
        ports = _free_ports()
        options = [f"--{option}={port}" for option, port in ports.items()]
        start = [python, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=2", f"--temp-dir={name}", *options]
        with running([*start, "--node-ip-address=127.0.0.1", "--disable-usage-stats"], Path(name), env) as process:
            server = JobServer(f"http://127.0.0.1:{ports['dashboard-port']}", token)

            def ready() -> bool:
                assert process.poll() is None, (Path(name) / "stderr").read_text()
                return server.takes_submissions()

            wait_until(ready, what="the job server and the node's agent", seconds=START_SECONDS)
            yield server


def bare_python(folder: Path) -> str:
    """An interpreter with this project's dependencies, but without the package, as the nodes of a plain cluster may have it."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    [packages] = folder.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n")  # whose own .pth files do not count
    return str(folder / "bin" / "python")


def _authentication(token: str | None) -> dict[str, str]:
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token} if token else {"RAY_AUTH_MODE": "disabled"}


def _free_ports() -> dict[str, int]:
    """A free port for each, all held open together so that none is named twice."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in PORTS]
        return {option: opened.getsockname()[1] for option, opened in zip(PORTS, sockets, strict=True)}
