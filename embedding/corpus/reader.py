"""Footers to layouts, units to rows: the only place that reads source files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import groupby

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from embedding.corpus.plan import SourceLayout, Unit, UnreadableSource
from embedding.corpus.requests import explained, is_of_store, with_retries
from embedding.corpus.sources import Source, open_source, require_unchanged
from embedding.corpus.storage import filesystem_of, is_local
from embedding.errors import CorpusError, SourceChangedError, SourceError

_FOOTER_THREADS = 32
_FOOTERS_AT_ONCE = 1024
_FOOTER_BYTES = 2**16
"""Most footers are smaller; the others cost more requests."""
_BATCH_ROWS = 16_384
_PREFETCH_BYTES = 256 * 2**20
"""Files up to this size have the wanted column chunks fetched whole and ahead; larger ones are streamed: bounded memory."""
_STREAM_BYTES = 8 * 2**20
_ROWS_PER_BYTE = 10_000
"""More no file holds in earnest; a footer that lies may ask for more units than the driver has memory for."""


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


def read_layouts(sources: Sequence[Source], columns: Columns, set_aside: list[UnreadableSource] | None = None) -> Iterator[SourceLayout]:
    """The layouts of the sources, in order; footers are small reads that wait on the store, so many are asked for at once.

    Files that are damaged or were replaced since they were listed go to `set_aside`, if it is given.

    Raises:
        CorpusError: a file lacks a column, its text column holds no text, or it is damaged and there is no `set_aside`.
    """
    pool = ThreadPoolExecutor(_FOOTER_THREADS, thread_name_prefix="footers")
    try:
        for start in range(0, len(sources), _FOOTERS_AT_ONCE):
            some = sources[start : start + _FOOTERS_AT_ONCE]
            for layout in pool.map(lambda source, end: _layout_or_reason(source, columns, end), some, _ends_of(some)):
                if isinstance(layout, SourceLayout):
                    yield layout
                elif set_aside is None:
                    raise CorpusError(layout.reason)
                else:
                    set_aside.append(layout)
    finally:
        pool.shutdown(cancel_futures=True)


def _ends_of(sources: Sequence[Source]) -> list[bytes | None]:
    """The last bytes of the files that lie on object stores, by one request each and without a thread; None where there was an error."""
    ends: dict[Source, bytes | None] = dict.fromkeys(sources)
    for fs, group in groupby(sources, key=lambda source: filesystem_of(source.uri)[0]):
        if not is_local(fs) and (files := [source for source in group if source.size]):
            starts = [max(0, source.size - _FOOTER_BYTES) for source in files]
            found = fs.cat_ranges([source.uri for source in files], starts, [source.size for source in files], on_error="return")
            ends |= {source: end if isinstance(end, bytes) else None for source, end in zip(files, found, strict=True)}
    return list(ends.values())


def _layout_or_reason(source: Source, columns: Columns, end: bytes | None) -> SourceLayout | UnreadableSource:
    try:
        return read_layout(source, columns, end)
    except SourceError as error:
        return UnreadableSource(source, str(error))


def read_layout(source: Source, columns: Columns, end: bytes | None = None) -> SourceLayout:
    """The row groups of a file whose schema has the columns; from its last bytes, where they are given and hold the whole footer.

    Raises:
        SourceError: the file is damaged, or was replaced or removed since it was listed.
        CorpusError: it lacks a column, or its text column holds no text.
    """
    found = _footer_in(end, source) if end else None
    schema, row_groups = found or with_retries(lambda: _read_footer(source))
    for column in columns.all:
        require_column(schema, column, source.uri)
    field = _field(schema, columns.text)
    if not _is_text(field.type):
        others = [path for path, kind in _paths(schema) if _is_text(kind)]
        remedy = f"string columns are {', '.join(others)}" if others else "the file has no string column"
        raise CorpusError(f"{source.uri}: column {columns.text!r} is {field.type}, not string; {remedy}")
    return SourceLayout(source, row_groups)


def _footer_in(end: bytes, source: Source) -> tuple[pa.Schema, tuple[int, ...]] | None:
    """None where the footer is longer, or anything is wrong: the file itself is read then, which tells what."""
    try:
        return _footer(pq.ParquetFile(pa.BufferReader(end)), source)
    except (pa.ArrowException, OSError, ValueError, TypeError, AttributeError):
        return None


def _read_footer(source: Source) -> tuple[pa.Schema, tuple[int, ...]]:
    with _parquet(source) as file:
        return _footer(file, source)


def _footer(file: pq.ParquetFile, source: Source) -> tuple[pa.Schema, tuple[int, ...]]:
    schema = file.schema_arrow
    _ = list(_paths(schema))  # names are decoded when they are asked for: here it is told if one is no UTF-8
    return schema, _row_groups(file.metadata, source.size)


def _row_groups(metadata: pq.FileMetaData, size: int) -> tuple[int, ...]:
    """Rows of each row group.

    Nothing is asked of single columns: where their part of the footer is damaged, pyarrow's answer ends the process.

    Raises:
        ValueError: the footer contradicts itself, or claims more rows than `size` bytes hold.
    """
    rows = tuple(metadata.row_group(index).num_rows for index in range(metadata.num_row_groups))
    if min(rows, default=0) < 0 or sum(rows) != metadata.num_rows:
        raise ValueError(f"its row groups have {sum(rows)} rows together, the file is said to have {metadata.num_rows}")
    if sum(rows) > _ROWS_PER_BYTE * size:
        raise ValueError(f"it is said to have {sum(rows)} rows in {size} bytes")
    return rows


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
    return with_retries(lambda: _read_unit(unit, columns))


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
            yield pq.ParquetFile(stream, pre_buffer=small, buffer_size=0 if small else _STREAM_BYTES, page_checksum_verification=True)
        except MemoryError as error:  # before the next clause: Arrow's own is an ArrowException too
            require_unchanged(source)
            needs = "needs more memory than there is; it is damaged, or its row groups are too large for this machine"
            raise SourceError(f"reading {source.uri} {needs}") from error
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
