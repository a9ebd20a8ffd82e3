"""Footers to layouts, units to rows: the only place that reads source files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any, BinaryIO, Protocol, TypeAlias

import pyarrow as pa
import pyarrow.compute as pc

from embedding.corpus.columns import Columns, has_column, require_columns, select, text_of
from embedding.corpus.formats import arrow, delimited, jsonl, parquet
from embedding.corpus.formats.found import Found, RowError, Rows
from embedding.corpus.formats.names import Format
from embedding.corpus.plan import SourceLayout, Unit, UnreadableSource
from embedding.corpus.requests import explained, is_of_store, with_retries
from embedding.corpus.sources import Source, open_source, require_unchanged
from embedding.corpus.storage import filesystem_of
from embedding.errors import CorpusError, SourceChangedError, SourceError, first_line

__all__ = ["Columns", "UnitRows", "read_layout", "read_layouts", "read_unit", "settle_columns", "text_faults"]

_FOOTER_THREADS = 32
_FOOTERS_AT_ONCE = 1024
_FILES_OF_TYPES = 8
"""The types of JSON Lines columns are taken from so many files with rows: what the first one leaves open, another may show."""
_FOOTER_BYTES = 2**16
"""Most footers are smaller; the others cost more requests."""


Fits: TypeAlias = Callable[[pa.Schema, str], None]
"""Checks the schema of a source file, which the second argument names; raises a CorpusError where shards cannot hold its columns."""


class _FormatModule(Protocol):
    """What each format's module offers; both raise what pyarrow raises, or ValueError with a sentence that follows the file's name."""

    def find(self, stream: pa.NativeFile | BinaryIO, source: Source, columns: Columns) -> Found:
        """What the file holds."""

    def read(self, stream: pa.NativeFile | BinaryIO, unit: Unit, columns: Columns) -> Rows:
        """The unit's rows, in order."""


_MODULES: dict[Format, _FormatModule] = {
    Format.PARQUET: parquet,
    Format.ARROW: arrow,
    Format.JSONL: jsonl,
    Format.CSV: delimited,
    Format.TSV: delimited,
}


@dataclass(frozen=True, slots=True)
class UnitRows:
    """A unit's rows as read: the texts, and the columns that are copied."""

    text: pa.LargeStringArray
    copied: pa.Table
    faults: Mapping[int, str] = field(default_factory=dict)
    """Rows that the format could not read, counted from the unit's first, with the reason: their text, and what else it may be, is null."""


def read_layouts(
    sources: Sequence[Source], columns: Columns, set_aside: list[UnreadableSource] | None = None, fits: Fits | None = None
) -> Iterator[SourceLayout]:
    """The layouts of the sources, in order; footers are small reads that wait on the store, so many are asked for at once.

    Files that are damaged or were replaced since they were listed go to `set_aside`, if it is given. `fits` is asked of each schema.

    Raises:
        CorpusError: a file lacks a column or has one that does not fit, its text column holds no text, or it is damaged and there is no
            `set_aside`.
    """
    pool = ThreadPoolExecutor(_FOOTER_THREADS, thread_name_prefix="footers")
    try:
        for start in range(0, len(sources), _FOOTERS_AT_ONCE):
            some = sources[start : start + _FOOTERS_AT_ONCE]
            for layout in pool.map(lambda source, end: _layout_or_reason(source, columns, end, fits), some, _ends_of(some, columns)):
                if isinstance(layout, SourceLayout):
                    yield layout
                elif set_aside is None:
                    raise CorpusError(layout.reason)
                else:
                    set_aside.append(layout)
    finally:
        pool.shutdown(cancel_futures=True)


def _ends_of(sources: Sequence[Source], columns: Columns) -> list[bytes | None]:
    """The last bytes of the Parquet files that lie on stores that are asked for many at once, by one request each and without a
    thread; None elsewhere, and where there was an error.
    """
    ends: dict[Source, bytes | None] = dict.fromkeys(sources)
    if columns.format is not Format.PARQUET:
        return list(ends.values())
    for fs, group in groupby(sources, key=lambda source: filesystem_of(source.uri)[0]):
        if fs.async_impl and (files := [source for source in group if source.size]):
            starts = [max(0, source.size - _FOOTER_BYTES) for source in files]
            found = fs.cat_ranges([source.uri for source in files], starts, [source.size for source in files], on_error="return")
            ends |= {source: end if isinstance(end, bytes) else None for source, end in zip(files, found, strict=True)}
    return list(ends.values())


