"""Footers to layouts, units to rows: the only place that reads source files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from embedding.corpus.plan import SourceLayout, Unit
from embedding.corpus.sources import Source, open_source, require_unchanged
from embedding.corpus.storage import explained, is_of_store, with_retries
from embedding.errors import CorpusError, SourceChangedError, SourceError

_FOOTER_THREADS = 32
_BATCH_ROWS = 16_384
_READ_ATTEMPTS = 3
"""Tries of a whole read, where a fault outlasts the tries of its requests."""
_PREFETCH_BYTES = 256 * 2**20
"""Files up to this size have the wanted column chunks fetched whole and ahead; larger ones are streamed: bounded memory."""
_STREAM_BYTES = 8 * 2**20


@dataclass(frozen=True, slots=True)
class Columns:
    """Which columns of a source are read; dotted paths reach into structs."""

    text: str
    copied: tuple[str, ...] = ()
    """Columns that go into the shard unchanged: the id column first, then the kept ones."""

    @property
    def all(self) -> tuple[str, ...]:
        """Every path that is read, each once."""
        return tuple(dict.fromkeys((*self.copied, self.text)))


@dataclass(frozen=True, slots=True)
class UnitRows:
    """A unit's rows as read: the texts, and the columns that are copied."""

    text: pa.LargeStringArray
    copied: pa.Table


def read_layouts(sources: Sequence[Source], columns: Columns) -> Iterator[SourceLayout]:
    """The layouts of the sources, in order; footers are small reads that wait on the store, so many are read at once.

    Raises:
        CorpusError: a file is corrupt, lacks a column, or its text column holds no text.
    """
    pool = ThreadPoolExecutor(_FOOTER_THREADS, thread_name_prefix="footers")
    try:
        yield from pool.map(lambda source: read_layout(source, columns), sources)
    finally:
        pool.shutdown(cancel_futures=True)


def read_layout(source: Source, columns: Columns) -> SourceLayout:
    """The row groups of a file whose schema has the columns.

    Raises:
        CorpusError: the file is corrupt, lacks a column, or its text column holds no text.
    """
    try:
        schema, metadata = with_retries(lambda: _read_footer(source), attempts=_READ_ATTEMPTS)
    except SourceError as error:
        raise CorpusError(str(error)) from error
    for column in columns.all:
        require_column(schema, column, source.uri)
    field = _field(schema, columns.text)
    if not _is_text(field.type):
        others = [path for path, kind in _paths(schema) if _is_text(kind)]
        remedy = f"string columns are {', '.join(others)}" if others else "the file has no string column"
        raise CorpusError(f"{source.uri}: column {columns.text!r} is {field.type}, not string; {remedy}")
    return SourceLayout(source, tuple(metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)))


def _read_footer(source: Source) -> tuple[pa.Schema, pq.FileMetaData]:
    with _parquet(source) as file:
        return file.schema_arrow, file.metadata


