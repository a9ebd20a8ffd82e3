"""Small corpora of every kind that Parquet allows, written by the libraries that people write Parquet with."""

from __future__ import annotations

import io
import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import duckdb
import fsspec
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

Row: TypeAlias = dict[str, Any]

WORDS = "river stone window quiet market signal copper garden letter morning engine harbour velvet thunder basket candle".split(" ")
CODECS = ("none", "zstd", "snappy", "gzip", "lz4", "brotli")
STRING_TYPES: dict[str, pa.DataType] = {
    "string": pa.string(),
    "large_string": pa.large_string(),
    "string_view": pa.string_view(),
    "dictionary": pa.dictionary(pa.int32(), pa.string()),
    "dictionary_of_large": pa.dictionary(pa.int16(), pa.large_string()),
}


@dataclass(frozen=True)
class Corpus:
    """Files by relative path, and the rows that a reader finds in them, files in the order of their paths.

    Each row has `id` and `text` (None: null), whatever the file calls them.
    """

    files: dict[str, bytes]
    rows: list[Row]
    text_column: str = "text"

    def write(self, root: str | Path) -> str:
        """Put the files under `root`, a folder or an fsspec URL, and answer with it."""
        place = str(root)
        options = {"use_listings_cache": False} if place.startswith("s3://") else {"auto_mkdir": True}
        filesystem, base = fsspec.url_to_fs(place, **options)
        for path, data in self.files.items():
            filesystem.pipe_file(f"{base}/{path}", data)
        return place


def sentences(count: int, seed: int = 0, longest: int = 40) -> list[str]:
    """Texts of 1 to `longest` words, many short and few long, the same for the same seed."""
    choose = random.Random(seed)
    return [" ".join(choose.choices(WORDS, k=1 + int((longest - 1) * choose.random() ** 3))) for _ in range(count)]


def numbered(texts: Sequence[str | None], first: int = 0) -> list[Row]:
    """Rows with the ids first, first + 1, ..."""
    return [{"id": first + number, "text": text} for number, text in enumerate(texts)]


