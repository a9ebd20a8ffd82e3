"""How much of a device's memory this process has taken, and whether enough is left."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

import torch

_LEFT_FREE = 0.3
"""Share that stays free: other units have longer rows, allocators leave holes, and on a CPU reads and writes need some too."""


class DeviceMemory:
    """The memory of one device, as one process sees it."""

    def __init__(self, device: str, share: float = 1.0) -> None:
        """`device`: cuda or cpu. `share`: the part of a GPU that this process may take for its own."""
        self._on_gpu = device == "cuda"
        self._limit = _gpu_bytes(share) if self._on_gpu else _host_bytes()

    def watch(self) -> None:
        """Forget the peak so far. A CPU has no such switch: its peak is that of the process."""
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats()

    def has_room(self) -> bool:
        """Whether the peak since `watch` left enough free."""
        return self.peak() <= (1 - _LEFT_FREE) * self._limit

    def peak(self) -> int:
        """Bytes, the model's included."""
        if self._on_gpu:
            return torch.cuda.max_memory_allocated()
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return used if sys.platform == "darwin" else 1024 * used

    def release(self) -> None:
        """Give back what the allocator keeps for later, which is in pieces after memory ran out."""
        if self._on_gpu:
            torch.cuda.empty_cache()


def _gpu_bytes(share: float) -> int:
    """What is this process's own by now, and what is free for it."""
    free, total = torch.cuda.mem_get_info()
    return min(free + torch.cuda.memory_reserved(), int(share * total))


def _host_bytes() -> int:
    """The machine's memory, bounded by a container's limit."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return machine
    return machine if limit == "max" else min(machine, int(limit))
