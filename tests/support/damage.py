"""Every way in which an output can be bad, done to it on purpose."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from embedding.corpus.shard import shard_table
from embedding.corpus.shards.form import ShardForm
from embedding.corpus.shards.parquet import PARQUET
from tests.support import outputs

Change: TypeAlias = Callable[[pa.Table, dict[str, Any]], tuple[pa.Table, dict[str, Any]]]


def rebuilt(data: bytes, change: Change, form: ShardForm = PARQUET) -> bytes:
    """The shard with other rows or another footer, whole in itself: every checksum is right."""
    read = form.read(data)
    return form.encode(*change(read.table.replace_schema_metadata(None), read.facts))


def flipped(data: bytes, place: int, bit: int = 4) -> bytes:
    return data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :]


def _in_a_page_of_vectors(data: bytes) -> int:
    group = pq.read_metadata(io.BytesIO(data)).row_group(0)
    (chunk,) = [chunk for chunk in map(group.column, range(group.num_columns)) if chunk.path_in_schema.startswith("embedding")]
    return int(chunk.data_page_offset + chunk.total_compressed_size - 8)


def _taken(*order: int) -> Change:
    """The shard's first rows in another order or number, the others behind."""
    return lambda table, footer: (table.take([*order, *range(max(order) + 1, table.num_rows)]), footer)


def of_vectors(change: Callable[[npt.NDArray[np.float32]], object]) -> Change:
    def apply(table: pa.Table, footer: dict[str, Any]) -> tuple[pa.Table, dict[str, Any]]:
        vectors = np.array(table["embedding"].to_pylist(), np.float32)
        change(vectors)
        more = {name: table[name].combine_chunks() for name in ("num_tokens", "truncated") if name in table.column_names}
        return shard_table(table.drop_columns(["embedding", *more]), vectors, more), footer

    return apply


def _nan(vectors: npt.NDArray[np.float32]) -> None:
    vectors[2, 3] = np.nan


def _longer(vectors: npt.NDArray[np.float32]) -> None:
    vectors[1] *= 1.01


def _another_direction(vectors: npt.NDArray[np.float32]) -> None:
    vectors[4] = np.roll(vectors[4], 1)


def _another_text(table: pa.Table, footer: dict[str, Any]) -> tuple[pa.Table, dict[str, Any]]:
    texts = ["other", *table["text"].to_pylist()[1:]]
    return table.set_column(table.column_names.index("text"), "text", pa.array(texts, table["text"].type)), footer


def _another_name(table: pa.Table, footer: dict[str, Any]) -> tuple[pa.Table, dict[str, Any]]:
    return table.rename_columns({"text": "body"}), footer


def _other_settings(table: pa.Table, footer: dict[str, Any]) -> tuple[pa.Table, dict[str, Any]]:
    settings = footer["provenance"]["settings"] | {"prompt": "query: "}
    return table, footer | {"provenance": footer["provenance"] | {"settings": settings}}


def _another_count(table: pa.Table, footer: dict[str, Any]) -> tuple[pa.Table, dict[str, Any]]:
    return table, footer | {"record": footer["record"] | {"tokens": footer["record"]["tokens"] + 1}}


def _statistics(data: bytes) -> bytes:
    """The greatest id that the footer promises is one less than the greatest there is: a query would skip the row."""
    metadata = pq.read_metadata(io.BytesIO(data))
    greatest = metadata.row_group(0).column(0).statistics.max
    start = len(data) - 8 - metadata.serialized_size
    place = data.index(int(greatest).to_bytes(8, "little"), start)
    return data[:place] + int(greatest - 1).to_bytes(8, "little") + data[place + 8 :]


CHANGES: dict[str, tuple[str, Change]] = {
    "settings": ("wrong provenance", _other_settings),
    "column renamed": ("wrong columns", _another_name),
    "rows swapped": ("wrong ids", _taken(1, 0)),
    "row doubled": ("wrong row count", _taken(0, 0, 1)),
    "row left out": ("wrong row count", _taken(1)),
    "kept column": ("wrong kept column", _another_text),
    "NaN": ("not finite", of_vectors(_nan)),
    "length": ("wrong norm", of_vectors(_longer)),
    "counts": ("wrong record", _another_count),
    "vector of one row": ("wrong vector", of_vectors(_another_direction)),
}
"""Name -> the kind of finding, and what it does to rows and footer, whatever the form of the shards."""
OF_A_SHARD: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "bit flipped in a page": ("unreadable shard", lambda data: flipped(data, _in_a_page_of_vectors(data))),
    "truncated": ("unreadable shard", lambda data: data[: len(data) // 2]),
    "empty": ("unreadable shard", lambda _: b""),
    "statistics": ("wrong bytes", _statistics),
    **{name: (kind, partial(rebuilt, change=change)) for name, (kind, change) in CHANGES.items()},
}
"""Name -> the kind of finding, and what it does to the bytes; needs columns id, text, num_tokens and truncated, and unit lengths."""


def damage(url: str, names: list[str]) -> set[tuple[str, str]]:
    """Spoil `names`, one shard for each way and two more, and everything under _control; the findings that must come of it."""
    fs, path = outputs.filesystem(url)
    spare = iter(names)
    expected = set()
    for kind, spoil in OF_A_SHARD.values():
        name = next(spare)
        fs.pipe_file(f"{path}/{name}", spoil(fs.cat_file(f"{path}/{name}")))
        expected.add((kind, name))
    swapped, removed, healthy = next(spare), next(spare), next(spare)
    fs.pipe_file(f"{path}/{swapped}", fs.cat_file(f"{path}/{healthy}"))
    fs.rm_file(f"{path}/{removed}")
    extra = "data/part-9-0000000000-0123456789abcdef.parquet"
    fs.pipe_file(f"{path}/{extra}", fs.cat_file(f"{path}/{healthy}"))
    expected |= {("wrong unit", swapped), ("missing shard", removed), ("unclaimed shard", extra)}
    _spoil_table(url, "_control/manifest.parquet", "rows", healthy)
    for segment in outputs.files(url, "_control/records"):
        _spoil_table(url, segment, "tokens", healthy)
    fs.makedirs(f"{path}/_control/rejected", exist_ok=True)
    fs.pipe_file(f"{path}/_control/rejected/0123456789abcdef.parquet", b"nobody's")
    expected |= {("wrong manifest", "_control/manifest.parquet"), ("wrong ledger", "_control/records")}
    return expected | {("unclaimed rejected rows", "_control/rejected/0123456789abcdef.parquet")}


def _spoil_table(url: str, name: str, column: str, shard: str) -> None:
    """Add one to what a control table says of a shard."""
    fs, path = outputs.filesystem(url)
    table = pq.read_table(io.BytesIO(fs.cat_file(f"{path}/{name}")))
    rows = [row | {column: row[column] + 1} if row["shard"] == shard else row for row in table.to_pylist()]
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), sink)
    fs.pipe_file(f"{path}/{name}", sink.getvalue())


def hidden_text(data: bytes) -> Iterator[str]:
    """Text of a Parquet file that its compression hides from a search of the bytes: every value and the metadata."""
    if data[:4] == b"PAR1":
        table = pq.read_table(io.BytesIO(data))
        yield json.dumps({key.decode(): value.decode(errors="replace") for key, value in (table.schema.metadata or {}).items()})
        for name in table.column_names:
            yield f"{name} {table[name].to_pylist()!r}"
