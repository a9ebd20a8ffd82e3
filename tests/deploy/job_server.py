"""A real Ray cluster with its job server, as `ray start --head` and `ray up` leave one, that asks for a token."""

from __future__ import annotations

import secrets
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ray.job_submission import JobSubmissionClient

from tests.support.processes import running
from tests.support.waiting import wait_until

_HOLD_A_CLUSTER = """
import sys, ray
context = ray.init(num_cpus=2, _temp_dir=sys.argv[1], include_dashboard=True, dashboard_port=0, log_to_driver=False)
print(context.address_info["webui_url"], flush=True)
sys.stdin.read()
"""
"""Its cluster goes when its input ends, and so with the tests, even when they are killed."""


START_SECONDS = 120


@dataclass(frozen=True)
class JobServer:
    """Where the server listens, and the token without which it answers 401."""

    address: str
    token: str

    def client(self) -> JobSubmissionClient:
        """With the token by hand: a process that has used Ray already does not look at its environment again."""
        return JobSubmissionClient(self.address, headers={"Authorization": f"Bearer {self.token}"})

    def takes_submissions(self) -> bool:
        """Whether a submission is accepted: the server answers some seconds before the node does."""
        try:
            self.client().submit_job(entrypoint="true")
        except (ConnectionError, RuntimeError):
            return False
        return True

    def environment(self) -> dict[str, str]:
        """What a client of this server has in its environment."""
        return {"RAY_API_SERVER_ADDRESS": self.address, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}


@contextmanager
def job_server(python: str = sys.executable) -> Iterator[JobServer]:
    """Start a cluster of one node with 2 CPUs on this interpreter; it is gone when the block is left."""
    token = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="job-server-") as name:
        folder = Path(name)
        env = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
        with running([python, "-c", _HOLD_A_CLUSTER, name], folder, env) as process:

            def address() -> str:
                assert process.poll() is None, (folder / "stderr").read_text()
                text = (folder / "stdout").read_text()
                return text.strip() if text.endswith("\n") else ""

            server = JobServer(f"http://{wait_until(address, what='the job server', seconds=START_SECONDS)}", token)
            wait_until(server.takes_submissions, what="the node's agent, which starts what is submitted", seconds=START_SECONDS)
            yield server
