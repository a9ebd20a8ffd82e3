"""The stages on Ray Data: parcels -> read on CPU -> embed and commit on the workers -> commit records. The only user of Ray on a cluster.

A proof of an output has one stage: parcels -> check on CPU -> what was found.
"""

from __future__ import annotations

import functools
import gc
import logging
import re
import socket
from collections.abc import Iterator, Sequence
from typing import Any, cast

import pyarrow as pa
import ray
import ray.data
from ray.exceptions import GetTimeoutError, RayError

from embedding.corpus.findings import CheckedUnit
from embedding.corpus.ledger import CommitRecord, records_from_table
from embedding.errors import EmbeddingJobError, ModelError
from embedding.run.calibrator import CalibrationJob, Calibrator, Ranges
from embedding.run.checker import CheckJob, check_stage
from embedding.run.comparer import Comparer, Fidelity
from embedding.run.exchange import decode_checked, encode_units, rows_in
from embedding.run.parcels import Parcel, dealt
from embedding.run.placement import READ_CPUS, Placement
from embedding.run.probe import Findings, Probe, ProbeJob
from embedding.run.reading import read_stage, reason_of
from embedding.run.remote_attempts import RemoteAttempts
from embedding.run.sample import FoundT, JobT, OnSample
from embedding.run.worker import UNITS_IN_HAND, EmbeddingWorker, WorkerJob

log = logging.getLogger(__name__)

_RAISED = re.compile(r"^[\w.]*(Error|Exception): ")
"""How the last line of a traceback begins."""
_DROPPED = "cancelled before it started running"
"""How Ray ends its words on an actor of which nobody knows any more: a driver with a token does not answer a cluster without one, which
takes it that no actor is needed.
"""
_PARCELS_AT_WORKER = 2
"""For each in hand, one of them waiting, so that no worker waits for a read. With a quarter less, Ray Data would take the workers for idle
and start no further ones (`DEFAULT_ACTOR_POOL_UTIL_UPSCALING_THRESHOLD`).
"""
_READ_TASKS = 2_000
"""More parcels than these share read tasks: before the first one starts, Ray's driver puts the input of each into the object store, 1 ms
each. Not far fewer, since a read task that dies with its node begins again.
"""
_PLACE_SECONDS = 600
"""A cluster that grows may have to get a machine first; the workers would wait for it too."""
_PROBE_SECONDS = 300
"""Loading a large model takes longest of what is done before the run, and is bounded by nothing else."""
_CALIBRATION_SECONDS = 3600
"""A bounded number of tokens, through a model of any size: no run begins without it."""


def run_units(
    parcels: Sequence[Parcel],
    job: WorkerJob,
    placement: Placement,
    worker: type[EmbeddingWorker] = EmbeddingWorker,
    in_flight: InFlight | None = None,
) -> Iterator[CommitRecord]:
    """Embed and commit the units; yields their records as they come, in no order. `in_flight` tells how many are at work meanwhile.

    One row of the dataset is one parcel, and every batch and every block behind the read is one row, so that units never mix.
    """
    attempts = RemoteAttempts.start()
    in_hand = UNITS_IN_HAND[placement.device]
    if in_flight is not None:
        in_flight.watch(attempts)
    dataset = (
        _one_row_each(parcels)
        .map_batches(
            functools.partial(read_stage, columns=job.columns, attempts=attempts, max_attempts=job.max_unit_attempts),
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=READ_CPUS,
        )
        .map_batches(
            _Starting,
            batch_size=1,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(
                min_size=min(placement.min_workers, len(parcels)),
                max_size=min(placement.max_workers, len(parcels)),
                max_concurrent_calls_per_actor=in_hand,
                max_tasks_in_flight_per_actor=_PARCELS_AT_WORKER * in_hand,
                enable_true_multi_threading=True,
            ),
            num_cpus=placement.cpus,
            num_gpus=placement.gpus,
            fn_constructor_kwargs={"worker": worker, "job": job, "attempts": attempts},
        )
    )
    for batch in _stream(dataset):
        for record in records_from_table(rows_in(batch)):
            attempts.settle(record.unit)  # not before its record is here: until then the unit may be tried again
            yield record


def run_checks(parcels: Sequence[Parcel], job: CheckJob, workers: int | None) -> Iterator[CheckedUnit]:
    """Check the units' shards, `workers` at once (None: as many as there are CPUs); yields what was found as it comes, in no order."""
    attempts = RemoteAttempts.start()
    dataset = _one_row_each(parcels).map_batches(
        functools.partial(check_stage, job=job, attempts=attempts),
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.TaskPoolStrategy(size=workers),
        num_cpus=1,
    )
    for batch in _stream(dataset):
        for text in rows_in(batch).column("checked").to_pylist():
            yield decode_checked(text)


def run_probe(job: ProbeJob, placement: Placement) -> Findings:
    """What a process like a worker's measures. It waits for its place as a worker would, but not for ever.

    Raises:
        EmbeddingJobError: there was no place, or nothing could be measured.
    """
    return _found_by(Probe, job, placement, _PROBE_SECONDS)


def run_calibration(job: CalibrationJob, placement: Placement) -> Ranges:
    """The ranges of the sample's numbers, measured in such a process.

    Raises:
        EmbeddingJobError: there was no place, or nothing could be measured.
    """
    return _found_by(Calibrator, job, placement, _CALIBRATION_SECONDS)


