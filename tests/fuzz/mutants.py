"""Small real Parquet files, and thousands of ways to damage them: the same mutant for the same number."""

from __future__ import annotations

import io
import random
import struct
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import duckdb
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from tests.fuzz.thrift import Number, Numbers, varint, zigzag
from tests.support.corpora import sentences

ROWS = 60
_HOSTILE = (0, 1, 2, 7, 100, 1000, 2**15, 2**16, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, -1, -2, -(2**31), -(2**63))
_MAGIC = 4
_TAIL = 8
"""The footer's length and the magic number."""


@dataclass(frozen=True)
class Original:
    """A sound file."""

    name: str
    data: bytes
    text_column: str
    checked: bool
    """Its pages carry checksums."""

    @property
    def footer_start(self) -> int:
        """Where the footer begins."""
        return len(self.data) - _TAIL - int(struct.unpack("<I", self.data[-_TAIL:-_MAGIC])[0])

    @cached_property
    def checked_bytes(self) -> set[int]:
        """Places in the file that a page's checksum covers: pages without their headers."""
        return {place for page in self.page_headers for place in range(page.stop, page.stop + _page_bytes(page))}

    @cached_property
    def page_headers(self) -> list[Numbers]:
        """The numbers in the header of every page, in no order."""
        footer = pq.read_metadata(io.BytesIO(self.data))
        found = []
        for group in range(footer.num_row_groups):
            for number in range(footer.num_columns):
                chunk = footer.row_group(group).column(number)
                at = chunk.dictionary_page_offset or chunk.data_page_offset
                stop = at + chunk.total_compressed_size
                while at < stop:
                    header = Numbers(self.data, at)
                    found.append(header)
                    at = header.stop + _page_bytes(header)
        return found


def _page_bytes(header: Numbers) -> int:
    """Bytes of the page that follows the header: field 3, compressed_page_size."""
    return next(number.value for number in header.found if number.path == (3,))


def originals() -> list[Original]:
    """Files by three libraries, of every codec, page version, encoding and string type that corpora have."""
    texts: list[str | None] = [*sentences(ROWS - 6, seed=11, longest=8), None, "", "ünï cödé", "日本語 のテキスト", "nul\0inside", None]
    random.Random(5).shuffle(texts)
    plain = pa.table({"id": range(ROWS), "text": texts})
    large = plain.set_column(1, "text", plain["text"].cast(pa.large_string()))
    view = plain.set_column(1, "text", plain["text"].cast(pa.string_view()))
    repeated = pa.table({"id": range(ROWS), "text": [f"value {number % 5}" for number in range(ROWS)]})
    documents = [None if text is None else {"tags": ["a", text], "body": {"text": text}} for text in texts]
    nested = pa.table({"id": range(ROWS), "doc": documents})
    small: dict[str, Any] = {"write_statistics": False, "store_schema": True}
    return [
        _arrow("v1-snappy-dictionary", repeated, compression="snappy", row_group_size=25),
        _arrow("v1-plain-none", plain, compression="none", use_dictionary=False, row_group_size=20, **small),
        _arrow("v1-none-checked", plain, compression="none", use_dictionary=False, write_page_checksum=True, row_group_size=30),
        _arrow("v2-zstd", plain, compression="zstd", data_page_version="2.0", row_group_size=60, data_page_size=200),
        _arrow("v2-zstd-checked", plain, compression="zstd", data_page_version="2.0", write_page_checksum=True, row_group_size=17),
        _arrow("v2-dictionary-checked", repeated, compression="none", data_page_version="2.0", write_page_checksum=True),
        _arrow("v1-gzip-large", large, compression="gzip", row_group_size=60, **small),
        _arrow("v1-brotli-delta", plain, compression="brotli", use_dictionary=False, column_encoding={"text": "DELTA_BYTE_ARRAY"}),
        _arrow("v2-lz4-delta-length", plain, compression="lz4", use_dictionary=False, column_encoding={"text": "DELTA_LENGTH_BYTE_ARRAY"}),
        _arrow("view-no-arrow-schema", view, compression="snappy", row_group_size=31),
        _arrow("nested", nested, "doc.body.text", compression="snappy", row_group_size=40),
        Original("polars", _by_polars(plain), "text", checked=False),
        Original("duckdb", _by_duckdb(plain), "text", checked=False),
    ]


