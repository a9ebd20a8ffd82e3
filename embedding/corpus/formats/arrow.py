"""Arrow IPC: the file format (Feather is one), whose record batches are found at once, and the stream format, which is read through."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import BinaryIO

import pyarrow as pa

from embedding.corpus.columns import Columns, require_storable
from embedding.corpus.formats.found import START, Found, Rows, require_possible
from embedding.corpus.plan import Unit
from embedding.corpus.sources import Source

_MAGIC = b"ARROW1"
_BINARY = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary(), pa.string_view(): pa.binary_view()}


def find(stream: pa.NativeFile | BinaryIO, source: Source, columns: Columns) -> Found:
    """The schema and the rows of each record batch; of a file, one narrow column is read for them, of a stream all of it.

    Raises:
        ValueError: it claims more rows than its bytes hold.
        CorpusError: a copied column has a type that a shard cannot hold.
    """
    if not _is_file(stream):
        reader = pa.ipc.open_stream(stream)
        schema, rows = reader.schema, tuple(batch.num_rows for batch in reader)
    else:
        schema = pa.ipc.open_file(stream).schema
        narrow = next((index for index, field in enumerate(schema) if pa.types.is_primitive(field.type)), 0)
        rows = tuple(batch.num_rows for batch in _batches(stream, [narrow] if schema.names else [], START[1]))
    require_possible(rows, source.size)
    require_storable(schema, columns, source.uri)
    if not _is_file(stream) or not rows:
        return Found(schema, rows)
    return Found(schema, rows, tuple((first, index) for index, first in enumerate(accumulate(rows[:-1], initial=0))))


def read(stream: pa.NativeFile | BinaryIO, unit: Unit, columns: Columns) -> Rows:
    """The unit's rows; every value is checked, since Arrow itself takes what such a file says for granted."""
    if _is_file(stream):
        wanted = _wanted(pa.ipc.open_file(stream).schema, columns)
        position, batches = unit.near[0], _batches(stream, wanted, unit.near[1])
    else:
        reader = pa.ipc.open_stream(stream)
        wanted = _wanted(reader.schema, columns)
        position, batches = 0, (batch.select(wanted) for batch in reader)
    found: list[pa.RecordBatch] = []
    for batch in batches:
        start, stop = max(0, unit.first_row - position), min(batch.num_rows, unit.first_row + unit.num_rows - position)
        if start < stop:
            _require_valid(batch)
            found.append(batch.slice(start, stop - start))
        position += batch.num_rows
        if position >= unit.first_row + unit.num_rows:
            break
    return Rows(pa.Table.from_batches(found))


def _wanted(schema: pa.Schema, columns: Columns) -> list[int]:
    """Places of the columns that are read, or that their paths begin with."""
    names = {column if column in schema.names else column.partition(".")[0] for column in columns.all}
    return [index for index, name in enumerate(schema.names) if name in names]


def _is_file(stream: pa.NativeFile | BinaryIO) -> bool:
    stream.seek(0)
    magic = bytes(stream.read(len(_MAGIC)))
    stream.seek(0)
    return magic == _MAGIC


def _batches(stream: pa.NativeFile | BinaryIO, columns: list[int], first: int) -> Iterator[pa.RecordBatch]:
    reader = pa.ipc.open_file(stream, options=pa.ipc.IpcReadOptions(included_fields=columns, use_threads=False))
    return (reader.get_batch(index) for index in range(first, reader.num_record_batches))


def _require_valid(batch: pa.RecordBatch) -> None:
    """Raises ArrowInvalid: offsets or lengths lead out of the buffers. Text that is no UTF-8 is found row by row, later."""
    for column in batch.columns:
        column.view(_BINARY.get(column.type, column.type)).validate(full=True)
