"""A corpus of very many files and an output of very many shards, for a driver that plans: without torch."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from embedding.corpus.ledger import CommitRecord, Ledger
from embedding.corpus.output import Output
from embedding.corpus.plan import Unit, plan_units
from embedding.corpus.reader import Columns, read_layouts
from embedding.corpus.sources import list_sources
from embedding.corpus.storage import filesystem_of, is_local

COLUMNS = Columns("text", ("id",))
FINGERPRINT = "simulation"
GROUPS, ROWS = 10, 8
"""Row groups of a source file, and their rows; a row group is a unit."""
_PUTS_AT_ONCE = 2_000

Stock: TypeAlias = Callable[[str, Sequence[str]], None]
"""Puts one byte under each of the names below a URL."""


def write_corpus(url: str, files: Sequence[tuple[int, ...]], text_bytes: int = 30) -> None:
    """A Parquet file in one of 20 hive folders for each tuple, which gives the rows of its row groups."""
    content = {groups: _parquet(groups, text_bytes) for groups in set(files)}
    _put_all(url, ((f"part={number % 20:02d}/file-{number:07d}.parquet", content[groups]) for number, groups in enumerate(files)))


def _parquet(groups: tuple[int, ...], text_bytes: int) -> bytes:
    sink = io.BytesIO()
    schema = pa.schema([("id", pa.int64()), ("text", pa.string())])
    with pq.ParquetWriter(sink, schema) as writer:
        for rows in groups:
            writer.write_table(pa.table([range(rows), [f"row {row} ".ljust(text_bytes, "x") for row in range(rows)]], schema=schema))
    return sink.getvalue()


def write_shards(output: Output, units: Sequence[Unit], stock: Stock | None = None) -> None:
    """One byte under every unit's name, and the records of their commits."""
    if stock is None:
        _put_all(output.url, ((unit.shard, b"x") for unit in units))
    else:
        stock(output.url, [unit.shard for unit in units])
    ledger = Ledger(output.storage, "20260101T000000Z-000000")
    for unit in units:
        ledger.append(CommitRecord.of(unit, bytes=1, tokens=10 * unit.num_rows, worker="simulation:1"))
    ledger.flush()


def planned(url: str, rows: int) -> list[Unit]:
    """The units of a corpus, as the job plans them."""
    layouts = read_layouts(list_sources([url]), COLUMNS)
    return sorted(plan_units(layouts, unit_rows=rows, fingerprint=FINGERPRINT), key=lambda unit: unit.shard)


def _put_all(url: str, objects: Iterator[tuple[str, bytes]]) -> None:
    fs, root = filesystem_of(url)
    made: set[str] = set()
    while batch := {f"{root}/{name}": data for name, data in islice(objects, _PUTS_AT_ONCE)}:
        if is_local(fs):
            folders = {path.rpartition("/")[0] for path in batch} - made
            for folder in folders:
                Path(folder).mkdir(parents=True, exist_ok=True)
            made |= folders
        fs.pipe(batch)
