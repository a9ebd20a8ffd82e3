"""What a driver does before and after the workers: planning a corpus, finding what is done, completing the output."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.simulation import COLUMNS, FINGERPRINT, GROUPS, ROWS, Stock, planned, write_corpus, write_shards
from embedding.corpus.output import Output
from embedding.corpus.plan import Unit, plan_units
from embedding.corpus.reader import read_layouts
from embedding.corpus.sources import list_sources

if TYPE_CHECKING:
    from benchmarks.setting import Result  # needs torch, of which the processes that are measured here know nothing


def plan_stage(root: str, files: int, stock: Stock | None = None) -> Result:
    """Seconds and memory of a driver that plans a new corpus, of one that finds everything done, and of completing it."""
    write_corpus(f"{root}/in", [(ROWS,) * GROUPS] * files)
    found: Result = {"files": files, "units": files * GROUPS, "plan": _apart(_plan, root)}
    write_shards(Output(f"{root}/out"), planned(f"{root}/in", ROWS), stock)
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
    before = _peak_megabytes()
    watch = _Stopwatch()
    measure(root, watch)
    return {
        "seconds": watch.seconds | {"all": sum(watch.seconds.values())},
        "megabytes": _peak_megabytes(),
        "megabytes_before": before,
    }


def _peak_megabytes() -> float:
    """Of this program: what getrusage says is at least that of the process which started it."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1e3


def _plan(root: str, watch: _Stopwatch) -> list[Unit]:
    sources = list_sources([f"{root}/in"])
    watch.lap("list sources")
    layouts = list(read_layouts(sources, COLUMNS))
    watch.lap("read footers")
    units = sorted(plan_units(layouts, unit_rows=ROWS, fingerprint=FINGERPRINT), key=lambda unit: unit.shard)
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
