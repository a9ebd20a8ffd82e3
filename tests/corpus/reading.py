"""What the reader tests share: a corpus on a store, its units, and the rows read through them."""

from __future__ import annotations

import datetime
import io
from collections.abc import Iterator
from decimal import Decimal
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


def every_type() -> pa.Table:
    """Four rows of text, and of columns of every type that Parquet keeps."""
    moment = datetime.datetime(2025, 1, 2, 3, 4, 5, 678901, tzinfo=datetime.UTC)
    columns: dict[str, tuple[pa.DataType, list[Any]]] = {
        "text": (pa.string(), ["a", "b", "c", "d"]),
        "int8": (pa.int8(), [1, None, -128, 127]),
        "uint64": (pa.uint64(), [0, 1, None, 2**64 - 1]),
        "float16": (pa.float16(), [0.5, None, 1.0, 2.0]),
        "bool": (pa.bool_(), [True, False, None, True]),
        "date": (pa.date32(), [moment.date(), None, None, moment.date()]),
        "zoned": (pa.timestamp("us", "Europe/Berlin"), [moment, None, moment, moment]),
        "naive": (pa.timestamp("ms"), [datetime.datetime(2025, 1, 1), None, None, None]),
        "seconds": (pa.time64("us"), [datetime.time(1, 2, 3), None, None, None]),
        "decimal": (pa.decimal128(20, 3), [Decimal("1.234"), None, Decimal("-5.000"), Decimal("0.001")]),
        "dictionary": (pa.dictionary(pa.int8(), pa.string()), ["x", "y", None, "x"]),
        "large_string": (pa.large_string(), ["x", None, "", "y"]),
        "view": (pa.string_view(), ["x", None, "", "a long one that is not kept in line"]),
        "binary": (pa.binary(), [b"\xff", None, b"", b"x"]),
        "fixed": (pa.binary(2), [b"ab", None, b"cd", b"ef"]),
        "list": (pa.list_(pa.int32()), [[1], None, [], [2, None]]),
        "large_list": (pa.large_list(pa.string()), [["a"], None, [], ["b"]]),
        "vector": (pa.list_(pa.float32(), 2), [[1, 2], [3, 4], [5, 6], [7, 8]]),
        "struct": (
            pa.struct({"a": pa.int64(), "b": pa.list_(pa.string())}),
            [{"a": 1, "b": ["x"]}, None, {"a": None, "b": None}, {"a": 2, "b": []}],
        ),
        "map": (pa.map_(pa.string(), pa.int64()), [[("k", 1)], None, [], [("l", None)]]),
        "null": (pa.null(), [None] * 4),
        "a.dotted.name": (pa.int64(), [1, 2, 3, 4]),
        "naïve 名": (pa.int64(), [1, 2, 3, 4]),
    }
    return pa.table({name: pa.array(values, kind) for name, (kind, values) in columns.items()})
