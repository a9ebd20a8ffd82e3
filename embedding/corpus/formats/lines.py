"""What the text formats share: a file as rows of bytes, read in blocks from a byte on, decompressed where its name says so.

Such files say nothing about their rows, so a plan reads them through once, and notes where rows begin that lie some megabytes apart.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO, Protocol

import numpy as np
import pyarrow as pa

from embedding.corpus.formats.found import RowError
from embedding.corpus.formats.names import codec_by_name
from embedding.corpus.plan import Unit
from embedding.corpus.sources import Source

_BLOCK_BYTES = 4 * 2**20
_ROW_BYTES = 256 * 2**20
"""A longer row is a mistake: a document without line ends, or a quote that opens by accident."""
HEAD_BYTES = 2**20
_PARTS = 8
_BOM = b"\xef\xbb\xbf"
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")


class Split(Protocol):
    """Cuts bytes that begin with a row into rows."""

    def __call__(self, data: bytes, *, last: bool) -> tuple[list[bytes], int]:
        """The rows that are complete, without blank ones, and how many bytes they take; `last`: nothing follows the bytes."""


@dataclass(frozen=True, slots=True)
class Scan:
    """What reading a file through told."""

    head: list[bytes]
    """Its first rows, about a megabyte of them."""
    rows: int
    """Of the whole file, counted from the number of its first one."""
    marks: tuple[tuple[int, int], ...]
    """(row, byte); one only where the bytes are compressed."""


def scan(stream: pa.NativeFile | BinaryIO, source: Source, split: Split, first: int) -> Scan:
    """Read a file through; its first row gets the number `first`, which is -1 for a header.

    Raises:
        ValueError: a row is too long or does not end, or the file is no UTF-8 text.
    """
    head: list[bytes] = []
    size, rows, marks = 0, first, [(first, 0)]
    for row, place, found in _blocks(_decompressed(stream, source), (first, 0), split, _BLOCK_BYTES):
        if size < HEAD_BYTES:
            size += _fill(head, found, HEAD_BYTES - size)
        if found and place:
            marks.append((row, place))
        rows = row + len(found)
    return Scan(head, rows, tuple(marks[:1] if codec_by_name(source.uri) else marks))


def read_head(stream: pa.NativeFile | BinaryIO, source: Source, split: Split, size: int = HEAD_BYTES) -> list[bytes]:
    """The first rows of a file: at least one, where there is one, and about as many bytes."""
    head: list[bytes] = []
    for _, _, found in _blocks(_decompressed(stream, source), (0, 0), split, HEAD_BYTES):
        size -= _fill(head, found, size)
        if size <= 0:
            break
    return head


def _fill(head: list[bytes], rows: Iterable[bytes], wanted: int) -> int:
    """Take rows until they have the wanted bytes; how many they have."""
    size = 0
    for row in rows:
        if size >= wanted:
            break
        head.append(row)
        size += len(row)
    return size


def rows_of(stream: pa.NativeFile | BinaryIO, unit: Unit, split: Split) -> Iterator[tuple[int, list[bytes]]]:
    """The unit's rows in pieces, each with the number of its first row; before them the row -1, if the file has one where reading begins.

    Raises:
        ValueError: as for `scan`.
    """
    end = unit.first_row + unit.num_rows
    for row, _, found in _blocks(_decompressed(stream, unit.source), unit.near, split, _BLOCK_BYTES):
        if row < 0 and found:
            yield row, found[:1]
        start, stop = max(0, unit.first_row - row), min(len(found), end - row)
        if start < stop:
            yield row + start, found[start:stop]
        if row + len(found) >= end:
            return


def bad_rows(rows: Sequence[bytes], parse: Callable[[Sequence[bytes]], object]) -> list[int]:
    """The rows that `parse` raises ValueError about, ascending.

    What it takes as a whole is good; of the rest, smaller and smaller parts are tried. One bad row of a million costs 56 calls, and
    where each row is bad, there are little more calls than rows.
    """
    bad: list[int] = []
    parts = [(0, len(rows))] if rows else []
    while parts:
        start, stop = parts.pop()
        try:
            parse(rows[start:stop])
        except ValueError:
            if stop - start == 1:
                bad.append(start)
                continue
            step = -(-(stop - start) // _PARTS)
            parts += [(place, min(stop, place + step)) for place in range(start, stop, step)]
    return sorted(bad)


def parse_but(rows: Sequence[bytes], bad: Collection[int], parse: Callable[[Sequence[bytes]], pa.Table], schema: pa.Schema) -> pa.Table:
    """What `parse` makes of the rows, of columns as in the schema; the `bad` ones it is not shown, and they are null."""
    is_bad = np.zeros(len(rows), bool)
    is_bad[list(bad)] = True
    good = np.flatnonzero(~is_bad).tolist()
    table = parse([rows[row] for row in good]) if good else schema.empty_table()
    return table.take(pa.array(np.cumsum(~is_bad) - 1, mask=is_bad))  # a null place gives a null row


def _decompressed(stream: pa.NativeFile | BinaryIO, source: Source) -> pa.NativeFile | BinaryIO:
    codec = codec_by_name(source.uri)
    if codec is None:
        return stream
    if not source.size:
        raise ValueError(f"it is empty, but every {codec} file has at least a header")
    native = stream if isinstance(stream, pa.NativeFile) else pa.PythonFile(stream, mode="r")
    return pa.CompressedInputStream(pa.BufferedInputStream(native, _BLOCK_BYTES), codec)


def _blocks(
    stream: pa.NativeFile | BinaryIO, mark: tuple[int, int], split: Split, block_bytes: int
) -> Iterator[tuple[int, int, list[bytes]]]:
    """(number of the first row, its byte, rows) from the mark on."""
    row, place = mark
    if place:
        stream.seek(place)
    rest, last = b"", False
    while not last:
        data = bytes(stream.read(block_bytes))
        last = not data
        data = rest + data
        if not place and data.startswith(_UTF_16):
            raise ValueError("it is UTF-16; convert it to UTF-8")
        skipped = len(_BOM) if not place and data.startswith(_BOM) else 0
        rows, used = split(data[skipped:] if skipped else data, last=last)
        used += skipped
        yield row, place, rows
        row, place, rest = row + len(rows), place + used, data[used:]
        if len(rest) > _ROW_BYTES:
            raise RowError(f"row {row} is longer than {_ROW_BYTES // 2**20} MiB; check for a missing line end or an unclosed quote")
    if rest:
        raise RowError(f"row {row} opens a quote that is never closed")
