"""Outputs of vectors in half precision or of a bit a number: made, proved, found out when they are damaged, and reported on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file, save_file
from sentence_transformers.util import quantize_embeddings

from embedding.corpus.output import Output
from embedding.corpus.review import sample_shards
from embedding.corpus.shards.parquet import PARQUET
from embedding.errors import ConfigError, SettingsChangedError
from embedding.names import OutputDtype
from embedding.run.proof.verify import compare_bits
from tests.model.tiny import TEXTS, save_model
from tests.run.here import embed_here, found, prove_here
from tests.support import corpora, outputs

TYPES = {"float16": "halffloat", "binary": "int8", "ubinary": "uint8"}


@pytest.fixture
def source(tmp_path: Path) -> str:
    texts = TEXTS[:40]
    return corpora.Corpus({"a.parquet": corpora.parquet(pa.table({"id": range(len(texts)), "text": texts}))}, []).write(tmp_path / "in")


def values(output: str) -> np.ndarray:
    return np.array(outputs.table(output)["embedding"].to_pylist())


@pytest.mark.parametrize("dtype", TYPES)
def test_numbers_of_every_kind(dtype: OutputDtype, source: str, tiny_model: Path, tmp_path: Path) -> None:
    whole, output = str(tmp_path / "whole"), str(tmp_path / "out")
    embed_here(source, whole, tiny_model, dimensions=20)
    [name, *_] = embed_here(source, output, tiny_model, dimensions=20, output_dtype=dtype)
    vectors = values(whole).astype(np.float32)
    expected = vectors.astype(np.float16) if dtype == "float16" else quantize_embeddings(vectors, dtype)
    assert values(output).tolist() == np.asarray(expected).tolist()
    kind = outputs.table(output).schema.field("embedding").type
    assert (str(kind.value_type), kind.list_size) == (TYPES[dtype], 20 if dtype == "float16" else 3)
    proof = prove_here(output)
    assert (proof.status, proof.details, proof.sampled) == ("proved", [], 40)
    assert proof.worst_cosine is not None
    assert proof.worst_cosine > 0.9999

    file = Path(output, name)
    data = file.read_bytes()
    table = pq.read_table(file).replace_schema_metadata(None)
    place = table.column_names.index("embedding")
    order = [1, 0, *range(2, len(table))]
    swapped = table.set_column(place, table.schema.field("embedding"), table["embedding"].take(order))
    file.write_bytes(PARQUET.encode(swapped, PARQUET.facts(file.open("rb"))))
    assert found(prove_here(output)) == {("wrong vector", name)}
    floats = pq.read_table(Path(whole, next(iter(outputs.shards(whole)))))["embedding"]
    other = table.set_column(place, pa.field("embedding", floats.type, nullable=False), floats)
    file.write_bytes(data)
    file.write_bytes(PARQUET.encode(other, PARQUET.facts(file.open("rb"))))
    assert found(prove_here(output, sample=0)) == {("wrong columns", name)}
    file.unlink()
    assert embed_here(source, output, tiny_model, run="second", dimensions=20, output_dtype=dtype) == [name]
    assert file.read_bytes() == data
    with pytest.raises(SettingsChangedError, match=f'output_dtype: "{dtype}" -> null'):
        embed_here(source, output, tiny_model, dimensions=20)


@pytest.mark.parametrize("dtype", TYPES)
def test_a_report_samples_numbers_of_every_kind(dtype: OutputDtype, source: str, tiny_model: Path, tmp_path: Path) -> None:
    output = str(tmp_path / "out")
    made = embed_here(source, output, tiny_model, output_dtype=dtype)
    sample = sample_shards(Output(output).storage, made, rows=40, seed="s", until=float("inf"))
    assert (sample.unread, sample.vectors_RD.shape, str(sample.vectors_RD.dtype)) == ([], (40, 32), "float32")
    if dtype != "float16":
        assert set(sample.vectors_RD.ravel().tolist()) == {-1.0, 1.0}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_split_bytes_are_smaller_and_the_same_numbers(dtype: OutputDtype, source: str, tiny_model: Path, tmp_path: Path) -> None:
    plain, output = str(tmp_path / "plain"), str(tmp_path / "out")
    embed_here(source, plain, tiny_model, unit_rows=40, output_dtype=dtype)
    [name] = embed_here(source, output, tiny_model, unit_rows=40, output_dtype=dtype, byte_stream_split=True)
    assert values(output).tolist() == values(plain).tolist()
    columns = pq.read_metadata(Path(output, name)).row_group(0)
    encodings = {columns.column(place).path_in_schema: columns.column(place).encodings for place in range(columns.num_columns)}
    assert [path for path, used in encodings.items() if "BYTE_STREAM_SPLIT" in used] == ["embedding.list.element"]
    sizes = [columns.column(1).total_compressed_size]
    sizes += [pq.read_metadata(file).row_group(0).column(1).total_compressed_size for file in Path(plain, "data").iterdir()]
    assert sizes[0] < sizes[1] or dtype == "float16"  # of which so few have no bytes to save
    assert prove_here(output).status == "proved"
    with pytest.raises(SettingsChangedError, match="byte_stream_split: true -> null"):
        embed_here(source, output, tiny_model, unit_rows=40, output_dtype=dtype)
    with pytest.raises(ConfigError, match="--byte-stream-split needs numbers of several bytes, but --output-dtype=binary has one"):
        embed_here(source, output, tiny_model, output_dtype="binary", byte_stream_split=True)


def test_what_half_precision_can_not_hold_is_rejected(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "bert")
    weights = load_file(model / "model.safetensors")
    weights["encoder.layer.1.output.LayerNorm.weight"] *= 1e6
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    source = corpora.Corpus({"a.parquet": corpora.parquet(pa.table({"id": [0, 1], "text": ["a", "b"]}))}, []).write(tmp_path / "in")
    for dtype, rejected in (("float16", 2), ("float32", 0), ("binary", 0)):
        output = str(tmp_path / dtype)
        embed_here(source, output, model, normalize="no", output_dtype=dtype)
        assert outputs.table(output).num_rows == 2 - rejected
        proof = prove_here(output, sample=0)
        assert (proof.status, proof.rows_rejected) == ("proved", rejected)


def test_bits_bound_the_cosine() -> None:
    right = np.array([3.0, -4.0, 0.1, 0.0])
    same = np.array([1.0, -1.0, 1.0, -1.0, -1.0, -1.0, -1.0, -1.0])
    assert compare_bits(same, right) == (1.0, 1.0)
    assert compare_bits(same * [1, 1, -1, 1, 1, 1, 1, 1], right)[0] == pytest.approx(1 - 0.01 / 25.01 / 2)
    assert compare_bits(-same, right)[0] == pytest.approx(0.5)
    assert compare_bits(same, np.zeros(4)) == (1.0, 1.0)