def settle_columns(sources: Sequence[Source], columns: Columns, earlier: pa.Schema | None) -> Columns:
    """The columns of JSON Lines with the types that the output was begun with, else with those that the first rows show.

    Raises:
        CorpusError: the first rows lack a column, or do not agree on its type.
    """
    if earlier is not None and all(has_column(earlier, column) for column in columns.all):
        return replace(columns, schema=earlier)
    rows: list[dict[str, Any]] = []
    asked = 0
    for source in sources:
        with suppress(SourceError), _opened(source, columns.format) as stream:  # which its layout tells
            found = jsonl.first_objects(stream, source)
            rows += found
            asked += bool(found)
        if asked == _FILES_OF_TYPES:
            break
    return jsonl.with_types(columns, rows, sources[0].uri) if rows else columns


def _layout_or_reason(source: Source, columns: Columns, end: bytes | None, fits: Fits | None) -> SourceLayout | UnreadableSource:
    try:
        return read_layout(source, columns, end, fits)
    except SourceError as error:
        return UnreadableSource(source, str(error))


def read_layout(source: Source, columns: Columns, end: bytes | None = None, fits: Fits | None = None) -> SourceLayout:
    """The row groups of a file whose schema has the columns; from its last bytes, where they are given and hold the whole footer.

    Raises:
        SourceError: the file is damaged, or was replaced or removed since it was listed.
        CorpusError: it lacks a column, its text column holds no text, or a column does not fit.
    """
    found = (parquet.find_in(end, source) if end else None) or with_retries(lambda: _find(source, columns))
    if found.schema is not None:
        require_columns(found.schema, columns, source.uri)
        if fits is not None:
            fits(columns.schema or found.schema, source.uri)
    return SourceLayout(source, found.row_groups, found.marks)


def _find(source: Source, columns: Columns) -> Found:
    with _opened(source, columns.format) as stream:
        return _MODULES[columns.format].find(stream, source, columns)


def read_unit(unit: Unit, columns: Columns) -> UnitRows:
    """The unit's rows, in order.

    Raises:
        SourceChangedError: the file was replaced or removed since it was listed, even while it was read.
        SourceError: the file cannot be decoded.
        StorageError: the store does not answer.
    """
    return with_retries(lambda: _read_unit(unit, columns))


def _read_unit(unit: Unit, columns: Columns) -> UnitRows:
    with _opened(unit.source, columns.format) as stream:
        read = _MODULES[columns.format].read(stream, unit, columns)
        table = read.table
        if table.num_rows != unit.num_rows:
            raise SourceError(f"{unit.source.uri}: only {table.num_rows} of the {unit.num_rows} rows from row {unit.first_row} on exist")
        copied = pa.table({column: select(table, column) for column in columns.copied})
        rows = UnitRows(text_of(table, columns), copied, read.faults)
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
def _opened(source: Source, kind: Format) -> Iterator[pa.NativeFile | BinaryIO]:
    """The file; what goes wrong inside the block is told as one sentence that names the file.

    Raises:
        SourceChangedError: the file was replaced or removed since it was listed, however that showed.
        SourceError: it is not of that format, or damaged.
        StorageError: the store does not answer.
    """
    with open_source(source) as stream, explained(f"reading {source.uri}"):
        try:
            yield stream
        except MemoryError as error:  # before the next clause: Arrow's own is an ArrowException too
            require_unchanged(source)
            parts = {Format.PARQUET: "row groups", Format.ARROW: "record batches"}.get(kind, "rows")
            needs = f"needs more memory than this machine has; the file is damaged, or its {parts} are too large"
            raise SourceError(f"reading {source.uri} {needs}") from error
        except (pa.ArrowException, OSError, ValueError, TypeError, AttributeError) as error:  # the last from Ray's Arrow types
            require_unchanged(source)
            if type(error).__name__ == "FileExpired":  # s3fs: a ranged read's If-Match failed, though the old bytes are back by now
                raise SourceChangedError(f"{source.uri} was replaced while it was being read; run again to read the new version") from error
            if is_of_store(error):
                raise
            if isinstance(error, RowError):
                raise SourceError(f"{source.uri}: {error}") from error
            raise SourceError(f"{source.uri} is not a readable {kind.label} file: {first_line(error)}") from error
