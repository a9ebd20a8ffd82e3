"""What the reader tests share: a corpus on a store, its units, and the rows read through them."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from embedding.corpus.plan import Unit, make_unit, plan_units
from embedding.corpus.reader import Columns, UnitRows, read_layouts, read_unit
from embedding.corpus.sources import Source, list_sources
from embedding.corpus.storage import open_storage


def units_of(url: str, columns: Columns, unit_rows: int) -> list[Unit]:
    """The units of a corpus."""
    return list(plan_units(read_layouts(list_sources([url]), columns), unit_rows=unit_rows, fingerprint="f"))


def read_corpus(url: str, columns: Columns, unit_rows: int) -> Iterator[tuple[Unit, UnitRows]]:
    """Every unit and its rows, in order."""
    return ((unit, read_unit(unit, columns)) for unit in units_of(url, columns, unit_rows))


def put_source(folder: str, data: bytes, name: str = "a.parquet") -> Source:
    """Put one file and list it."""
    open_storage(folder).put(name, data)
    (source,) = list_sources([f"{folder}/{name}"])
    return source


def whole(source: Source, rows: int) -> Unit:
    """The file as one unit of as many rows."""
    return make_unit(source, 0, rows, "f")


def table_bytes(table: pa.Table, **options: Any) -> bytes:
    """The table as Parquet."""
    sink = io.BytesIO()
    pq.write_table(table, sink, **options)
    return sink.getvalue()
