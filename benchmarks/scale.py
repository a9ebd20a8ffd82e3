"""How far one driver reaches: planning, resuming and completing a million units, units per second, and how evenly workers share them.

`python -m benchmarks.scale --help`. Prints a Markdown table and writes all raw figures as JSON; docs/scale.md reads them.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks.bench import circumstances, save
from benchmarks.feeding import begin_stage, efficiency_stage, memory_stage, rate_stage, small_stage, tail_stage
from benchmarks.planning import plan_stage
from benchmarks.setting import Result
from benchmarks.simulation import GROUPS, Stock

STAGES = ("plan", "begin", "rate", "small", "efficiency", "tail", "memory")


def main(words: Sequence[str] | None = None) -> Result:
    """Run what the command line asks for."""
    options = _options(words)
    logging.getLogger("ray").setLevel(logging.CRITICAL)
    begun = circumstances(words, options)
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch, _store(scratch, options.s3) as (root, stock):
        stages: dict[str, Callable[[], Result]] = {
            "plan": lambda: plan_stage(root, options.files, stock),
            "begin": lambda: begin_stage(scratch, options.begin_units),
            "rate": lambda: rate_stage(scratch, options.units, min(4, options.workers[-1])),
            "small": lambda: small_stage(scratch, options.units, min(4, options.workers[-1])),
            "efficiency": lambda: {str(workers): efficiency_stage(scratch, workers, options.rounds) for workers in options.workers},
            "tail": lambda: tail_stage(scratch, options.workers[-1], options.rounds),
            "memory": lambda: memory_stage(scratch, min(4, options.workers[-1]), options.rounds),
        }
        found: Result = {
            **begun,
            "store": "S3" if options.s3 else "disk",
            "stages": {name: stages[name]() for name in options.stages},
        }
    sys.stdout.write(table(found) + "\n")
    save(found, options.out)
    return found


def _options(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    parser.add_argument("--s3", action="store_true", help="corpus and output of the plan stage on an S3 server of this machine")
    parser.add_argument("--scratch", help="where temporary folders are made")
    parser.add_argument("--files", type=int, default=100_000, help=f"source files of {GROUPS} units each in the plan stage")
    parser.add_argument("--begin-units", type=int, default=1_000_000, help="units that Ray is given in the begin stage")
    parser.add_argument("--units", type=int, default=3_000, help="units of the rate stage")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--rounds", type=int, default=40, help="units a worker in the stages efficiency, tail and memory")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--note", default="", help="kept in the result, such as what else ran on the machine")
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    parser.set_defaults(device="cpu", threads=1)
    return parser.parse_args(words)


@contextmanager
def _store(scratch: str, on_s3: bool) -> Iterator[tuple[str, Stock | None]]:
    """Where the plan stage works, and how it gets its shards there."""
    if not on_s3:
        yield scratch, None
        return
    from tests.support.s3_server import s3_server  # a development dependency, that nobody else here needs

    with s3_server() as server:
        os.environ |= server.environment()
        yield server.bucket(), server.stock


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
    if begin := stages.get("begin"):
        found = f"first done after {begin['first']:.0f} s, {begin['megabytes']:,.0f} MB more"
        yield [f"begin: {begin['units']:,} units given to Ray", found]
    for name, what in (("rate", "units"), ("small", "small files")):
        if rate := stages.get(name):
            ceiling = f"{rate['driver_ms_per_unit']:.1f} ms of the driver's CPU each"
            yield [f"{rate['units']:,} {what} without work", f"{rate['units_per_second']:.0f} units/s, {ceiling}"]
    for workers, each in stages.get("efficiency", {}).items():
        yield [f"units of one second, {workers} workers", f"{each['efficiency']:.1%} of their time"]
    if tail := stages.get("tail"):
        yield [f"uneven units, the large ones last in the corpus, {tail['workers']} workers", f"{tail['efficiency']:.1%} of their time"]
    if memory := stages.get("memory"):
        store = memory["object_store"]
        held = f"at most {store['peak_megabytes']:,.0f} of {store['megabytes']:,.0f} MB in Ray's object store"
        spilled = f"{store['spilled_megabytes']:.0f} MB spilled"
        units = f"units of {memory['unit_megabytes']:.0f} MB and half a second, {memory['workers']} workers"
        yield [units, f"{memory['efficiency']:.1%} of their time; {held}, {spilled}"]


if __name__ == "__main__":
    main()
