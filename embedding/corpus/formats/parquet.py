"""Parquet: footers and row groups."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from embedding.corpus.columns import Columns, paths_of
from embedding.corpus.formats.found import Found, Rows, require_possible
from embedding.corpus.plan import Unit
from embedding.corpus.sources import Source

_BATCH_ROWS = 16_384
_PREFETCH_BYTES = 256 * 2**20
"""Files up to this size have the wanted column chunks fetched whole and ahead; larger ones are streamed: bounded memory."""
_STREAM_BYTES = 8 * 2**20


def find(stream: pa.NativeFile | BinaryIO, source: Source, _columns: Columns) -> Found:
    """What the footer says."""
    return _footer(_open(stream, source), source)


def find_in(end: bytes, source: Source) -> Found | None:
    """The same from the file's last bytes; None where the footer is longer, or anything is wrong: the file itself is read then, which
    tells what.
    """
    try:
        return _footer(pq.ParquetFile(pa.BufferReader(end)), source)
    except (pa.ArrowException, OSError, ValueError, TypeError, AttributeError):
        return None


def read(stream: pa.NativeFile | BinaryIO, unit: Unit, columns: Columns) -> Rows:
    """The unit's rows.

    Only the row groups that the unit overlaps are touched, and they are decoded as a stream, so that a unit in the middle of
    a huge row group costs memory for its own rows only.
    """
    return Rows(_read_rows(_open(stream, unit.source), unit.first_row, unit.num_rows, columns.all))


def _open(stream: pa.NativeFile | BinaryIO, source: Source) -> pq.ParquetFile:
    small = source.size <= _PREFETCH_BYTES
    return pq.ParquetFile(stream, pre_buffer=small, buffer_size=0 if small else _STREAM_BYTES, page_checksum_verification=True)


def _footer(file: pq.ParquetFile, source: Source) -> Found:
    schema = file.schema_arrow
    _ = list(paths_of(schema))  # names are decoded when they are asked for: here it is told if one is no UTF-8
    return Found(schema, _row_groups(file.metadata, source.size))


def _row_groups(metadata: pq.FileMetaData, size: int) -> tuple[int, ...]:
    """Rows of each row group.

    Nothing is asked of single columns: where their part of the footer is damaged, pyarrow's answer ends the process.

    Raises:
        ValueError: the footer contradicts itself, or claims more rows than `size` bytes hold.
    """
    rows = tuple(metadata.row_group(index).num_rows for index in range(metadata.num_row_groups))
    if min(rows, default=0) < 0 or sum(rows) != metadata.num_rows:
        raise ValueError(f"its row groups have {sum(rows)} rows in total, but its footer says {metadata.num_rows}")
    require_possible(rows, size)
    return rows


def _read_rows(file: pq.ParquetFile, first_row: int, num_rows: int, columns: Sequence[str]) -> pa.Table:
    """The rows of a range, each row group read on its own: in one sweep over several, a column that a damaged page made longer
    or shorter would shift the rows of all groups after it.
    """
    batches: list[pa.RecordBatch] = []
    position, stop_row = 0, first_row + num_rows
    for index in range(file.metadata.num_row_groups):
        rows = file.metadata.row_group(index).num_rows
        if rows and position < stop_row and position + rows > first_row:
            batches += _read_group(file, index, slice(max(0, first_row - position), min(rows, stop_row - position)), columns)
        position += rows
    return pa.Table.from_batches(batches, schema=batches[0].schema if batches else file.schema_arrow)


def _read_group(file: pq.ParquetFile, index: int, wanted: slice, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    position = 0
    batch_rows = min(_BATCH_ROWS, wanted.stop - wanted.start)  # rows can be long: a batch is never larger than what is wanted
    for batch in file.iter_batches(batch_size=batch_rows, row_groups=[index], columns=list(columns), use_threads=False):
        start, stop = max(0, wanted.start - position), min(batch.num_rows, wanted.stop - position)
        if start < stop:
            yield batch.slice(start, stop - start)
        position += batch.num_rows
        if position >= wanted.stop:
            return
