"""CSV and TSV, as RFC 4180 has them: a header, quotes round values that hold delimiters, quotes or line ends. Every value is a string:
what looks like a number may be a code whose zeros matter, and no later row can disagree with a type.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import BinaryIO

import pyarrow as pa
import pyarrow.csv

from embedding.corpus.columns import Columns
from embedding.corpus.formats.found import Found, Rows, joined
from embedding.corpus.formats.lines import Split, parse_but, read_head, rows_of, scan
from embedding.corpus.formats.names import Format
from embedding.corpus.plan import Unit
from embedding.corpus.sources import Source

_DELIMITERS = {Format.CSV: b",", Format.TSV: b"\t"}
_HEADER = -1
"""The header's number, so that the rows begin with 0."""
_MARKS = re.compile(rb'["\r\n]')


def find(stream: pa.NativeFile | BinaryIO, source: Source, columns: Columns) -> Found:
    """The names of the header, and the rows; an empty file has none of either, as what made it had nothing to write.

    Raises:
        ValueError: a quote is never closed.
    """
    delimiter = _DELIMITERS[columns.format]
    scanned = scan(stream, source, _splitter(delimiter), _HEADER)
    if not scanned.head:
        return Found(None, ())
    names = _names(scanned.head[0], delimiter)
    return Found(_strings(names), (scanned.rows,) if scanned.rows else (), scanned.marks)


def read(stream: pa.NativeFile | BinaryIO, unit: Unit, columns: Columns) -> Rows:
    """The unit's rows; an empty value without quotes is null.

    A row whose number of values differs from the header's has a fault and is null: it is unknown which value belongs to which column.
    """
    delimiter = _DELIMITERS[columns.format]
    split = _splitter(delimiter)
    names = _names(read_head(stream, unit.source, split, 1)[0], delimiter) if unit.near[0] != _HEADER else []
    parts = []
    for row, found in rows_of(stream, unit, split):
        if row == _HEADER:
            names = _names(found[0], delimiter)
        else:
            parts.append(_rows(found, names, columns.all, delimiter))
    return joined(parts, _strings(columns.all))


def _strings(names: Sequence[str]) -> pa.Schema:
    return pa.schema([(name, pa.string()) for name in names])


def _splitter(delimiter: bytes) -> Split:
    return partial(_split, delimiter=delimiter)


def _split(data: bytes, *, last: bool, delimiter: bytes) -> tuple[list[bytes], int]:
    """Line ends count where no quote is open; a quote opens where a value begins, and is a character of it elsewhere."""
    rows: list[bytes] = []
    start = position = 0
    while (mark := _MARKS.search(data, position)) is not None:
        position = mark.end()
        if mark[0] == b'"':
            if mark.start() == start or data[mark.start() - 1] in delimiter:
                position = _closed(data, position)
                if not position:
                    return rows, start
            continue
        if mark[0] == b"\r":
            if position == len(data) and not last:
                return rows, start  # a line feed may follow
            position += data[position : position + 1] == b"\n"
        if mark.start() > start:
            rows.append(data[start:position])
        start = position
    if last and start < len(data):
        rows.append(data[start:])
        start = len(data)
    return rows, start


def _closed(data: bytes, position: int) -> int:
    """Where what follows a quoted value begins, from a place inside of it; 0 where it does not end.

    A quote at the very end may be the first of two: its row is not complete then, and is looked at again with what follows.
    """
    while (quote := data.find(b'"', position)) >= 0:
        if data[quote + 1 : quote + 2] != b'"':
            return quote + 1
        position = quote + 2
    return 0


def _names(header: bytes, delimiter: bytes) -> list[str]:
    options = pyarrow.csv.ParseOptions(delimiter=delimiter.decode(), newlines_in_values=True)
    names = pyarrow.csv.read_csv(pa.BufferReader(header + b"\n"), pyarrow.csv.ReadOptions(use_threads=False), options).column_names
    return [str(name) for name in names]


def _rows(rows: Sequence[bytes], names: Sequence[str], wanted: Sequence[str], delimiter: bytes) -> Rows:
    parse = partial(_parsed, names=names, wanted=wanted, delimiter=delimiter)
    try:
        return Rows(parse(rows))
    except ValueError:
        widths = [_width(row, delimiter) for row in rows]
    faults = {row: _fault(width, len(names)) for row, width in enumerate(widths) if width != len(names)}
    return Rows(parse_but(rows, faults, parse, _strings(wanted)), faults)


def _fault(width: int, right: int) -> str:
    return f"the row has {width} value{'s' if width != 1 else ''}, but the header has {right}"


def _width(row: bytes, delimiter: bytes) -> int:
    """How many values a row has to the parser, as a test over many odd rows makes sure."""
    quoted = rb'(^|%b)"[^"]*(?:""[^"]*)*"' % delimiter
    return (re.sub(quoted, rb"\1", row) if b'"' in row else row).count(delimiter) + 1


def _parsed(rows: Sequence[bytes], names: Sequence[str], wanted: Sequence[str], delimiter: bytes) -> pa.Table:
    """The wanted values of the rows.

    Raises:
        ValueError: a row has not as many values as there are names.
    """
    data = b"".join(rows)
    table = pyarrow.csv.read_csv(
        pa.BufferReader(data),
        pyarrow.csv.ReadOptions(use_threads=False, block_size=len(data) + 1, column_names=names),
        pyarrow.csv.ParseOptions(delimiter=delimiter.decode(), newlines_in_values=True),
        pyarrow.csv.ConvertOptions(
            check_utf8=False,  # a text that is none is a rejected row, not a unit that fails
            column_types=dict.fromkeys(wanted, pa.string()),
            include_columns=wanted,
            null_values=[""],
            strings_can_be_null=True,
            quoted_strings_can_be_null=False,
        ),
    )
    if table.num_rows != len(rows):
        raise ValueError(f"the parser found {table.num_rows} rows instead of {len(rows)}")
    return table