def run_comparison(job: CalibrationJob, placement: Placement) -> Fidelity:
    """How near the job's precision stays to float32, measured in such a process.

    Raises:
        ModelError: the model does not run in it there.
        EmbeddingJobError: there was no place, or nothing could be measured.
    """
    return _found_by(Comparer, job, placement, _CALIBRATION_SECONDS)


def _found_by(process: type[OnSample[JobT, FoundT]], job: JobT, placement: Placement, seconds: float) -> FoundT:
    actor: Any = ray.remote(process)
    probe = actor.options(num_cpus=placement.cpus, num_gpus=placement.gpus).remote(job)
    try:
        ray.get(probe.is_there.remote(), timeout=_PLACE_SECONDS)
        return cast(FoundT, ray.get(probe.find.remote(), timeout=seconds))
    except GetTimeoutError as error:
        raise EmbeddingJobError("the worker that was to measure was not ready in time") from error
    except RayError as error:
        reason = reason_in(str(error)) or type(error).__name__
        raise (ModelError if _is_of_the_model(reason, error) else EmbeddingJobError)(reason) from error
    finally:
        ray.kill(probe)  # its place is for a worker


def _one_row_each(parcels: Sequence[Parcel]) -> ray.data.Dataset:
    """The parcels, in read tasks of one or several."""
    tasks = min(len(parcels), _READ_TASKS)
    dataset = ray.data.from_items([encode_units(parcel) for parcel in dealt(parcels, tasks)], override_num_blocks=tasks)
    dataset.context.target_max_block_size = 1  # bytes: every parcel goes on as soon as it is done, also where a task does several
    return dataset


def _stream(dataset: ray.data.Dataset) -> Iterator[pa.Table]:
    """The dataset's batches as they come."""
    try:
        yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
    except RayError as error:
        raise _explained(error) from error


class _Starting:
    """A worker that starts in any case, and says at its first unit why it cannot work: where one does not start, Ray prints a traceback.

    Raises:
        ModelError: the model is of no use on this machine.
        EmbeddingJobError: anything else.
    """

    def __init__(self, worker: type[EmbeddingWorker], job: WorkerJob, attempts: RemoteAttempts) -> None:
        self._worker: EmbeddingWorker | None = None
        try:
            self._worker = worker(job, attempts)
        except Exception as error:  # whatever a machine of a cluster lacks
            log.warning("a worker cannot start", exc_info=not isinstance(error, EmbeddingJobError))
            kind = ModelError if isinstance(error, ModelError) else EmbeddingJobError
            self._error = kind(f"a worker on {socket.gethostname()} cannot start: {reason_of(error)}")
        gc.collect()
        gc.freeze()  # half a million objects of libraries, which stay: to look through them again stops all threads for 0.2 s each time

    def __call__(self, batch: pa.Table) -> pa.Table:
        if self._worker is None:
            raise self._error
        return self._worker(batch)


class InFlight:
    """How many units are being read or worked on, for a progress view: asks without waiting for the answer."""

    def __init__(self) -> None:
        self._attempts: RemoteAttempts | None = None
        self._asked: ray.ObjectRef[int] | None = None
        self._known: int | None = None

    def watch(self, attempts: RemoteAttempts) -> None:
        """Ask this counter from now on."""
        self._attempts = attempts

    def __call__(self) -> int | None:
        """As many as there were when the last answer was given, None before the first one."""
        if self._attempts is None:
            return None
        if self._asked is None:
            self._asked = self._attempts.unsettled()
        if ray.wait([self._asked], timeout=0)[0]:
            answer, self._asked = self._asked, None
            try:
                self._known = ray.get(answer)
            except RayError:  # the cluster is going, which the records' side tells
                self._known = None
        return self._known


def reason_in(text: str) -> str:
    """The error itself, out of a worker's traceback as Ray passes it on: as text, wrapped in Ray's own errors, with hints below it."""
    lines = [line for line in text.splitlines() if line.strip()]
    raised = [line for line in lines if re.match(_RAISED, line)] or lines[-1:]
    ours = [line for line in raised if not line.startswith("ray.")] or raised
    return re.sub(_RAISED, "", ours[-1]) if ours else ""


def _explained(error: RayError) -> EmbeddingJobError:
    """What stopped the pipeline as one sentence."""
    reason = reason_in(str(error)) or type(error).__name__
    if _is_of_the_model(reason, error):
        return ModelError(f"the run stopped: {reason}")
    if "run the same command again" in reason:  # it says already what to do before that
        return EmbeddingJobError(f"the run stopped: {reason}")
    if _DROPPED in reason:
        cause = "Ray dropped a worker before it started, as it does where this process uses a token and the cluster has none"
        return EmbeddingJobError(f"the run stopped: {cause}; in a new process, set RAY_AUTH_MODE=disabled and run the same command again")
    return EmbeddingJobError(f"the run stopped: {reason}; fix that, then run the same command again to resume")


def _is_of_the_model(reason: str, error: RayError) -> bool:
    """Whether a worker found that its model is of no use, for that reason."""
    return f"{ModelError.__module__}.{ModelError.__qualname__}: {reason}" in str(error)
