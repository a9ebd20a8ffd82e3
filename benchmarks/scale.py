"""How far one driver reaches: planning, resuming and completing a million units, units per second, and how evenly workers share them.

`python -m benchmarks.scale --help`. Prints a Markdown table and writes all raw figures as JSON; docs/scale.md reads them.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import ray

from benchmarks.bench import hardware, versions
from benchmarks.data import make_model
from benchmarks.simulation import COLUMNS, FINGERPRINT, planned, sleeping_worker, worker_job, write_corpus, write_shards
from benchmarks.stages import Result
from embedding.corpus.output import Output
from embedding.corpus.plan import Unit, plan_units
from embedding.corpus.reader import read_layouts
from embedding.corpus.sources import list_sources
from embedding.run.pipeline import run_units
from embedding.run.placement import Placement

STAGES = ("plan", "rate", "efficiency", "tail")
_GROUPS, _ROWS = 10, 8
"""Row groups of a source file, and their rows; a row group is a unit."""


def main(words: Sequence[str] | None = None) -> Result:
    """Run what the command line asks for."""
    options = _options(words)
    logging.getLogger("ray").setLevel(logging.CRITICAL)
    started = time.time()
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        root = options.root or scratch
        stages: dict[str, Callable[[], Result]] = {
            "plan": lambda: plan_stage(root, options.files),
            "rate": lambda: rate_stage(scratch, options.units),
            "efficiency": lambda: {str(workers): efficiency_stage(scratch, workers, options.rounds) for workers in options.workers},
            "tail": lambda: tail_stage(scratch, options.workers[-1]),
        }
        found: Result = {
            "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(started)),
            "store": "S3" if root.startswith("s3://") else "disk",
            "hardware": hardware("cpu", 1) | {"note": options.note},
            "versions": versions(),
            "stages": {name: stages[name]() for name in options.stages},
        }
    sys.stdout.write(table(found) + "\n")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    return found


def _options(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    parser.add_argument("--root", help="folder or URL for corpus and output of the plan stage; default: a temporary folder")
    parser.add_argument("--scratch", help="where temporary folders are made")
    parser.add_argument("--files", type=int, default=100_000, help=f"source files of {_GROUPS} units each in the plan stage")
    parser.add_argument("--units", type=int, default=2_000, help="units of the rate stage")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--rounds", type=int, default=12, help="units a worker in the efficiency stage, one second each")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--note", default="", help="kept in the result, such as what else ran on the machine")
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    return parser.parse_args(words)


def plan_stage(root: str, files: int) -> Result:
    """Seconds and memory of a driver that plans a new corpus, of one that finds everything done, and of completing it."""
    write_corpus(f"{root}/in", [(_ROWS,) * _GROUPS] * files)
    found: Result = {"files": files, "units": files * _GROUPS, "plan": _apart(_plan, root)}
    write_shards(Output(f"{root}/out"), planned(f"{root}/in", _ROWS))
    return found | {"resume": _apart(_resume, root), "complete": _apart(_complete, root)}


def _apart(measure: Callable[[str, _Stopwatch], object], root: str) -> Result:
    """What `measure` took, in a process of its own, whose peak of memory is its alone."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_measured, measure, root).result()


class _Stopwatch:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name], self._last = now - self._last, now


def _measured(measure: Callable[[str, _Stopwatch], object], root: str) -> Result:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    watch = _Stopwatch()
    measure(root, watch)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": watch.seconds | {"all": sum(watch.seconds.values())}, "megabytes": peak / 1e3, "megabytes_before": before / 1e3}


def _plan(root: str, watch: _Stopwatch) -> list[Unit]:
    sources = list_sources([f"{root}/in"])
    watch.lap("list sources")
    layouts = list(read_layouts(sources, COLUMNS))
    watch.lap("read footers")
    units = sorted(plan_units(layouts, unit_rows=_ROWS, fingerprint=FINGERPRINT), key=lambda unit: unit.shard)
    watch.lap("cut units")
    return units


def _resume(root: str, watch: _Stopwatch) -> tuple[list[Unit], dict[str, int]]:
    units = _plan(root, watch)
    committed = Output(f"{root}/out").shards()
    watch.lap("list shards")
    assert all(unit.shard in committed for unit in units)
    return units, committed


