"""Where batches are computed: in the threads of a CPU, or on a GPU, which always has the next one waiting."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Final

import torch

from embedding.model.host import available_cpus

_AHEAD: Final = 2
"""Batches that are launched before a GPU has done the one before them. Its queue holds a thousand launches, of which a compiled layer takes
nine to sixteen. Were it full, a launch would wait in it, and hold Python's lock meanwhile, which the threads that tokenize and write need.
"""


class Lanes:
    """Computes the batches of all callers in the order in which they come, as many at once as there are lanes.

    A CPU has a lane for each of its threads, a GPU has one. Safe to call from several threads.
    """

    def __init__(self, device: torch.device, threads: int | None) -> None:
        """`threads` of a CPU, None: as many as it has cores."""
        self._on_gpu = device.type == "cuda"
        self.count = 1 if self._on_gpu else threads or available_cpus()
        self._pool = ThreadPoolExecutor(self.count, thread_name_prefix="encode")
        self._launched: deque[torch.cuda.Event] = deque()

    def start(self, batches: Iterable[Callable[[], int]]) -> Callable[[], int]:
        """Queue batches, each a function that computes or, on a GPU, launches it; the answer waits for all, and adds up what they gave."""
        return partial(self._finish, [self._pool.submit(self._run, batch) for batch in batches])

    def _run(self, batch: Callable[[], int]) -> tuple[int, torch.cuda.Event | None]:
        found = batch()
        return found, self._mark() if self._on_gpu else None

    def _mark(self) -> torch.cuda.Event:
        """Behind what was launched so far. Called by the one thread of a GPU's lane."""
        mark = torch.cuda.Event(blocking=True)
        mark.record()
        self._launched.append(mark)
        if len(self._launched) > _AHEAD:
            self._launched.popleft().synchronize()
        return mark

    def _finish(self, queued: list[Future[tuple[int, torch.cuda.Event | None]]]) -> int:
        try:
            done = [each.result() for each in queued]
        finally:
            for each in queued:
                each.cancel()  # where one failed, no one waits for those behind it
        if done and (last := done[-1][1]) is not None:
            last.synchronize()
        return sum(found for found, _ in done)
