"""The stages on Ray Data: units -> read on CPU -> embed and commit on the workers -> commit records. The only user of Ray on a cluster.

A proof of an output has one stage: units -> check on CPU -> what was found.
"""

from __future__ import annotations

import functools
import logging
import os
import re
import signal
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
import ray
import ray.data
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from embedding.corpus import ending
from embedding.corpus.findings import CheckedUnit
from embedding.corpus.ledger import CommitRecord, records_from_table
from embedding.corpus.plan import Unit
from embedding.errors import EmbeddingJobError
from embedding.run.checker import CheckJob, check_stage
from embedding.run.exchange import decode_checked, encode_unit
from embedding.run.placement import READ_CPUS, Placement, available_cpus
from embedding.run.worker import EmbeddingWorker, WorkerJob, read_stage

log = logging.getLogger(__name__)

_RAISED = re.compile(r"^[\w.]*(Error|Exception): ")
"""How the last line of a traceback begins."""
_UNITS_IN_HAND = 2
"""Units that a worker works on at once: one on the device, one being tokenized, written or put."""
_UNITS_AHEAD = 2
"""Read units that wait at a worker, so that it never waits for a read."""
_READ_TASKS = 10_000
"""More units than these share read tasks: Ray's driver pays for every task, and for putting its input into the object store first."""


class Cluster:
    """The Ray cluster of a run, connected when it is first needed: the one at RAY_ADDRESS, one already connected, or an embedded one.

    A context manager: at its end, what it connected is let go.
    """

    def __init__(self) -> None:
        self._ours = False
        self._embedded = False

    def nodes(self) -> list[dict[str, float]]:
        """The Ray resources of each node that lives."""
        if not ray.is_initialized():
            self._connect()
        return [node["Resources"] for node in ray.nodes() if node["Alive"]]

    def _connect(self) -> None:
        """An embedded cluster gets a CPU more than the machine has, for the reads beside a worker that holds them all."""
        _quiet()
        options: dict[str, Any] = {"logging_level": logging.CRITICAL, "log_to_driver": False}
        if not os.environ.get("RAY_ADDRESS"):
            cpus = available_cpus()
            log.info("starting Ray on this machine, %d CPUs (set RAY_ADDRESS to use a running cluster)", cpus)
            options |= {"address": "local", "num_cpus": cpus + 1, "include_dashboard": False}
            self._embedded = True
        with _own_sigterm():
            ray.init(**options)
        self._ours = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        in_haste = ending.asked.is_set() and not self._embedded  # a cluster that goes on notices by itself when a driver ends
        if self._ours and not in_haste:
            ray.shutdown()


def run_units(
    units: Sequence[Unit], job: WorkerJob, placement: Placement, worker: type[EmbeddingWorker] = EmbeddingWorker
) -> Iterator[CommitRecord]:
    """Embed and commit the units; yields their records as they come, in no order.

    One row of the dataset is one unit, and every batch and every block behind the read is one row, so that units never mix.
    """
    attempts = _RemoteAttempts.start()
    dataset = (
        _one_row_each(units)
        .map_batches(
            functools.partial(read_stage, columns=job.columns, attempts=attempts, max_attempts=job.max_unit_attempts),
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=READ_CPUS,
        )
        .map_batches(
            worker,
            batch_size=1,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(
                min_size=min(placement.min_workers, len(units)),
                max_size=min(placement.max_workers, len(units)),
                max_concurrent_calls_per_actor=_UNITS_IN_HAND,
                max_tasks_in_flight_per_actor=_UNITS_IN_HAND + _UNITS_AHEAD,
                enable_true_multi_threading=True,
            ),
            num_cpus=placement.cpus,
            num_gpus=placement.gpus,
            fn_constructor_kwargs={"job": job, "attempts": attempts},
        )
    )
    for batch in _stream(dataset):
        for record in records_from_table(batch):
            attempts.settle(record.unit)  # not before its record is here: until then the unit may be tried again
            yield record


def run_checks(units: Sequence[Unit], job: CheckJob, workers: int | None) -> Iterator[CheckedUnit]:
    """Check the units' shards, `workers` at once (None: as many as there are CPUs); yields what was found as it comes, in no order."""
    attempts = _RemoteAttempts.start()
    dataset = _one_row_each(units).map_batches(
        functools.partial(check_stage, job=job, attempts=attempts),
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.TaskPoolStrategy(size=workers),
        num_cpus=1,
    )
    for batch in _stream(dataset):
        for text in batch.column("checked").to_pylist():
            checked = decode_checked(text)
            attempts.settle(f"check {checked.unit}")
            yield checked


def _one_row_each(units: Sequence[Unit]) -> ray.data.Dataset:
    """The units, those with most rows first, so that at the end no process is left alone with a large one."""
    ordered = sorted(units, key=lambda unit: -unit.num_rows)
    dataset = ray.data.from_items([{"unit": encode_unit(unit)} for unit in ordered], override_num_blocks=min(len(units), _READ_TASKS))
    dataset.context.target_max_block_size = 1  # bytes: every unit goes on as soon as it is done, also where a task does several
    return dataset


def _stream(dataset: ray.data.Dataset) -> Iterator[pa.Table]:
    """The dataset's batches as they come."""
    try:
        yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
    except RayError as error:
        raise _explained(error) from error


class _AttemptCounter:
    """Lives in an actor of its own, so that its counts outlive the processes that die."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def begun(self, key: str) -> int:
        return self._counts[key]

    def begin(self, key: str) -> int:
        self._counts[key] += 1
        return self._counts[key]

    def settle(self, key: str) -> None:
        self._counts.pop(key, None)


class _RemoteAttempts:
    """The counter as reads and workers see it."""

    def __init__(self, counter: Any) -> None:
        self._counter = counter

    @classmethod
    def start(cls) -> Self:
        """A counter on the driver's node, which lives as long as the run."""
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        counter: Any = ray.remote(_AttemptCounter)
        return cls(counter.options(num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=here).remote())

    def begun(self, key: str) -> int:
        return int(ray.get(self._counter.begun.remote(key)))

    def begin(self, key: str) -> int:
        return int(ray.get(self._counter.begin.remote(key)))

    def settle(self, key: str) -> None:
        self._counter.settle.remote(key)


def reason_in(text: str) -> str:
    """What was raised, of a worker's traceback as Ray hands it on: as text, wrapped in errors of Ray's own, with hints below it."""
    lines = [line for line in text.splitlines() if line.strip()]
    raised = [line for line in lines if re.match(_RAISED, line)] or lines[-1:]
    ours = [line for line in raised if not line.startswith("ray.")] or raised
    return re.sub(_RAISED, "", ours[-1]) if ours else ""


def _explained(error: RayError) -> EmbeddingJobError:
    """What stopped the pipeline as one sentence."""
    reason = reason_in(str(error)) or type(error).__name__
    if "run the same command again" in reason:  # it says already what to do before that
        return EmbeddingJobError(f"the run stopped: {reason}")
    return EmbeddingJobError(f"the run stopped: {reason}; when that is mended, run the same command again to go on")


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Connecting installs Ray's own SIGTERM handlers, in C++ one that aborts the process; put back what was there."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def _quiet() -> None:
    """Ray's own progress and notices off: the job reports for itself. Ray's log files keep what its Python side says."""
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    for name in ("ray.data", "ray"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
