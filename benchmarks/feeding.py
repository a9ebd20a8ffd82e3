"""What a driver does while the workers work: units per second, how evenly they are shared out, what waits in between.

All the job's own but for the encoder, which sleeps.
"""

from __future__ import annotations

import logging
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import psutil
import ray
from ray._private.internal_api import get_memory_info_reply, get_state_from_address

from benchmarks.data import make_model
from benchmarks.setting import Result
from benchmarks.simulation import GROUPS, ROWS, planned, write_corpus
from benchmarks.sleeping import sleeping_worker, worker_job
from embedding.corpus.ledger import CommitRecord
from embedding.run.cluster import quiet_ray
from embedding.run.parcels import parcels_of
from embedding.run.pipeline import run_units
from embedding.run.placement import Placement

_UNIT_BYTES = 8_000_000
_UNIT_ROWS = 2_048
_STORE_BYTES = 2_000_000_000
_WATCH_SECONDS = 0.2
_FIRST_RECORDS = 200


def rate_stage(scratch: str, units: int, workers: int) -> Result:
    """Units a second with workers that do not even sleep, and the driver's own CPU time for each."""
    return _run(scratch, [(ROWS,) * GROUPS] * (units // GROUPS), workers, seconds_per_row=0.0)


def small_stage(scratch: str, units: int, workers: int) -> Result:
    """The same for files of one small unit each, which travel together."""
    return _run(scratch, [(ROWS,)] * units, workers, seconds_per_row=0.0, unit_rows=_UNIT_ROWS)


def efficiency_stage(scratch: str, workers: int, rounds: int) -> Result:
    """The share of the workers' time that went into units of one second each."""
    return _run(scratch, [(ROWS,)] * (workers * rounds), workers, seconds_per_row=1 / ROWS)


def tail_stage(scratch: str, workers: int, rounds: int) -> Result:
    """The same for uneven units, a tenth of a second to three, the large ones last in the corpus."""
    sizes = sorted(int(size) for size in np.random.default_rng(0).lognormal(np.log(6), 0.8, workers * rounds).clip(1, 30))
    return _run(scratch, [(size,) for size in sizes], workers, seconds_per_row=0.1) | {"sizes": sizes}


def memory_stage(scratch: str, workers: int, rounds: int) -> Result:
    """What lies in Ray's object store while units of 8 MB wait for workers that take half a second each."""
    found = _run(scratch, [(ROWS,)] * (workers * rounds), workers, seconds_per_row=0.5 / ROWS, text_bytes=_UNIT_BYTES // ROWS)
    return found | {"unit_megabytes": _UNIT_BYTES / 1e6}


def begin_stage(scratch: str, units: int) -> Result:
    """Seconds and memory of the driver until the first of very many units is done: before that Ray takes them all in."""
    process = psutil.Process()
    with tempfile.TemporaryDirectory(dir=scratch) as folder, _cluster(workers=2):
        write_corpus(f"{folder}/in", [(1_000,) * 100])
        fits = planned(f"{folder}/in", rows=1_000)
        many = [replace(unit, id=f"{unit.id}{copy}") for copy in range(-(-units // len(fits))) for unit in fits][:units]
        job = worker_job(make_model("tiny", Path(folder)), f"{folder}/out")
        before, started = process.memory_info().rss, time.perf_counter()
        records = run_units([[unit] for unit in many], job, _pool(2), sleeping_worker(0.0))
        seconds = [time.perf_counter() - started for _ in islice(records, _FIRST_RECORDS)]
        found: Result = {"units": len(many), "first": seconds[0], "then_per_second": _FIRST_RECORDS / (seconds[-1] - seconds[0])}
        found["megabytes"] = (process.memory_info().rss - before) / 1e6
        del records  # ends it
    return found


def _run(
    scratch: str,
    files: Sequence[tuple[int, ...]],
    workers: int,
    seconds_per_row: float,
    *,
    text_bytes: int = 30,
    unit_rows: int | None = None,
) -> Result:
    """The job's pipeline over such a corpus; `unit_rows` is what a unit may have, and None that each row group is one."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder, _cluster(workers), _watched_store() as store:
        write_corpus(f"{folder}/in", files, text_bytes)
        rows = unit_rows or max(max(groups) for groups in files)
        parcels = parcels_of(planned(f"{folder}/in", rows), rows=rows, workers=workers)
        job = worker_job(make_model("tiny", Path(folder)), f"{folder}/out")
        cpu = time.process_time()
        records = list(run_units(parcels, job, _pool(workers), sleeping_worker(seconds_per_row)))
        cpu = time.process_time() - cpu
    assert {record.error for record in records} == {""}
    driver = {"driver_cpu_seconds": cpu, "driver_ms_per_unit": 1e3 * cpu / len(records)}
    return {"units": len(records), "parcels": len(parcels), **driver, "object_store": store, **_shares(records)}


def _pool(workers: int) -> Placement:
    return Placement(min_workers=workers, max_workers=workers, gpus=0, cpus=1, fitting=workers, precision="fp32")


@contextmanager
def _cluster(workers: int) -> Iterator[None]:
    """A cluster with few CPUs besides the workers' own: they stand for cores that are not here, and a process reads on each."""
    quiet_ray()
    ray.init(
        address="local",
        num_cpus=workers + 2,
        object_store_memory=_STORE_BYTES,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.CRITICAL,
    )
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _watched_store() -> Iterator[Result]:
    """The most that lay in Ray's object store while the block ran, and what Ray moved to a disk for want of room."""
    found: Result = {"megabytes": _STORE_BYTES / 1e6, "peak_megabytes": 0.0, "spilled_megabytes": 0.0}
    state = get_state_from_address(ray.get_runtime_context().gcs_address)
    over = threading.Event()

    def watch() -> None:
        while not over.wait(_WATCH_SECONDS):
            stats = get_memory_info_reply(state).store_stats
            found["peak_megabytes"] = max(found["peak_megabytes"], stats.object_store_bytes_used / 1e6)
            found["spilled_megabytes"] = stats.spilled_bytes_total / 1e6

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield found
    finally:
        over.set()
        watcher.join()


def _shares(records: Sequence[CommitRecord]) -> Result:
    """What the workers did from the moment when the last of them began: how long one takes to start is no matter of the feeding.

    To the end of the last unit, so that workers which wait for others at the end count as idle.
    """
    spans: dict[str, list[tuple[float, float]]] = {}
    for record in records:
        spans.setdefault(record.worker, []).append((record.encode_started, record.encode_started + record.encode_seconds))
    begin = max(min(start for start, _ in each) for each in spans.values())
    end = max(stop for each in spans.values() for _, stop in each)
    busy = [sum(max(0.0, stop - max(start, begin)) for start, stop in each) for each in spans.values()]
    units = sum(stop > begin for each in spans.values() for _, stop in each)
    return {
        "workers": len(spans),
        "seconds": end - begin,
        "units_in_that_time": units,
        "units_per_second": units / (end - begin),
        "busy": sorted(share / (end - begin) for share in busy),
        "efficiency": sum(busy) / len(busy) / (end - begin),
        "units_by_worker": sorted(len(each) for each in spans.values()),
    }
