"""Several lengths of the same vectors in one output: each column is what a run with that one length would give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedding.corpus.output import Output
from embedding.corpus.shards.parquet import PARQUET
from embedding.errors import ConfigError, SettingsChangedError
from embedding.names import OutputDtype
from tests.model.tiny import TEXTS
from tests.run.here import embed_here, found, prove_here
from tests.support import corpora, outputs

COLUMNS = {"embedding": 20, "embedding_12": 12}
DIMENSIONS = tuple(COLUMNS.values())


@pytest.fixture
def source(tmp_path: Path) -> str:
    texts = [*TEXTS[:30], "a long text that is cut " * 40]
    return corpora.Corpus({"a.parquet": corpora.parquet(pa.table({"id": range(len(texts)), "text": texts}))}, []).write(tmp_path / "in")


@pytest.mark.parametrize(("dtype", "long_text"), [("float32", "average"), ("float16", "chunk"), ("ubinary", "truncate")])
def test_each_column_is_a_run_of_its_own(dtype: OutputDtype, long_text: str, source: str, tiny_model: Path, tmp_path: Path) -> None:
    output, options = str(tmp_path / "out"), {"output_dtype": dtype, "long_text": long_text}
    [name, *_] = embed_here(source, output, tiny_model, dimensions=DIMENSIONS, token_columns=True, **options)
    table = outputs.table(output)
    assert [column for column in table.column_names if not column.startswith("chunk")] == ["id", *COLUMNS, "num_tokens", "truncated"]
    for column, dimensions in COLUMNS.items():
        alone = str(tmp_path / column)
        embed_here(source, alone, tiny_model, dimensions=dimensions, **options)
        assert table[column].to_pylist() == outputs.table(alone)["embedding"].to_pylist()
        assert not table.schema.field(column).nullable
    proof = prove_here(output)
    assert (proof.status, proof.details, proof.sampled > 30) == ("proved", [], True)

    file = Path(output, name)
    table = pq.read_table(file).replace_schema_metadata(None)
    place = table.column_names.index("embedding_12")
    swapped = table.set_column(place, table.schema.field(place), table["embedding_12"].take([1, 0, *range(2, len(table))]))
    footer = PARQUET.facts(file.open("rb"))
    file.write_bytes(PARQUET.encode(swapped, footer))
    assert found(prove_here(output)) == {("wrong vector", name)}
    file.write_bytes(PARQUET.encode(table.drop_columns(["embedding_12"]), footer))
    assert found(prove_here(output, sample=0)) == {("wrong columns", name)}


def test_lengths_are_checked_of_every_column(source: str, tiny_model: Path, tmp_path: Path) -> None:
    output = str(tmp_path / "out")
    [name, *_] = embed_here(source, output, tiny_model, dimensions=(20, 12, 4))
    file = Path(output, name)
    table = pq.read_table(file).replace_schema_metadata(None)
    kind = table.schema.field("embedding_4").type
    longer = np.array(table["embedding_4"].to_pylist(), np.float32) * np.float32(1.01)
    place = table.column_names.index("embedding_4")
    changed = table.set_column(place, table.schema.field(place), pa.FixedSizeListArray.from_arrays(pa.array(longer.ravel()), type=kind))
    file.write_bytes(PARQUET.encode(changed, PARQUET.facts(file.open("rb"))))
    assert found(prove_here(output, sample=0)) == {("wrong norm", name)}


def test_vectors_are_normalized_where_any_is_cut(source: str, tiny_model: Path, tmp_path: Path) -> None:
    """The whole one too: columns of one output are alike."""
    for normalize, expected in (("auto", True), ("no", False)):
        output = str(tmp_path / normalize)
        embed_here(source, output, tiny_model, dimensions=(32, 8), normalize=normalize)
        table = outputs.table(output)
        for column in ("embedding", "embedding_8"):
            norms = np.linalg.norm(np.array(table[column].to_pylist()), axis=1)
            assert bool(np.allclose(norms, 1, atol=1e-5)) is expected
    table = outputs.table(str(tmp_path / "no"))
    assert [row[:8] for row in table["embedding"].to_pylist()] == table["embedding_8"].to_pylist()


def test_outputs_of_one_length_stay_what_they_are(source: str, tiny_model: Path, tmp_path: Path) -> None:
    one, other, several = (str(tmp_path / name) for name in ("one", "other", "several"))
    assert embed_here(source, one, tiny_model, dimensions=20) == embed_here(source, other, tiny_model, dimensions=[20])
    settings = Output(one).settings()
    assert settings is not None
    assert settings.vectors["dimensions"] == 20
    assert not {"further_dimensions", "calibration", "output_dtype"} & settings.vectors.keys()
    embed_here(source, several, tiny_model, dimensions=(20, 8))
    with pytest.raises(SettingsChangedError, match=r"further_dimensions: \[8\] -> \[8, 4\]"):
        embed_here(source, several, tiny_model, dimensions=(20, 8, 4))
    with pytest.raises(SettingsChangedError, match=r"further_dimensions: null -> \[8\]"):
        embed_here(source, one, tiny_model, dimensions=(20, 8))


def split_columns(file: Path) -> list[str]:
    group = pq.read_metadata(file).row_group(0)
    columns = [group.column(place) for place in range(group.num_columns)]
    return [column.path_in_schema for column in columns if "BYTE_STREAM_SPLIT" in column.encodings]


def test_split_bytes_of_every_column(source: str, tiny_model: Path, tmp_path: Path) -> None:
    output = str(tmp_path / "out")
    [name, *_] = embed_here(source, output, tiny_model, dimensions=(20, 8), byte_stream_split=True)
    assert split_columns(Path(output, name)) == ["embedding.list.element", "embedding_8.list.element"]
    assert prove_here(output).status == "proved"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dimensions": (8, 8)}, "--dimensions 8 8 is not in decreasing order; give the largest number first, and each number once"),
        ({"dimensions": (8, 20)}, "--dimensions 8 20 is not in decreasing order"),
        ({"dimensions": (33, 8)}, "--dimensions=33 is above the model's 32"),
        ({"dimensions": (20, 0)}, "--dimensions=0 is invalid: use a number above 0"),
        (
            {"dimensions": (20, 8), "keep_columns": ("embedding_8",)},
            "column 'embedding_8' has a name that is reserved for the shards' own columns",
        ),
    ],
)
def test_what_is_refused(options: dict[str, Any], message: str, source: str, tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        embed_here(source, str(tmp_path / "out"), tiny_model, **options)


def test_a_column_of_the_corpus_may_look_like_one(tiny_model: Path, tmp_path: Path) -> None:
    """A list of numbers of the corpus is copied as it is, before the vectors, and is none of them."""
    own = pa.FixedSizeListArray.from_arrays(pa.array(np.arange(8, dtype=np.float32)), 4)
    table = pa.table({"id": [1, 2], "text": ["a", "b"], "embedding_4": own})
    source = corpora.Corpus({"a.parquet": corpora.parquet(table)}, []).write(tmp_path / "in")
    output = str(tmp_path / "out")
    [name] = embed_here(source, output, tiny_model, dimensions=(20, 8), keep_columns=("embedding_4",), byte_stream_split=True)
    assert split_columns(Path(output, name)) == ["embedding.list.element", "embedding_8.list.element"]
    assert outputs.table(output).column_names == ["id", "embedding_4", "embedding", "embedding_8"]
    assert outputs.table(output)["embedding_4"].to_pylist() == own.to_pylist()
    assert prove_here(output).status == "proved"
