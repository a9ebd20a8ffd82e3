"""A Lance shard is the same bytes for the same rows, reads back bit by bit, and no flipped bit of it goes unnoticed."""

from __future__ import annotations

import io
import json
import random
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lance.file import LanceFileReader, LanceFileWriter

from embedding.corpus.shard import shard_table, take_rows
from embedding.corpus.shards.lance import LANCE
from embedding.corpus.shards.library import library
from embedding.corpus.storage import open_storage
from embedding.errors import ConfigError, CorpusError, EmbeddingJobError
from tests.corpus.reading import every_type
from tests.support.damage import flipped

VECTORS = np.arange(12, dtype=np.float32).reshape(4, 3)
FOOTER = {"unit": {"id": "0123"}, "record": {"rejected": 0, "tokens": 17}, "provenance": {"text": "naïve 名", "list": [1, None, 0.5]}}
REFUSED = {"map", "a.dotted.name"}


def kept() -> pa.Table:
    return every_type().drop_columns(list(REFUSED))


def written(copied: pa.Table | None = None, vectors_RD: Any = VECTORS, footer: dict[str, Any] | None = None) -> bytes:
    return LANCE.encode(shard_table(kept() if copied is None else copied, vectors_RD, {}), FOOTER if footer is None else footer)


def test_columns_of_every_type_come_back() -> None:
    read = LANCE.read(written())
    assert read.facts == FOOTER
    assert read.table.drop_columns(["embedding"]).to_pylist() == kept().to_pylist()
    assert read.table["embedding"].to_pylist() == VECTORS.tolist()
    changed = {field.name for field in kept().schema if read.table.schema.field(field.name).type != field.type}
    assert changed == {"view"}  # a plain string there
    assert read.table.schema.field("embedding").nullable is False


def test_the_same_rows_are_the_same_bytes_however_they_lie() -> None:
    table = kept().append_column("row", pa.array(range(4)))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    assert written(table) == written(pa.ipc.open_stream(sink.getvalue()).read_all())
    assert written(table) == written(pa.concat_tables([table.slice(row, 1) for row in range(4)]))
    assert written(take_rows(table, np.array([1, 3])), VECTORS[[1, 3]]) == written(
        take_rows(table.slice(1), np.array([0, 2])), VECTORS[[1, 3]]
    )
    assert written(footer=dict(reversed(FOOTER.items()))) == written()
    assert written(footer=FOOTER | {"record": {"tokens": 18}}) != written()


def test_what_lies_under_a_null_is_no_part_of_the_row() -> None:
    values = pa.array([1, 2, 3, 4])
    hidden = pa.Array.from_buffers(pa.int64(), 4, [pa.py_buffer(bytes([0b1010])), values.buffers()[1]])
    assert written(pa.table({"id": hidden})) == written(pa.table({"id": [None, 2, None, 4]}))


def test_a_dictionary_is_what_its_rows_need() -> None:
    words = pa.array(["b", "a", None, "b"])
    longer = pa.DictionaryArray.from_arrays(pa.array([3, 1, None, 3], pa.int32()), ["unused", "a", "too", "b"])
    assert written(pa.table({"id": longer})) == written(pa.table({"id": words.dictionary_encode()}))


def test_long_texts_are_the_same_bytes_each_time() -> None:
    """Lance's own choice for strings, FSST, learns its symbols from a random sample."""
    words = [f"{number:x} is a word" for number in random.Random(0).sample(range(10**9), 500)]
    texts = [" ".join(random.Random(row).sample(words, 40)) for row in range(500)]
    table = pa.table({"id": texts, "deep": [{"x": [text]} for text in texts]})
    assert len({written(table, np.zeros((500, 3), np.float32)) for _ in range(4)}) == 1


def test_other_metadata_of_the_source_does_not_come_along() -> None:
    copied = pa.table({"id": range(4)})
    tagged = pa.table({"id": range(4)}, schema=pa.schema([pa.field("id", pa.int64(), nullable=False, metadata={"a": "b", "c": "d"})]))
    assert written(tagged.replace_schema_metadata({"pandas": "{}", "x": "y"})) == written(copied)


def test_what_a_file_says_of_itself_is_plain_json(tmp_path: Path) -> None:
    file = tmp_path / "a.lance"
    file.write_bytes(written())
    metadata = LanceFileReader(str(file)).metadata().schema.metadata
    assert json.loads(metadata[b"embedding"])["facts"] == FOOTER
    assert list(metadata) == [b"embedding"]


@given(st.lists(st.binary(min_size=8, max_size=8), max_size=20))
def test_any_bits_come_back(rows: list[bytes]) -> None:
    vectors_RD = np.frombuffer(b"".join(rows), np.float32).reshape(-1, 2)
    table = LANCE.read(written(pa.table({"id": range(len(rows))}), vectors_RD)).table
    assert b"".join(chunk.flatten().to_numpy().tobytes() for chunk in table["embedding"].chunks) == vectors_RD.tobytes()


def test_no_rows() -> None:
    read = LANCE.read(written(kept().slice(0, 0), VECTORS[:0]))
    assert (read.table.num_rows, read.facts) == (0, FOOTER)
    assert read.table.schema.field("embedding").type.list_size == 3


