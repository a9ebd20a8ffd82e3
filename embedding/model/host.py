"""The machine that a process runs on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock


def available_cpus() -> int:
    """CPUs this process may use: its affinity, bounded by a container's quota."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return cpus
    return cpus if quota == "max" else max(1, min(cpus, int(quota) // int(period)))


@contextmanager
def alone_on_this_machine(lock: Path) -> Iterator[None]:
    """Wait until no other process of this machine holds the lock file, and hold it while the block runs."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock, mode=0o666):  # caches are shared between users, too
        yield
