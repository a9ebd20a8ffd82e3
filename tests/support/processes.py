"""Processes that a test starts, ended by their ids however the test ends."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

STOP_SECONDS = 15


@contextmanager
def running(
    command: Sequence[str | Path], folder: Path, env: Mapping[str, str] | None = None, user: int | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Start `command` with `env` added to this process's variables; on the way out nothing of what it started is left.

    Its input is a pipe that stays open, so that a program can notice the end of the tests by the end of the pipe. Its output goes
    to the files `stdout` and `stderr` of `folder`: a pipe would stay open for as long as any child of it lives. Root can run it as the
    `user` of that number.
    """
    with (folder / "stdout").open("wb") as stdout, (folder / "stderr").open("wb") as stderr:
        variables = {**os.environ, **(env or {})}
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=stdout, stderr=stderr, env=variables, user=user, group=user, start_new_session=True
        )
    try:
        yield process
    finally:
        assert process.stdin is not None
        process.stdin.close()
        end(process)


def end(leader: subprocess.Popen[bytes]) -> None:
    """Let the leader of a session end, or kill it; and whatever it started."""
    leader.terminate()
    try:
        leader.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        leader.kill()
        leader.wait()
    end_session(leader.pid)


def session_members(leader: int, title: str = "") -> list[psutil.Process]:
    """Living processes of the session that `leader` began, orphans too, whose command line contains `title`.

    A worker of Ray is titled `ray::<its class or function>`.
    """
    members = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, ProcessLookupError):
            if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE and title in " ".join(process.cmdline()):
                members.append(process)
    return members


def end_session(leader: int) -> None:
    """Kill what is left of a session whose leader has ended: Ray's agents outlive a killed driver for minutes."""
    left = session_members(leader)
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=STOP_SECONDS)
