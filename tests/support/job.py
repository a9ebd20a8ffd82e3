"""The job as a user runs it: `python jobs/embed_corpus.py ...` in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.support.processes import running, session_members
from tests.support.waiting import wait_until

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "jobs" / "embed_corpus.py"
RUN_SECONDS = 240
LOG_LINE = r"\d\d:\d\d:\d\d (INFO|WARNING) \S.*"
"""A message of the job on stderr."""


@dataclass(frozen=True)
class JobResult:
    """What a finished run left behind."""

    exit_code: int
    """As a shell shows it: 128 + N after signal N."""
    stdout: str
    stderr: str
    summary: dict[str, Any] = field(repr=False)
    """The JSON object on the last line of stdout; empty where there is none."""


@dataclass(frozen=True)
class RunningJob:
    """A run that has begun."""

    process: subprocess.Popen[bytes]
    folder: Path

    def kill(self) -> JobResult:
        """SIGKILL to the driver alone, as the kernel does it when memory runs out; what Ray leaves behind ends with the `with` block."""
        return self._end_by(signal.SIGKILL)

    def terminate(self) -> JobResult:
        """SIGTERM to the driver, as `ray job stop` and cluster schedulers send it."""
        return self._end_by(signal.SIGTERM)

    def interrupt(self) -> JobResult:
        """SIGINT to the driver, as Ctrl-C sends it."""
        return self._end_by(signal.SIGINT)

    def wait(self, seconds: float = RUN_SECONDS) -> JobResult:
        """The result, once the driver has ended."""
        code = self.process.wait(seconds)
        return _result(code if code >= 0 else 128 - code, self.folder)

    def wait_until(self, condition: Callable[[], object], *, what: str, seconds: float = RUN_SECONDS) -> None:
        """Wait for `condition` while the driver lives.

        Raises:
            AssertionError: the driver ended first.
        """
        wait_until(lambda: self.process.poll() is not None or condition(), seconds=seconds, what=what)
        assert self.process.poll() is None, f"the job ended before {what}:\n{self.wait()}"

    def workers(self, title: str = "ray::") -> list[psutil.Process]:
        """Ray worker processes of a job that started its own cluster, by title."""
        return session_members(self.process.pid, title)

    def _end_by(self, number: signal.Signals) -> JobResult:
        os.kill(self.process.pid, number)
        return self.wait()


@contextmanager
def start_job(*args: str | Path, env: Mapping[str, str] | None = None) -> Iterator[RunningJob]:
    """Begin a run with `env` added to the environment; when the block is left, nothing of it runs any more."""
    with tempfile.TemporaryDirectory(prefix="job-") as name:
        folder = Path(name)
        with running([sys.executable, SCRIPT, *map(str, args)], folder, env) as process:
            yield RunningJob(process, folder)


def run_job(*args: str | Path, env: Mapping[str, str] | None = None, check: int | None = 0, seconds: float = RUN_SECONDS) -> JobResult:
    """Run the job to its end and expect the exit code `check` (None: any)."""
    with start_job(*args, env=env) as job:
        result = job.wait(seconds)
    assert check in (None, result.exit_code), f"exit code {result.exit_code}, expected {check}:\n{result.stdout}\n{result.stderr[-6000:]}"
    return result


def _result(exit_code: int, folder: Path) -> JobResult:
    stdout, stderr = (folder / "stdout").read_text(errors="replace"), (folder / "stderr").read_text(errors="replace")
    last = stdout.rstrip().rpartition("\n")[2]
    return JobResult(exit_code, stdout, stderr, json.loads(last) if last.startswith("{") else {})
