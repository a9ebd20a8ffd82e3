"""Workers and reads that leave a trace of what they do on which node, and that a test can hold at a point: real but for the device."""

from __future__ import annotations

import os
import secrets
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import ray

from embedding.run.exchange import decode_read, decode_units
from embedding.run.reading import read_stage
from embedding.run.worker import EmbeddingWorker, WorkerJob
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from embedding.model.embedder import Embedder
    from embedding.run.attempts import Attempts

HOLD_SECONDS = 240


@dataclass(frozen=True)
class Trace:
    """A folder where every event is a file, so that a process can die at any moment and no event is half there."""

    folder: Path

    def note(self, event: str, unit: str = "-") -> None:
        """The event, on this node, now."""
        (self.folder / f"{event},{unit},{node_here()},{secrets.token_hex(4)}").touch()

    def nodes(self, event: str) -> set[str]:
        """Ids of the nodes where it happened."""
        return {node for _, node in self._of(event)}

    def units(self, event: str, node: str = "") -> Counter[str]:
        """How often it happened to each unit, on that node or any."""
        return Counter(unit for unit, at in self._of(event) if node in ("", at))

    def _of(self, event: str) -> Iterator[tuple[str, str]]:
        for name in os.listdir(self.folder):  # noqa: PTH208  (quicker where a test asks all the time)
            found, _, rest = name.partition(",")
            if found == event:
                unit, node, _ = rest.split(",")
                yield unit, node


Hold = Callable[[Trace, str], bool]
"""Whether this node's worker has to wait on, asked again and again."""


def node_here() -> str:
    """Ray's id of the node of this process."""
    return str(ray.get_runtime_context().get_node_id())


def never(_trace: Trace, _node: str) -> bool:
    """Do not hold anybody."""
    return False


def watched_worker(trace: Trace, *, hold_load: Hold = never, hold_unit: Hold = never) -> type[EmbeddingWorker]:
    """A worker that runs its model on the CPU whatever the cluster calls a GPU, is named after its node, and can be held."""

    class WatchedWorker(EmbeddingWorker):
        def __init__(self, job: WorkerJob, attempts: Attempts) -> None:
            super().__init__(job, attempts)
            self._name = node_here()

        def load(self, job: WorkerJob) -> Embedder:
            from embedding.model.embedder import Embedder

            trace.note("loading")
            wait_until(lambda: not hold_load(trace, node_here()), seconds=HOLD_SECONDS, what="a worker to be let load")
            return Embedder(job.model, device="cpu", threads=1)

        def __call__(self, batch: pa.Table) -> pa.Table:
            [read] = decode_read(batch)
            trace.note("begun", read.unit.id)
            wait_until(lambda: not hold_unit(trace, node_here()), seconds=HOLD_SECONDS, what="a worker to be let go on")
            answer = super().__call__(batch)
            trace.note("done", read.unit.id)
            return answer

    return WatchedWorker


def watched_read(trace: Trace) -> Callable[..., pa.Table]:
    """The read of the job."""

    def watched(batch: pa.Table, **options: Any) -> pa.Table:
        [unit] = decode_units(batch)
        trace.note("read", unit.id)
        return read_stage(batch, **options)

    return watched