def parquet(table: pa.Table, *, row_group_rows: int | None = None, codec: str = "zstd") -> bytes:
    """The bytes of a Parquet file of the table, as pyarrow writes it."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=row_group_rows, compression=codec)
    return buffer.getvalue()


def plain(rows: int = 60, files: int = 3, row_group_rows: int = 8, seed: int = 0) -> Corpus:
    """The ordinary case: equal files of a few row groups."""
    return _in_files({f"part-{number}.parquet": rows // files for number in range(files)}, row_group_rows, seed)


def string_kinds() -> Corpus:
    """One file for each Arrow type that holds text."""
    rows = numbered(sentences(6 * len(STRING_TYPES), seed=1))
    files = {}
    for number, kind in enumerate(sorted(STRING_TYPES)):
        part = pa.Table.from_pylist(rows[6 * number : 6 * number + 6])
        files[f"{kind}.parquet"] = parquet(part.set_column(1, "text", part["text"].cast(STRING_TYPES[kind])))
    return Corpus(files, rows)


def libraries() -> Corpus:
    """One file by each of duckdb, pandas, polars and pyarrow, with its own defaults."""
    writers: dict[str, Callable[[pa.Table], bytes]] = {"duckdb": _by_duckdb, "pandas": _by_pandas, "polars": _by_polars, "pyarrow": parquet}
    rows = numbered(sentences(8 * len(writers), seed=2))
    tables = (pa.Table.from_pylist(rows[start : start + 8]) for start in range(0, len(rows), 8))
    return Corpus({f"{name}.parquet": write(table) for (name, write), table in zip(writers.items(), tables, strict=True)}, rows)


def nested() -> Corpus:
    """The text is a field of a struct in a struct; some of the structs are null, and so is the text then."""
    texts: list[str | None] = [None, *sentences(10, seed=3), None]
    documents: list[Row | None] = [{"title": f"no {number}", "body": {"text": text}} for number, text in enumerate(texts)]
    documents[0], documents[-1] = {"title": "no body", "body": None}, None
    table = pa.table({"id": range(len(texts)), "doc": documents})
    return Corpus({"nested.parquet": parquet(table, row_group_rows=5)}, numbered(texts), text_column="doc.body.text")


def hive() -> Corpus:
    """Folders named by two keys; the files in them have the same name."""
    places = [f"date=2025-01-0{day}/lang={language}/part-0.parquet" for day in (1, 2, 3) for language in ("de", "en")]
    return _in_files(dict.fromkeys(places, 5), 3, seed=4)


def zero_rows() -> Corpus:
    """Files without a row, with and without a row group, before, between and after others."""
    corpus = _in_files({"b.parquet": 5, "d.parquet": 4}, 3, seed=5)
    empty = pa.Table.from_pylist([], pa.schema({"id": pa.int64(), "text": pa.string()}))
    no_group = io.BytesIO()
    pq.ParquetWriter(no_group, empty.schema).close()
    return Corpus({"a.parquet": parquet(empty), **corpus.files, "c.parquet": no_group.getvalue(), "e.parquet": parquet(empty)}, corpus.rows)


def huge_row_group(rows: int = 3000) -> Corpus:
    """One row group, larger than any work unit of a test."""
    return _in_files({"huge.parquet": rows}, rows, seed=6, longest=6)


def tiny_row_groups(rows: int = 3000) -> Corpus:
    """As many row groups as rows."""
    return _in_files({"tiny.parquet": rows}, 1, seed=7, longest=6)


def mixed_schemas() -> Corpus:
    """Files that agree on id and text only, and there neither in place nor in width of type."""
    rows = numbered(sentences(12, seed=8))
    first, second, third = (pa.Table.from_pylist(rows[start : start + 4]) for start in (0, 4, 8))
    wide = second.set_column(1, "text", second["text"].cast(pa.large_string())).append_column("score", pa.array([0.5, 1.0, None, 2.0]))
    turned = third.select(["text", "id"]).append_column("score", pa.array([["a"], [], None, ["b", "c"]]))
    return Corpus({"a.parquet": parquet(first), "b.parquet": parquet(wide), "c.parquet": parquet(turned)}, rows)


def codecs() -> Corpus:
    """One file for each compression."""
    rows = numbered(sentences(4 * len(CODECS), seed=9))
    parts = (pa.Table.from_pylist(rows[start : start + 4]) for start in range(0, len(rows), 4))
    return Corpus({f"{codec}.parquet": parquet(part, codec=codec) for codec, part in zip(sorted(CODECS), parts, strict=True)}, rows)


def odd_texts() -> Corpus:
    """Null, empty, blank, very long, and characters of many scripts."""
    texts = [
        *("plain", None, "", " \t\n ", "word " * 3000, "x" * 5000, "naïve café", "日本語のテキスト", "Ελληνικά", "עברית", "👩‍👩‍👧‍👦 🏳️‍🌈"),
        *("e\u0301 combining", "zero\u200bwidth", "nul\x00inside", "[CLS] [SEP] [MASK]", "line\r\nbreaks", "\ufeffbom", "end", None),
    ]
    return Corpus({"odd.parquet": parquet(pa.Table.from_pylist(numbered(texts)), row_group_rows=7)}, numbered(texts))


KINDS: dict[str, Callable[[], Corpus]] = {
    maker.__name__: maker
    for maker in (
        plain,
        string_kinds,
        libraries,
        nested,
        hive,
        zero_rows,
        huge_row_group,
        tiny_row_groups,
        mixed_schemas,
        codecs,
        odd_texts,
    )
}
"""Every kind by name, for a test that takes them all: `@pytest.mark.parametrize("kind", KINDS)`."""


def _in_files(sizes: dict[str, int], row_group_rows: int, seed: int, longest: int = 40) -> Corpus:
    rows = numbered(sentences(sum(sizes.values()), seed, longest))
    files: dict[str, bytes] = {}
    first = 0
    for path, size in sizes.items():
        files[path] = parquet(pa.Table.from_pylist(rows[first : first + size]), row_group_rows=row_group_rows)
        first += size
    return Corpus(files, rows)


def _by_polars(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pl.DataFrame(table.to_pylist()).write_parquet(buffer)
    return buffer.getvalue()


def _by_pandas(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pd.DataFrame(table.to_pylist()).to_parquet(buffer)
    return buffer.getvalue()


def _by_duckdb(table: pa.Table) -> bytes:
    with tempfile.TemporaryDirectory() as folder, duckdb.connect() as connection:
        path = Path(folder) / "duckdb.parquet"
        connection.register("rows", table)
        connection.execute(f"COPY rows TO '{path}' (FORMAT parquet)")
        return path.read_bytes()