def _complete(root: str, watch: _Stopwatch) -> None:
    units, committed = _resume(root, watch)
    Output(f"{root}/out").complete(units, committed, lambda: None)
    watch.lap("ledger, manifest")


def rate_stage(scratch: str, units: int) -> Result:
    """Units a second with workers that do not even sleep, and the driver's own CPU time for each."""
    found = _run(scratch, [(_ROWS,) * _GROUPS] * (units // _GROUPS), workers=4, seconds_per_row=0.0)
    rate = {"units_per_second": found["units"] / found["seconds"], "driver_ms_per_unit": 1e3 * found["driver_cpu_seconds"] / found["units"]}
    return found | rate


def efficiency_stage(scratch: str, workers: int, rounds: int) -> Result:
    """The share of the workers' time that went into units of one second each."""
    units = workers * rounds
    found = _run(scratch, [(_ROWS,)] * units, workers, seconds_per_row=1 / _ROWS)
    return found | {"efficiency": units / workers / found["seconds"]}


def tail_stage(scratch: str, workers: int) -> Result:
    """The same for uneven units, a tenth of a second to three, the large ones last in the corpus."""
    sizes = sorted(int(size) for size in np.random.default_rng(0).lognormal(np.log(6), 0.8, 8 * workers).clip(1, 30))
    found = _run(scratch, [(size,) for size in sizes], workers, seconds_per_row=0.1)
    return found | {"sizes": sizes, "efficiency": sum(sizes) * 0.1 / workers / found["seconds"]}


def _run(scratch: str, files: Sequence[tuple[int, ...]], workers: int, seconds_per_row: float) -> Result:
    """The job's pipeline over such a corpus, from the start of the first unit's encoding to the end of the last one's."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        write_corpus(f"{folder}/in", files)
        units = planned(f"{folder}/in", max(max(groups) for groups in files))
        job = worker_job(make_model("tiny", Path(folder)), f"{folder}/out")
        ray.init(address="local", num_cpus=2 * workers + 2, include_dashboard=False, log_to_driver=False, logging_level=logging.CRITICAL)
        try:
            cpu = time.process_time()
            placement = Placement(min_workers=workers, max_workers=workers, gpus=0, cpus=1, fitting=workers)
            records = list(run_units(units, job, placement, sleeping_worker(seconds_per_row)))
            cpu = time.process_time() - cpu
        finally:
            ray.shutdown()
    assert {record.error for record in records} == {""}
    starts = [record.encode_started for record in records]
    ends = [record.encode_started + record.encode_seconds for record in records]
    by_worker = Counter(record.worker for record in records)
    return {
        "units": len(records),
        "seconds": max(ends) - min(starts),
        "driver_cpu_seconds": cpu,
        "units_by_worker": sorted(by_worker.values()),
    }


def table(found: Result) -> str:
    """The figures as one Markdown table."""
    title = f"{found['store']}, {found['hardware']['cores']} cores for driver, store and workers together"
    lines = [[title, ""], ["---", "---"], *_rows(found["stages"])]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _rows(stages: Result) -> Iterator[list[str]]:
    if plan := stages.get("plan"):
        for name in ("plan", "resume", "complete"):
            laps = ", ".join(f"{lap} {seconds:.1f}" for lap, seconds in plan[name]["seconds"].items() if lap != "all")
            total, memory = plan[name]["seconds"]["all"], plan[name]["megabytes"] - plan[name]["megabytes_before"]
            yield [f"{name}: {plan['units']:,} units of {plan['files']:,} files", f"{total:.0f} s ({laps}), {memory:,.0f} MB more"]
    if rate := stages.get("rate"):
        ceiling = f"{rate['driver_ms_per_unit']:.1f} ms of the driver's CPU each"
        yield [f"{rate['units']:,} units without work", f"{rate['units_per_second']:.0f} units/s, {ceiling}"]
    for workers, found in stages.get("efficiency", {}).items():
        yield [f"units of one second, {workers} workers", f"{found['efficiency']:.1%} of their time"]
    if tail := stages.get("tail"):
        yield ["uneven units, the large ones last in the corpus", f"{tail['efficiency']:.1%} of their time"]


if __name__ == "__main__":
    main()
