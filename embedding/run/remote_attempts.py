"""The counter of attempts in an actor, and how reads, workers and checks reach it. Imports no torch: reads and checks run without it."""

from __future__ import annotations

from typing import Any, Self

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from embedding.run.attempts import AttemptCounter


class RemoteAttempts:
    """A counter as reads and workers see it: it lives in an actor of its own, which outlives the processes that die."""

    def __init__(self, counter: Any) -> None:
        self._counter = counter

    @classmethod
    def start(cls) -> Self:
        """A counter on the driver's node, which lives as long as the run."""
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        counter: Any = ray.remote(AttemptCounter)
        return cls(counter.options(num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=here).remote())

    def begun(self, key: str) -> int:
        """As in `Attempts`."""
        return int(ray.get(self._counter.begun.remote(key)))

    def begin(self, key: str) -> int:
        """As in `Attempts`."""
        return int(ray.get(self._counter.begin.remote(key)))

    def fail(self, key: str, reason: str) -> None:
        """As in `Attempts`."""
        ray.get(self._counter.fail.remote(key, reason))

    def reason(self, key: str) -> str:
        """As in `Attempts`."""
        return str(ray.get(self._counter.reason.remote(key)))

    def settle(self, key: str) -> None:
        """As in `Attempts`."""
        self._counter.settle.remote(key)

    def unsettled(self) -> ray.ObjectRef[int]:
        """The number of units that are being read or worked on, without waiting for it."""
        asked: ray.ObjectRef[int] = self._counter.unsettled.remote()
        return asked