def test_every_flipped_bit_is_found() -> None:
    data = written()
    unnoticed = []
    for place in range(0, len(data), 7):
        with suppress(ValueError):
            LANCE.read(flipped(data, place, 1 << place % 8))
            unnoticed.append(place)
    assert unnoticed == []
    assert len(data) > 3000


@pytest.mark.parametrize("damage", [b"", b"no Lance file", written()[:500]])
def test_other_files_are_no_shards(damage: bytes) -> None:
    with pytest.raises(ValueError, match="digest"):
        LANCE.read(damage)
    with pytest.raises(ValueError, match=r"."):
        LANCE.facts(io.BytesIO(damage))


class Counted(io.BytesIO):
    fetched = 0

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        self.fetched += len(data)
        return data


def test_facts_cost_the_end_of_a_file() -> None:
    data = written(pa.table({"id": range(2000)}), np.random.default_rng(0).standard_normal((2000, 384), dtype=np.float32))
    file = Counted(data)
    assert LANCE.facts(file) == FOOTER
    assert file.fetched <= 2**18 < len(data) / 10
    assert file.closed
    wordy = FOOTER | {"calibration": {"embedding": np.random.default_rng(0).standard_normal(40_000).tolist()}}
    assert LANCE.facts(io.BytesIO(written(footer=wordy))) == wordy  # more than that end


def test_some_rows_of_a_file(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    storage.put("a.lance", written(pa.table({"id": range(100), "more": ["x"] * 100}), np.zeros((100, 3), np.float32)))
    table, facts = LANCE.scan(storage, "a.lance", lambda schema: schema.names[::2], lambda _: 10, random.Random(0))
    assert facts == FOOTER
    assert table.column_names == ["id", "embedding"]
    assert table["id"].to_pylist() == list(range(table["id"][0].as_py(), table["id"][0].as_py() + 10))


def test_a_shard_that_does_not_read_back_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    write = LanceFileWriter.write_batch

    def flip_one_bit(writer: LanceFileWriter, batch: pa.RecordBatch) -> None:
        vectors = batch["embedding"].flatten().to_numpy().copy()
        vectors.view(np.uint32)[5] ^= 1  # as faulty memory does it
        flat = pa.FixedSizeListArray.from_arrays(pa.array(vectors), type=batch.schema.field("embedding").type)
        write(writer, batch.set_column(1, batch.schema.field("embedding"), flat))

    monkeypatch.setattr(LanceFileWriter, "write_batch", flip_one_bit)
    with pytest.raises(EmbeddingJobError, match="does not read back as it was written; this machine's memory or Lance library is faulty"):
        written(pa.table({"id": range(4)}))


HARD = {
    "map": pa.map_(pa.string(), pa.int64()),
    "decimal32": pa.decimal32(5, 2),
    "interval": pa.month_day_nano_interval(),
    "list_view": pa.list_view(pa.int8()),
    "no fields": pa.struct([]),
    "strings of a number": pa.list_(pa.string(), 2),
    "deep": pa.struct({"a": pa.list_(pa.map_(pa.string(), pa.int8()))}),
}


@pytest.mark.parametrize("name", HARD)
def test_types_that_lance_has_not_are_refused(name: str) -> None:
    fits = LANCE.fits([name])
    assert fits is not None
    with pytest.raises(CorpusError, match=rf"^s3://b/a: column '{name}' is .*, which Lance shards cannot hold; cast it"):
        fits(pa.schema([pa.field(name, HARD[name])]), "s3://b/a")


def test_all_other_types_fit() -> None:
    names = kept().column_names
    fits = LANCE.fits(names)
    assert fits is not None
    fits(kept().schema, "a")
    fits(kept().schema, "b")


@pytest.mark.parametrize("name", ["a.dotted.name", "_rowid", "a`b"])
def test_names_that_lance_does_not_take_are_refused(name: str) -> None:
    fits = LANCE.fits([name])
    assert fits is not None
    with pytest.raises(CorpusError, match=rf"^a: column '{name}' has a name that Lance does not accept, which reads a dot as a path and"):
        fits(pa.schema([(name, pa.int64())]), "a")


def test_a_column_has_one_type_in_all_files() -> None:
    fits = LANCE.fits(["n"])
    assert fits is not None
    fits(pa.schema([("n", pa.int32())]), "a")
    fits(pa.schema([("m", pa.int8())]), "a line of JSON without it")
    with pytest.raises(CorpusError, match=r"^b: column 'n' is int64; in a it is int32, and a column of a Lance dataset has one type"):
        fits(pa.schema([("n", pa.int64())]), "b")


def test_views_are_the_type_that_they_are_views_of() -> None:
    fits = LANCE.fits(["n"])
    assert fits is not None
    fits(pa.schema([("n", pa.string_view())]), "a")
    fits(pa.schema([("n", pa.string())]), "b")


def test_without_the_library_there_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    library.cache_clear()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "lance", None)
        with pytest.raises(ConfigError, match=r"^--output-format=lance needs pylance, .*; pip install 'embed-corpus\[lance\]'$"):
            LANCE.require()
    LANCE.require()