def require_column(schema: pa.Schema, column: str, uri: str) -> None:
    """Check that the schema has the column.

    Raises:
        CorpusError: it has not, or twice; the sentence names what it has.
    """
    if any(schema.names.count(name) > 1 for name in (column, column.partition(".")[0])):
        raise CorpusError(f"{uri} has several columns {column!r}; rename one of them")
    try:
        _field(schema, column)
    except KeyError:
        paths = [path for path, _ in _paths(schema)]
        close = get_close_matches(column, paths, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise CorpusError(f"{uri} has no column {column!r}; {hint}columns are {', '.join(paths)}") from None


def read_unit(unit: Unit, columns: Columns) -> UnitRows:
    """The unit's rows, in order.

    Only the row groups that the unit overlaps are touched, and they are decoded as a stream, so that a unit in the middle of
    a huge row group costs memory for its own rows only.

    Raises:
        SourceChangedError: the file was replaced or removed since it was listed, even while it was read.
        SourceError: the file cannot be decoded.
        StorageError: the store does not answer.
    """
    return with_retries(lambda: _read_unit(unit, columns), attempts=_READ_ATTEMPTS)


def _read_unit(unit: Unit, columns: Columns) -> UnitRows:
    with _parquet(unit.source) as file:
        table = _read_rows(file, unit.first_row, unit.num_rows, columns.all)
        if table.num_rows != unit.num_rows:
            raise SourceError(f"{unit.source.uri}: rows {unit.first_row} to {unit.first_row + unit.num_rows} hold only {table.num_rows}")
        text = _select(table, columns.text)
        copied = pa.table({column: _select(table, column) for column in columns.copied})
        rows = UnitRows(_as_text(text), copied)
    require_unchanged(unit.source)
    return rows


def text_faults(text: pa.LargeStringArray) -> dict[int, str]:
    """Rows that hold no text that could be embedded, with the reason; an empty string is text."""
    faults = {int(row): "text is null" for row in pc.indices_nonzero(text.is_null()).to_numpy()}
    try:
        text.validate(full=True)
    except pa.ArrowInvalid:  # some row is no UTF-8: Parquet writers need not check
        binary = text.cast(pa.large_binary())
        faults |= {row: "text is not valid UTF-8" for row in range(len(binary)) if not _is_utf8(binary[row].as_py())}
    return faults


def _is_utf8(value: bytes | None) -> bool:
    try:
        (value or b"").decode()
    except UnicodeDecodeError:
        return False
    return True


@contextmanager
def _parquet(source: Source) -> Iterator[pq.ParquetFile]:
    """The file opened as Parquet; what goes wrong inside the block is told as one sentence that names the file.

    Raises:
        SourceChangedError: the file was replaced or removed since it was listed, however that showed.
        SourceError: it is not Parquet, or damaged.
        StorageError: the store does not answer.
    """
    small = source.size <= _PREFETCH_BYTES
    with open_source(source) as stream, explained(f"reading {source.uri}"):
        try:
            yield pq.ParquetFile(stream, pre_buffer=small, buffer_size=0 if small else _STREAM_BYTES)
        except (pa.ArrowException, OSError, ValueError, TypeError, AttributeError) as error:  # the last from Ray's Arrow types
            require_unchanged(source)
            if type(error).__name__ == "FileExpired":  # s3fs: a ranged read's If-Match failed, though the old bytes are back by now
                raise SourceChangedError(f"{source.uri} was replaced while it was read; run again to plan it anew") from error
            if is_of_store(error):
                raise
            raise SourceError(f"{source.uri} is no readable Parquet file: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _read_rows(file: pq.ParquetFile, first_row: int, num_rows: int, columns: Sequence[str]) -> pa.Table:
    starts = [0]
    for index in range(file.metadata.num_row_groups):
        starts.append(starts[-1] + file.metadata.row_group(index).num_rows)
    stop_row = first_row + num_rows
    groups = [index for index in range(len(starts) - 1) if starts[index] < stop_row and starts[index + 1] > first_row]
    position = starts[groups[0]] if groups else 0
    batches: list[pa.RecordBatch] = []
    batch_rows = min(_BATCH_ROWS, num_rows)  # rows can be long: a batch is never larger than the unit
    for batch in file.iter_batches(batch_size=batch_rows, row_groups=groups, columns=list(columns), use_threads=False):
        wanted = batch.slice(max(0, first_row - position), max(0, min(position + batch.num_rows, stop_row) - max(position, first_row)))
        if wanted.num_rows:
            batches.append(wanted)
        position += batch.num_rows
        if position >= stop_row:
            break
    return pa.Table.from_batches(batches, schema=batches[0].schema if batches else file.schema_arrow)


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind) or pa.types.is_null(kind))


def _as_text(column: pa.ChunkedArray) -> pa.LargeStringArray:
    return pa.chunked_array([chunk.cast(pa.large_string()) for chunk in column.chunks], pa.large_string()).combine_chunks()


def _field(schema: pa.Schema, column: str) -> pa.Field:
    """The field at a column name or dotted path; a column whose own name has dots comes first.

    Raises:
        KeyError: there is none.
    """
    if column in schema.names:
        return schema.field(column)
    head, *path = column.split(".")
    field = schema.field(head)
    for name in path:
        if not pa.types.is_struct(field.type) or field.type.get_field_index(name) < 0:
            raise KeyError(column)
        field = field.type.field(name)
    return field


def _paths(fields: Iterable[pa.Field], above: str = "") -> Iterator[tuple[str, pa.DataType]]:
    """Every column and field of a struct, by dotted path, with its type."""
    for field in fields:
        yield above + field.name, field.type
        if pa.types.is_struct(field.type):
            yield from _paths(field.type, f"{above}{field.name}.")


def _select(table: pa.Table, column: str) -> pa.ChunkedArray:
    if column in table.column_names:
        return table.column(column)
    head, *path = column.split(".")
    return pc.struct_field(table.column(head), path)
