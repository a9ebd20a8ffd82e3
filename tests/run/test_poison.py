"""Units that end their process, or raise, or need more memory than there is: the rest of the corpus is embedded all the same."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pytest

from embedding.run import parcels
from tests.model import poison
from tests.run.conftest import Embed
from tests.support import corpora, outputs
from tests.support.ray_cluster import RayCluster

ATTEMPTS = 2
SPELLED = {
    "b-kill": poison.KILL,
    "d-raise": poison.RAISE,
    "e-nan": poison.NAN,
    "f-memory-error": poison.MEMORY_ERROR,
    "g-not-enough": poison.NOT_ENOUGH,
}
GOOD = ("a-good", "c-good", "h-good")
LONG_READ = "i-long-read"
"""Two texts of 50 MB that take most of a second to decompress: long enough to be caught reading."""


def write_corpus(folder: Path) -> str:
    """A file, and so a unit, of five rows for each poison, good ones between them."""
    files = {}
    for number, name in enumerate(sorted({*SPELLED, *GOOD})):
        texts = [*corpora.sentences(4, seed=number), f"river {SPELLED.get(name, 'stone')} window"]
        files[f"{name}.parquet"] = corpora.parquet(pa.table({"id": [f"{name} {row}" for row in range(5)], "text": texts}))
    long = pa.table({"id": [f"{LONG_READ} {row}" for row in range(2)], "text": ["word " * 10_000_000] * 2})
    files[f"{LONG_READ}.parquet"] = corpora.parquet(long, codec="gzip")
    return corpora.Corpus(files, []).write(folder)


@contextmanager
def killed_readers(cluster: RayCluster, file: Path) -> Iterator[set[int]]:
    """As long as the block runs, every process of the cluster that has the file open is killed; their ids."""
    ended, killed = threading.Event(), set[int]()

    def kill() -> None:
        while not ended.wait(0.01):
            for process in cluster.processes("read_stage"):
                with suppress(psutil.Error):
                    if str(file) in {opened.path for opened in process.open_files()}:
                        process.kill()
                        killed.add(process.pid)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield killed
    finally:
        ended.set()
        thread.join()


@pytest.mark.timeout(900)  # four processes die and are started again
@pytest.mark.parametrize("together", [False, True])
def test_poison_is_set_aside_and_everything_else_is_embedded(
    embed: Embed, ray_cluster: RayCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, together: bool
) -> None:
    """`together`: all units in one or two parcels, so that each dies with good ones before and behind it."""
    if together:
        monkeypatch.setattr(parcels, "_PARCELS_PER_WORKER", 1)
    source, output = write_corpus(tmp_path / "in"), str(tmp_path / "out")
    options: dict[str, Any] = {
        "model": str(poison.save_poisoned_model(tmp_path / "model")),
        "trust_remote_code": True,
        "max_unit_attempts": ATTEMPTS,
        "unit_rows": 100,
        "input": source,
        "output": output,
    }
    with killed_readers(ray_cluster, tmp_path / "in" / f"{LONG_READ}.parquet") as killed:
        summary = embed(**options)

    assert len(killed) == ATTEMPTS
    assert (summary.status, summary.exit_code) == ("failed units", 3)
    failures = {str(failure["source"]).rpartition("/")[2]: failure for failure in summary.failures}
    long_read = f"{tmp_path.as_uri()}/in/{LONG_READ}.parquet"
    expected = {
        "b-kill.parquet": (5, f"its worker process died each time (set aside after {ATTEMPTS} attempts)"),
        "d-raise.parquet": (5, f"RuntimeError: the encoder broke in two lines (set aside after {ATTEMPTS} attempts)"),
        f"{LONG_READ}.parquet": (2, f"its reader died {ATTEMPTS} times; {long_read} may be damaged or too large"),
    }
    assert {name: (failure["rows"], failure["reason"]) for name, failure in failures.items()} == expected
    assert all(failure["unit"] and failure["first_row"] == 0 for failure in summary.failures)

    done = [*GOOD, "e-nan", "f-memory-error", "g-not-enough"]
    assert (summary.rows_in, summary.rows_out, summary.rows_rejected, summary.rows_failed) == (30, 29, 1, 12)
    rows = {f"{name} {row}" for name in done for row in range(5)} - {"e-nan 4"}
    assert set(outputs.table(output)["id"].to_pylist()) == rows
    assert outputs.control(output, "rejected")["id"].to_pylist() == ["e-nan 4"]
    assert "_SUCCESS" not in outputs.files(output)

    again = embed(**options, dry_run=True)
    assert (again.units_skipped, again.units_pending, again.rows_pending) == (6, 3, 12)
