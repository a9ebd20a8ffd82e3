"""Where the numbers of a Parquet footer or page header stand, so that a test can make them lie.

Parquet writes both in Thrift's compact protocol:
https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(1, 13)


@dataclass(frozen=True)
class Number:
    """One number: an integer field, or the length of a string or list."""

    path: tuple[int, ...]
    """Field numbers from the outermost struct inwards; items of a list have the list's."""
    start: int
    stop: int
    raw: int
    """As written; integers are zigzag-encoded, lengths are not."""
    kind: str
    """`int`, `string` or `list`."""

    @property
    def value(self) -> int:
        """The number that is meant."""
        return (self.raw >> 1) ^ -(self.raw & 1) if self.kind == "int" else self.raw


def varint(value: int, width: int = 0) -> bytes:
    """The unsigned number in as many bytes as it needs, or in `width` bytes if it fits them."""
    out = bytearray()
    while value > 0x7F or len(out) + 1 < width:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def zigzag(value: int) -> int:
    """A signed 64-bit number as the compact protocol writes it."""
    return ((value << 1) ^ (value >> 63)) & 0xFFFF_FFFF_FFFF_FFFF


class Numbers:
    """The numbers of the struct that begins at `start`; `stop` is where it ends."""

    def __init__(self, data: bytes, start: int = 0) -> None:
        self._data = data
        self._at = start
        self.found = list(self._struct(()))
        self.stop = self._at

    def _varint(self) -> tuple[int, int, int]:
        start, value, shift = self._at, 0, 0
        while True:
            byte = self._data[self._at]
            self._at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value, start, self._at

    def _struct(self, above: tuple[int, ...]) -> Iterator[Number]:
        field = 0
        while head := self._data[self._at]:
            self._at += 1
            kind = head & 0x0F
            if head >> 4:
                field += head >> 4
            else:
                field = Number((), *self._varint_span(), "int").value
            if kind not in (_TRUE, _FALSE):
                yield from self._value(kind, (*above, field))
        self._at += 1

    def _varint_span(self) -> tuple[int, int, int]:
        value, start, stop = self._varint()
        return start, stop, value

    def _value(self, kind: int, path: tuple[int, ...]) -> Iterator[Number]:
        if kind in (_I16, _I32, _I64):
            yield Number(path, *self._varint_span(), "int")
        elif kind == _BINARY:
            length = Number(path, *self._varint_span(), "string")
            self._at += length.raw
            yield length
        elif kind in (_LIST, _SET):
            yield from self._list(path)
        elif kind == _STRUCT:
            yield from self._struct(path)
        else:  # bool in a list, byte, double; Parquet has no map
            self._at += 8 if kind == _DOUBLE else 1

    def _list(self, path: tuple[int, ...]) -> Iterator[Number]:
        head = self._data[self._at]
        self._at += 1
        size = head >> 4
        if size == 15:
            length = Number(path, *self._varint_span(), "list")
            yield length
            size = length.raw
        for _ in range(size):
            yield from self._value(head & 0x0F, path)