def _arrow(name: str, table: pa.Table, text_column: str = "text", **options: Any) -> Original:
    sink = io.BytesIO()
    pq.write_table(table, sink, **options)
    return Original(name, sink.getvalue(), text_column, checked=bool(options.get("write_page_checksum")))


def _by_polars(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pl.from_arrow(table).write_parquet(sink, row_group_size=30, compression="zstd")  # type: ignore[union-attr]
    return sink.getvalue()


def _by_duckdb(table: pa.Table) -> bytes:
    with tempfile.TemporaryDirectory() as folder, duckdb.connect() as connection:
        path = Path(folder) / "a.parquet"
        connection.register("rows", table)
        connection.execute(f"COPY rows TO '{path}' (FORMAT parquet, COMPRESSION snappy)")
        return path.read_bytes()


@dataclass(frozen=True)
class Mutant:
    """A damaged file."""

    original: Original
    damage: str
    data: bytes

    @property
    def only_checked_bytes(self) -> bool:
        """Whether nothing but what page checksums cover differs from the sound file."""
        sound = self.original
        if not sound.checked or len(self.data) != len(sound.data):
            return False
        changed = {place for place, (old, new) in enumerate(zip(sound.data, self.data, strict=True)) if old != new}
        return changed <= sound.checked_bytes


def mutant(number: int, made_from: list[Original]) -> Mutant:
    """The mutant of that number."""
    choose = random.Random(number)
    original = made_from[number % len(made_from)]
    damage = list(_DAMAGES)[number // len(made_from) % len(_DAMAGES)]
    data = bytearray(original.data)
    return Mutant(original, damage, bytes(_DAMAGES[damage](data, original, choose)))


def _flip(data: bytearray, choose: random.Random, start: int, stop: int) -> bytearray:
    for _ in range(choose.choice((1, 1, 1, 2, 4, 16))):
        data[choose.randrange(start, stop)] ^= 1 << choose.randrange(8)
    return data


def _flip_anywhere(data: bytearray, _original: Original, choose: random.Random) -> bytearray:
    return _flip(data, choose, 0, len(data))


def _flip_pages(data: bytearray, original: Original, choose: random.Random) -> bytearray:
    return _flip(data, choose, _MAGIC, original.footer_start)


def _flip_footer(data: bytearray, original: Original, choose: random.Random) -> bytearray:
    return _flip(data, choose, original.footer_start, len(data))


def _flip_page_header(data: bytearray, original: Original, choose: random.Random) -> bytearray:
    header = choose.choice(original.page_headers).found
    return _flip(data, choose, header[0].start - 1, header[-1].stop)


def _truncate(data: bytearray, _original: Original, choose: random.Random) -> bytearray:
    return data[: choose.randrange(len(data))]


def _cut_out(data: bytearray, _original: Original, choose: random.Random) -> bytearray:
    """The beginning and the end are there, bytes between them are gone, as after a lost part of an upload."""
    start, stop = _span(data, choose)
    del data[start:stop]
    return data


def _zero(data: bytearray, _original: Original, choose: random.Random) -> bytearray:
    start, stop = _span(data, choose)
    data[start:stop] = bytes(stop - start)
    return data


def _duplicate(data: bytearray, _original: Original, choose: random.Random) -> bytearray:
    start, stop = _span(data, choose)
    data[stop:stop] = data[start:stop]
    return data


def _swap(data: bytearray, _original: Original, choose: random.Random) -> bytearray:
    start, stop = _span(data, choose)
    other = choose.randrange(len(data) - (stop - start) + 1)
    data[start:stop], data[other : other + stop - start] = data[other : other + stop - start], data[start:stop]
    return data


def _noise(data: bytearray, _original: Original, choose: random.Random) -> bytearray:
    start, stop = _span(data, choose)
    data[start:stop] = choose.randbytes(stop - start)
    return data


def _span(data: bytearray, choose: random.Random) -> tuple[int, int]:
    length = choose.choice((1, 4, 16, 64, 256))
    start = choose.randrange(max(1, len(data) - length))
    return start, min(len(data), start + length)


def _lie_in_footer(data: bytearray, original: Original, choose: random.Random) -> bytearray:
    """One to three numbers of the footer are others; what follows moves, and the footer's length is right."""
    footer = data[original.footer_start : -_TAIL]
    chosen = choose.sample(Numbers(bytes(footer)).found, choose.choice((1, 1, 2, 3)))
    for number in sorted(chosen, key=lambda each: -each.start):
        footer[number.start : number.stop] = varint(_lie(number, choose))
    return data[: original.footer_start] + footer + struct.pack("<I", len(footer)) + b"PAR1"


def _lie_in_page_header(data: bytearray, original: Original, choose: random.Random) -> bytearray:
    """A number of a page's header is another one of as many bytes, so that the page stays where it was."""
    number = choose.choice(choose.choice(original.page_headers).found)
    width = number.stop - number.start
    data[number.start : number.stop] = varint(_lie(number, choose) & ((1 << 7 * width) - 1), width)
    return data


def _lie(number: Number, choose: random.Random) -> int:
    value = choose.choice(
        (
            choose.choice(_HOSTILE),
            number.value + choose.choice((-1, 1, 7, -7)),
            number.value * choose.choice((-1, 2, 3)),
            choose.randrange(2**31),
            choose.getrandbits(64) - 2**63,
        )
    )
    return zigzag(max(-(2**63), min(2**63 - 1, value))) if number.kind == "int" else abs(value)


def _magic(data: bytearray, _original: Original, choose: random.Random) -> bytearray:
    wrong = choose.choice((b"PARE", b"PAR2", b"\0\0\0\0", b"ARRO", b"\x1f\x8b\x08\0"))
    data[choose.choice((slice(0, 4), slice(-4, None)))] = wrong
    return data


def _footer_length(data: bytearray, original: Original, choose: random.Random) -> bytearray:
    length = len(data) - _TAIL - original.footer_start
    lie = choose.choice((0, 1, length - 1, length + 1, length // 2, len(data), 2**31 - 1, 2**31, 2**32 - 1, choose.getrandbits(32)))
    data[-_TAIL:-_MAGIC] = struct.pack("<I", lie)
    return data


def _craft(_data: bytearray, _original: Original, choose: random.Random) -> bytearray:
    """A footer that nobody writes by accident: structures inside each other without end, or more of them than there are."""
    binary, group = b"\x15" + varint(zigzag(6)) + b"\x25\x02\x18", b"\x35\x02\x18"
    text, nested = binary + b"\x04text\0", group + b"\x01a\x15\x02\0"
    depth = choose.choice((101, 5_000, 50_000))
    schemas = {
        "deep": [group + b"\x01s\x15\x02\0", *[nested] * depth, text],
        "short": [group + b"\x01s\x15" + varint(zigzag(choose.choice((2, 2**31 - 1)))) + b"\0", text],
        "no text": [group + b"\x01s\x15\x02\0", binary + b"\x03t\xff\xfe\0"],
    }
    schema = schemas[choose.choice(list(schemas))]
    footer = b"\x15\x04\x19\xfc" + varint(len(schema)) + b"".join(schema) + b"\x16\0\x19\x0c"
    endless = choose.choice((b"", b"\x0c\xc6\x01" + b"\x1c" * depth, b"\x09\xc6\x01" + b"\x19" * depth))
    footer += endless or b"\0"
    return bytearray(b"PAR1" + footer + struct.pack("<I", len(footer)) + b"PAR1")


Damage = Callable[[bytearray, Original, random.Random], bytearray]
_DAMAGES: dict[str, Damage] = {
    damage.__name__.lstrip("_"): damage
    for damage in (
        _flip_anywhere,
        _flip_pages,
        _flip_footer,
        _flip_page_header,
        _truncate,
        _cut_out,
        _zero,
        _duplicate,
        _swap,
        _noise,
        _lie_in_footer,
        _lie_in_page_header,
        _magic,
        _footer_length,
        _craft,
    )
}
"""Each takes a copy of the sound bytes."""


def damages() -> list[str]:
    """The names of the ways to damage a file."""
    return list(_DAMAGES)
