"""Reads mutants as the job would, in a process of its own that says what it is at and how each ended.

    python -m tests.fuzz.reader FOLDER FIRST STOP STEP

writes a JSON line before a mutant is read and another, with its outcome, after it, so that the parent knows which one it
was where this process dies or hangs.
"""

from __future__ import annotations

import faulthandler
import io
import json
import resource
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from embedding.corpus.plan import plan_units
from embedding.corpus.reader import Columns, read_layout, read_unit, text_faults
from embedding.corpus.sources import list_sources
from embedding.errors import CorpusError, SourceError
from tests.fuzz.mutants import Mutant, mutant, originals

HANG_SECONDS = 60
MEMORY_BYTES = 4 * 2**30
"""Address space, what the libraries take at the start included."""
UNIT_ROWS = 25
READ_ERRORS = (pa.ArrowException, OSError, ValueError, TypeError, MemoryError)
"""What pyarrow raises on a file that it cannot read."""

Rows: TypeAlias = dict[int, tuple[Any, bytes | None] | None]
"""(id, text as bytes) by row number; None for a line that is no row."""


class MisreadError(Exception):
    """A mutant was read otherwise than it may be."""


def judge(damaged: Mutant, folder: Path, sound: Rows) -> dict[str, str]:
    """What became of a mutant: all its `rows`, `some` of its units, or it was `refused`.

    Raises:
        MisreadError: a row that plain pyarrow does not find there, or that cannot be in the file as it was written.
    """
    path = folder / "mutant.parquet"
    path.write_bytes(damaged.data)
    found, refusals = read_file(path, Columns(damaged.original.text_column, ("id",)), UNIT_ROWS)
    if found is None:
        return {"outcome": "refused", "why": refusals[0]}
    expected, whole = _reference(damaged)
    if found.items() - expected.items():
        number = min(row for row in found if expected.get(row) != found[row])
        raise MisreadError(f"row {number} is {found[number]!r}, plain pyarrow finds {expected.get(number)!r}")
    if not whole and not refusals:
        raise MisreadError("all units are read, though pyarrow cannot read every row group")
    if not refusals and len(found) != len(expected):
        raise MisreadError(f"{len(found)} rows, plain pyarrow finds {len(expected)}")
    if damaged.only_checked_bytes and found.items() - sound.items():
        raise MisreadError("a damaged page with a checksum gives other rows")
    if not refusals:
        return {"outcome": "rows", "why": "as written" if found == sound else "others"}
    return {"outcome": "some" if found else "refused", "why": refusals[0]}


def read_file(path: Path, columns: Columns, unit_rows: int) -> tuple[Rows | None, list[str]]:
    """What the job reads of a file, None where it refuses it as a whole; and its reasons for what it does not read.

    Raises:
        MisreadError: a reason or a fault is not as it must be.
    """
    [source] = list_sources([str(path)])
    try:
        units = list(plan_units([read_layout(source, columns)], unit_rows=unit_rows, fingerprint="f"))
    except (SourceError, CorpusError) as error:
        return None, [one_sentence(error, source.uri)]
    found: Rows = {}
    refusals = []
    for unit in units:
        try:
            read = read_unit(unit, columns)
        except SourceError as error:
            refusals.append(one_sentence(error, source.uri))
            continue
        found |= dict(enumerate(pairs(read.copied["id"], read.text), unit.first_row))
        found |= dict.fromkeys([unit.first_row + row for row in read.faults])
        check_faults(read.text)
    return found, refusals


def one_sentence(error: Exception, uri: str) -> str:
    sentence = str(error)
    if "\n" in sentence or uri not in sentence:
        raise MisreadError(f"no sentence that names the file: {sentence!r}")
    return sentence.replace(uri, "FILE")


def pairs(ids: pa.ChunkedArray, text: pa.Array | pa.ChunkedArray) -> Iterator[tuple[Any, bytes | None]]:
    return zip(ids.to_pylist(), text.cast(pa.large_binary()).to_pylist(), strict=True)


def check_faults(text: pa.LargeStringArray) -> None:
    """Every row is a text that Python can hold, or has a fault."""
    faults = text_faults(text)
    for row, value in enumerate(text.cast(pa.large_binary()).to_pylist()):
        try:
            is_text = value is not None and bool(value.decode() or True)
        except UnicodeDecodeError:
            is_text = False
        if is_text == (row in faults):
            raise MisreadError(f"row {row} of {value!r}: {faults.get(row)}")


def _reference(damaged: Mutant) -> tuple[Rows, bool]:
    """What plain pyarrow finds, and whether that is the whole file; of a damaged row group, the rows before its first damage."""
    path = damaged.original.text_column.split(".")
    rows: Rows = {}
    first, whole = 0, True
    try:
        file = pq.ParquetFile(io.BytesIO(damaged.data), page_checksum_verification=True)
        for group in range(file.metadata.num_row_groups):
            read = list(_by_group(file, group, path)) or list(_by_row(file, group, path))
            rows |= dict(enumerate(read, first))
            whole = whole and len(read) == file.metadata.row_group(group).num_rows
            first += file.metadata.row_group(group).num_rows
    except READ_ERRORS:
        whole = False
    return rows, whole


def _by_group(file: pq.ParquetFile, group: int, path: list[str]) -> Iterator[tuple[Any, bytes | None]]:
    with suppress(*READ_ERRORS):
        table = file.read_row_group(group, columns=["id", ".".join(path)], use_threads=False)
        yield from pairs(table["id"], _field(table[path[0]], path[1:]))


def _by_row(file: pq.ParquetFile, group: int, path: list[str]) -> Iterator[tuple[Any, bytes | None]]:
    with suppress(*READ_ERRORS):
        for batch in file.iter_batches(1, row_groups=[group], columns=["id", ".".join(path)], use_threads=False):
            table = pa.table(batch)
            yield from pairs(table["id"], _field(table[path[0]], path[1:]))


def _field(column: pa.ChunkedArray, path: Sequence[str]) -> pa.ChunkedArray:
    return pc.struct_field(column, list(path)) if path else column


def limit_memory() -> None:
    """MEMORY_BYTES for each mutant: Arrow's own allocator keeps the gigabytes that one asked for, and the next would find them gone."""
    pa.set_memory_pool(pa.system_memory_pool())
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))


def main(folder: Path, first: int, stop: int, step: int) -> None:
    limit_memory()
    made_from = originals()
    sound = {original.name: _reference(Mutant(original, "none", original.data))[0] for original in made_from}
    for number in range(first, stop, step):
        damaged = mutant(number, made_from)
        facts = {"number": number, "original": damaged.original.name, "damage": damaged.damage}
        say(**facts)
        faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
        try:
            say(**facts, **judge(damaged, folder, sound[damaged.original.name]), peak_bytes=peak_bytes())
        except Exception as error:  # noqa: BLE001  (whatever it is, the parent shall hear of it)
            say(**facts, outcome="wrong", why=f"{type(error).__name__}: {error}")
        faulthandler.cancel_dump_traceback_later()


def peak_bytes() -> int:
    """The most memory that this process held so far; getrusage would count what its parent held when it was forked."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024


def say(**facts: object) -> None:
    print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
