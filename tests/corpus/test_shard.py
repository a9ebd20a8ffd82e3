"""A shard is the same bytes for the same rows, and reads back bit by bit, whatever is in them."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from embedding.corpus.plan import make_unit
from embedding.corpus.shard import identified, shard_table, take_rows
from embedding.corpus.shards import parquet
from embedding.corpus.shards.parquet import PARQUET
from embedding.corpus.sources import Source
from embedding.errors import EmbeddingJobError
from tests.corpus.reading import every_type

UNIT = make_unit(Source("a.parquet", "s3://b/a.parquet", 7, "v1"), 1000, 4, "f")
VECTORS = np.arange(12, dtype=np.float32).reshape(4, 3)
FOOTER = {"unit": UNIT.identity(), "record": {"rejected": 0, "tokens": 17}, "provenance": {"text": "naïve 名", "list": [1, None, 0.5]}}


def ids(rows: int) -> pa.Table:
    return pa.table({"id": pa.array(range(rows), pa.int64())})


def written(vectors_RD: NDArray[np.float32], copied: pa.Table | None = None, footer: dict[str, Any] | None = None) -> bytes:
    return PARQUET.encode(
        shard_table(ids(len(vectors_RD)) if copied is None else copied, vectors_RD, {}), FOOTER if footer is None else footer
    )


def vectors_of(table: pa.Table) -> NDArray[np.float32]:
    column = table["embedding"].combine_chunks()
    dim = column.type.list_size
    found: NDArray[np.float32] = column.flatten().to_numpy(zero_copy_only=False).reshape(-1, dim)
    return found


def test_the_columns_of_a_shard() -> None:
    counts = {"num_tokens": pa.array([3, 4, 5, 6], pa.int32()), "truncated": pa.array([False, True, False, False])}
    table = pq.read_table(io.BytesIO(PARQUET.encode(shard_table(ids(4), VECTORS, counts), FOOTER)))
    assert table.schema.remove_metadata() == pa.schema(
        [
            pa.field("id", pa.int64()),
            pa.field("embedding", pa.list_(pa.field("element", pa.float32(), nullable=False), 3), nullable=False),
            pa.field("num_tokens", pa.int32(), nullable=False),
            pa.field("truncated", pa.bool_(), nullable=False),
        ]
    )
    assert table.to_pydict() == {
        "id": [0, 1, 2, 3],
        "embedding": VECTORS.tolist(),
        "num_tokens": [3, 4, 5, 6],
        "truncated": [False, True, False, False],
    }


def test_the_same_rows_give_the_same_bytes() -> None:
    assert written(VECTORS) == written(VECTORS.copy())
    assert written(VECTORS) != written(VECTORS, footer=FOOTER | {"record": {"tokens": 18}})
    turned = {"provenance": FOOTER["provenance"], "unit": dict(reversed(FOOTER["unit"].items())), "record": FOOTER["record"]}
    assert written(VECTORS, footer={key: turned[key] for key in FOOTER}) == written(VECTORS)


def test_rows_come_from_a_file_or_another_process_with_the_same_bytes() -> None:
    table = every_type().append_column("row", pa.array(range(4)))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    assert written(VECTORS, pa.ipc.open_stream(sink.getvalue()).read_all()) == written(VECTORS, table)


def test_the_footer_reads_back() -> None:
    data = written(VECTORS)
    assert PARQUET.facts(io.BytesIO(data)) == FOOTER
    assert pq.read_schema(io.BytesIO(data)).metadata[b"embedding.record"] == b'{"rejected": 0, "tokens": 17}'


def test_the_source_s_own_metadata_stays() -> None:
    copied = ids(4).replace_schema_metadata({"pandas": "{}"})
    data = written(VECTORS, copied)
    assert pq.read_schema(io.BytesIO(data)).metadata[b"pandas"] == b"{}"
    assert PARQUET.facts(io.BytesIO(data)) == FOOTER


def test_no_rows() -> None:
    data = written(np.empty((0, 3), np.float32), every_type().slice(0, 0))
    table = pq.read_table(io.BytesIO(data))
    assert table.num_rows == 0
    assert table.schema.field("embedding").type.list_size == 3
    assert table.schema.field("zoned").type == pa.timestamp("us", "Europe/Berlin")
    assert PARQUET.facts(io.BytesIO(data)) == FOOTER


def test_copied_columns_of_every_type_come_back() -> None:
    table = pq.read_table(io.BytesIO(written(VECTORS, every_type())))
    kept = table.drop_columns(["embedding"])
    assert {field.name: field.type for field in kept.schema} == {field.name: field.type for field in every_type().schema}
    assert kept.to_pylist() == every_type().to_pylist()


@given(st.lists(st.binary(min_size=8, max_size=8), max_size=20))
def test_any_bits_come_back(rows: list[bytes]) -> None:
    vectors_RD = np.frombuffer(b"".join(rows), np.float32).reshape(-1, 2)
    table = pq.read_table(io.BytesIO(written(vectors_RD)))
    assert vectors_of(table).tobytes() == vectors_RD.tobytes()


def test_every_nan_and_zero_keeps_its_bits() -> None:
    bits = np.array([0x7FC00000, 0xFFC00001, 0x7F800001, 0x7F800000, 0xFF800000, 0x80000000, 0x00000001], np.uint32)
    table = pq.read_table(io.BytesIO(written(bits.view(np.float32).reshape(-1, 1))))
    assert vectors_of(table).view(np.uint32).ravel().tolist() == bits.tolist()


def test_vectors_of_any_layout_are_written_row_by_row() -> None:
    for vectors_RD in (np.asfortranarray(VECTORS), np.arange(24, dtype=np.float32).reshape(4, 6)[:, :3]):
        assert vectors_of(pq.read_table(io.BytesIO(written(vectors_RD)))).tolist() == vectors_RD.tolist()


def test_row_groups_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "_ROW_GROUP_BYTES", 4 * 3 * 10)  # ten rows of three floats; 64 MiB in earnest
    metadata = pq.read_metadata(io.BytesIO(written(np.zeros((25, 3), np.float32))))
    assert [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)] == [10, 10, 5]
    wide = pq.read_metadata(io.BytesIO(written(np.zeros((2, 300), np.float32))))
    assert wide.num_row_groups == 2


def test_vectors_are_plain_and_other_columns_compact() -> None:
    copied = pa.table({"id": ["same"] * 1000, "tags": [["same"]] * 1000})
    columns = pq.read_metadata(io.BytesIO(written(np.ones((1000, 3), np.float32), copied))).row_group(0)
    found = {columns.column(index).path_in_schema: columns.column(index) for index in range(columns.num_columns)}
    embedding = next(column for path, column in found.items() if path.startswith("embedding"))
    assert not embedding.has_dictionary_page
    assert embedding.compression == "ZSTD"
    assert found["id"].has_dictionary_page
    assert found["id"].statistics.min == "same"
    assert embedding.statistics is None


def test_a_shard_that_does_not_read_back_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    write_table = pq.write_table

    def flip_one_bit(table: pa.Table, sink: pa.NativeFile, **options: Any) -> None:
        vectors = vectors_of(table).copy()
        vectors.view(np.uint32)[2, 1] ^= 1  # as faulty memory does it
        write_table(shard_table(table.select(["id"]), vectors, {}), sink, **options)

    monkeypatch.setattr(pq, "write_table", flip_one_bit)
    with pytest.raises(EmbeddingJobError, match="does not read back as it was written"):
        written(VECTORS)


def test_rows_without_an_id_are_named_by_their_place() -> None:
    copied = pa.table({"more": ["a", "b", "c", "d"]})
    named = identified(UNIT, copied, has_id=False)
    assert named.to_pydict() == {"source": ["s3://b/a.parquet"] * 4, "row_index": [1000, 1001, 1002, 1003], "more": [*"abcd"]}
    assert identified(UNIT, copied, has_id=True) is copied


@given(st.lists(st.booleans(), min_size=4, max_size=4))
def test_rows_of_every_type_are_taken(keep: list[bool]) -> None:
    rows = np.flatnonzero(keep)
    taken = take_rows(every_type(), rows)
    assert taken.schema == every_type().schema
    assert taken.to_pylist() == [row for row, kept in zip(every_type().to_pylist(), keep, strict=True) if kept]
    assert pq.read_table(io.BytesIO(written(VECTORS[rows], taken)))["text"].to_pylist() == taken["text"].to_pylist()
