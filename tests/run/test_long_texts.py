"""Jobs on long texts: a row a chunk, one vector of all chunks, or a rejected row; proved, resumed and refused like any other."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import numpy.typing as npt
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from embedding.corpus.lengths import LENGTH_EDGES
from embedding.corpus.output import Output
from embedding.corpus.verify import repair
from embedding.errors import ConfigError, SettingsChangedError
from embedding.model import windows
from embedding.model.embedder import Embedder
from embedding.run.report.figures import lengths_svg
from tests.model.tiny import save_model, spec_of
from tests.run.conftest import Embed
from tests.run.here import embed_here, found, prove_here
from tests.support import corpora, outputs
from tests.support.damage import rebuilt

MAX_TOKENS = 40
TEXTS = [
    "short",
    inspect.getdoc(inspect.Signature),
    inspect.getdoc(inspect.Parameter),
    "  \n " * 300,
    "",
    None,
    inspect.getdoc(inspect.getsource),
    "漢字、かな。" * 60,
    "x" * 400,
    inspect.getdoc(inspect.getattr_static),
    "a text that comes twice, " * 12,
    "a text that comes twice, " * 12,
]
GOOD = [row for row, text in enumerate(TEXTS) if text is not None]
COLUMNS: dict[str, Any] = {"keep_columns": ("lang",), "token_columns": True, "max_tokens": MAX_TOKENS, "unit_rows": 4}
CHUNK: dict[str, Any] = COLUMNS | {"long_text": "chunk", "chunk_overlap": 8}


@pytest.fixture
def source(tmp_path: Path) -> str:
    table = pa.table({"id": range(len(TEXTS)), "text": pa.array(TEXTS, pa.string()), "lang": [f"l{row % 3}" for row in range(len(TEXTS))]})
    return corpora.Corpus({"a.parquet": corpora.parquet(table)}, []).write(tmp_path / "in")


def matrix(table: pa.Table) -> npt.NDArray[np.float32]:
    return np.array(table["embedding"].to_pylist(), np.float32)


def settings_of(output: str) -> dict[str, Any]:
    document = outputs.document(output, "_control/job.json")["vectors"]
    assert isinstance(document, dict)
    return document


def test_a_row_a_chunk(source: str, tiny_model: Path, tmp_path: Path) -> None:
    output = str(tmp_path / "out")
    embed_here(source, output, tiny_model, **CHUNK)
    table = outputs.table(output)
    assert table.column_names == ["id", "lang", "chunk", "chunk_start", "chunk_end", "embedding", "num_tokens", "truncated"]
    assert [str(table.schema.field(name).type) for name in table.column_names[2:5]] == ["int32", "int64", "int64"]
    assert not any(table.schema.field(name).nullable for name in table.column_names[2:])
    rows = table.drop_columns("embedding").to_pylist()
    assert sorted({row["id"] for row in rows}) == GOOD
    assert [row["chunk"] for row in rows if row["id"] in (0, 1, 3, 4)] == [0, *range(sum(row["id"] == 1 for row in rows)), 0, 0]
    assert all(row["lang"] == f"l{row['id'] % 3}" for row in rows)
    texts = [str(TEXTS[row["id"]]) for row in rows]
    slices = [text[row["chunk_start"] : row["chunk_end"]] for row, text in zip(rows, texts, strict=True)]
    assert slices[0] == "short"
    assert len({row["id"] for row in rows if row["chunk"] > 1}) > 4
    embedder = Embedder(spec_of(tiny_model, max_tokens=MAX_TOKENS, normalize="yes"))
    tokens = embedder.tokenize(slices)
    assert [row["num_tokens"] for row in rows] == tokens.lengths.tolist()
    assert not any(row["truncated"] for row in rows)
    np.testing.assert_allclose(matrix(table), embedder.embed(tokens, 512).vectors_RD, rtol=0, atol=3e-6)

    manifest = outputs.control(output, "manifest.parquet")
    assert sum(manifest["rows"].to_pylist()) == len(rows)
    assert sum(manifest["source_rows"].to_pylist()) == len(TEXTS)
    assert manifest["rejected"].to_pylist() == [0, 1, 0]
    records = outputs.control(output, "records")
    assert records["chunks"].to_pylist() == manifest["rows"].to_pylist()
    assert records["rows"].to_pylist() == [4, 4, 4]
    last = [piece for piece, row in zip(slices, rows, strict=True) if row["id"] >= 8]
    assert records["duplicates"].to_pylist()[2] == len(last) - len(set(last)) >= sum(row["id"] == 11 for row in rows)
    proof = prove_here(output)
    assert (proof.status, proof.details, proof.rows, proof.rows_rejected) == ("proved", [], len(GOOD), 1)
    assert proof.sampled == sum(min(4, sum(row["id"] == text for row in rows)) for text in GOOD)


def test_other_tools_cut_the_same_slices(source: str, tiny_model: Path, tmp_path: Path) -> None:
    """As docs/long-texts.md says it, on a text whose characters are of all widths."""
    text = "e\u0301 👩\u200d🚀 漢字 naïve \U0001f1e9\U0001f1ea " * 30
    corpora.Corpus({"b.parquet": corpora.parquet(pa.table({"id": [99], "text": [text], "lang": ["x"]}))}, []).write(Path(source))
    embed_here(source, str(tmp_path / "out"), tiny_model, **CHUNK)
    chunks = outputs.table(str(tmp_path / "out")).select(["id", "chunk_start", "chunk_end"])
    texts = pa.table({"id": [*range(len(TEXTS)), 99], "text": [*TEXTS, text]})
    by_id = dict(zip(*texts.to_pydict().values(), strict=True))
    expected = [by_id[row["id"]][row["chunk_start"] : row["chunk_end"]] for row in chunks.to_pylist()]
    query = "SELECT substring(text, chunk_start + 1, chunk_end - chunk_start) FROM chunks JOIN texts USING (id) ORDER BY id, chunk_start"
    assert sorted(row[0] for row in duckdb.connect().execute(query).fetchall()) == sorted(expected)
    joined = polars.DataFrame(chunks.to_pydict()).join(polars.DataFrame(texts.to_pydict()), on="id", maintain_order="left")
    cut = joined.select(polars.col("text").str.slice("chunk_start", polars.col("chunk_end") - polars.col("chunk_start")))
    assert cut["text"].to_list() == expected


def test_an_output_of_chunks_resumes_and_refuses_other_chunks(source: str, tiny_model: Path, tmp_path: Path) -> None:
    output = str(tmp_path / "out")
    made = embed_here(source, output, tiny_model, **CHUNK)
    whole = outputs.files(output)
    for name in [made[1], "_SUCCESS", "_control/manifest.parquet", *(name for name in whole if "/records/" in name)]:
        Path(output, name).unlink()  # as a run leaves it that died: counts are in the footers
    assert embed_here(source, output, tiny_model, run="second", **CHUNK) == [made[1]]
    again = outputs.files(output)
    assert {name for name in whole if again.get(name) != whole[name]} == {name for name in whole if "/records/" in name}
    truncate = {"long_text": "truncate", "chunk_overlap": 0}
    for change in ({"chunk_overlap": 7}, {"chunk_by": "sentences"}, {"long_text": "average"}, truncate):
        with pytest.raises(SettingsChangedError, match=next(iter(change))):
            embed_here(source, output, tiny_model, **(CHUNK | change))


def test_the_settings_of_outputs_that_truncate_are_what_they_were(source: str, tiny_model: Path, tmp_path: Path) -> None:
    embed_here(source, str(tmp_path / "out"), tiny_model)
    embed_here(source, str(tmp_path / "chunked"), tiny_model, **CHUNK)
    embed_here(source, str(tmp_path / "rejected"), tiny_model, long_text="reject")
    plain, chunked, rejected = (settings_of(str(tmp_path / name)) for name in ("out", "chunked", "rejected"))
    assert chunked.keys() - plain.keys() == {"long_text", "chunk_overlap", "chunk_by"}
    assert rejected.keys() - plain.keys() == {"long_text"}
    assert set(outputs.control(str(tmp_path / "out"), "records")["chunks"].to_pylist()) == {0}


def test_one_vector_of_all_chunks(source: str, tiny_model: Path, tmp_path: Path) -> None:
    options = COLUMNS | {"chunk_by": "sentences", "max_tokens": 30}
    embed_here(source, str(tmp_path / "chunks"), tiny_model, **options, long_text="chunk")
    output = str(tmp_path / "out")
    made = embed_here(source, output, tiny_model, **options, long_text="average")
    chunks, table = outputs.table(str(tmp_path / "chunks")), outputs.table(output)
    assert table.column_names == ["id", "lang", "embedding", "num_tokens", "truncated"]
    assert table["id"].to_pylist() == GOOD
    ids, weights = chunks["id"].to_numpy(), chunks["num_tokens"].to_numpy().astype(np.float64)
    assert table["num_tokens"].to_pylist() == [weights[ids == row].sum() for row in GOOD]
    for row, vector in zip(GOOD, matrix(table), strict=True):
        of_row = matrix(chunks.filter(pa.array(ids == row))).astype(np.float64)
        mean = np.average(of_row, axis=0, weights=weights[ids == row])
        np.testing.assert_allclose(vector, mean / np.linalg.norm(mean), rtol=0, atol=1e-6)
    whole = outputs.files(output)
    proof = prove_here(output)
    assert (proof.status, proof.details, proof.rows, proof.sampled) == ("proved", [], len(GOOD), len(GOOD))
    file = Path(output, made[0])
    file.write_bytes(rebuilt(file.read_bytes(), swapped_vectors))
    assert found(prove_here(output)) == {("wrong vector", made[0])}
    file.unlink()
    embed_here(source, output, tiny_model, run="second", **options, long_text="average")
    assert outputs.files(output)[made[0]] == whole[made[0]]


def test_averages_of_vectors_of_any_length_are_not_scaled(source: str, tiny_model: Path, tmp_path: Path) -> None:
    options = COLUMNS | {"normalize": "no"}
    for how in ("chunk", "average"):
        embed_here(source, str(tmp_path / how), tiny_model, **options, long_text=how)
    chunks, table = outputs.table(str(tmp_path / "chunk")), outputs.table(str(tmp_path / "average"))
    ids, weights = chunks["id"].to_numpy(), chunks["num_tokens"].to_numpy()
    expected = [np.average(matrix(chunks)[ids == row], axis=0, weights=weights[ids == row]) for row in GOOD]
    np.testing.assert_allclose(matrix(table), expected, rtol=0, atol=1e-6)
    assert prove_here(str(tmp_path / "average")).status == "proved"


def swapped_vectors(table: pa.Table, footer: dict[str, Any]) -> tuple[pa.Table, dict[str, Any]]:
    place = table.column_names.index("embedding")
    order = [1, 0, *range(2, table.num_rows)]
    return table.set_column(place, table.schema.field("embedding"), table["embedding"].take(order)), footer


def test_long_texts_are_rejected(source: str, tiny_model: Path, tmp_path: Path) -> None:
    output, options = str(tmp_path / "out"), COLUMNS | {"long_text": "reject"}
    embed_here(source, output, tiny_model, **options)
    rejected = {row["row_index"]: row["reason"] for row in outputs.control(output, "rejected").to_pylist()}
    reason = f"the text has more than max_tokens={MAX_TOKENS} tokens"
    assert rejected == {5: "text is null", **dict.fromkeys((1, 2, 6, 7, 9, 10, 11), reason)}
    table = outputs.table(output)
    assert table["id"].to_pylist() == [0, 3, 4, 8]
    assert table["truncated"].to_pylist() == [False] * 4
    proof = prove_here(output)
    assert (proof.status, proof.rows, proof.rows_rejected) == ("proved", 4, 8)
    [first, *_] = [name for name in outputs.files(output) if "/rejected/" in name]
    listed = pq.read_table(Path(output, first)).to_pylist()
    lie = pa.Table.from_pylist([row | {"reason": row["reason"].replace("40", "41")} for row in listed])
    pq.write_table(lie, Path(output, first))
    assert {kind for kind, _ in found(prove_here(output, sample=0))} == {"wrong rejected rows"}


Damage = Callable[[dict[str, list[Any]]], object]


def of_chunks(change: Damage) -> Callable[[pa.Table, dict[str, Any]], tuple[pa.Table, dict[str, Any]]]:
    def apply(table: pa.Table, footer: dict[str, Any]) -> tuple[pa.Table, dict[str, Any]]:
        columns = {name: table[name].to_pylist() for name in ("chunk", "chunk_start", "chunk_end")}
        change(columns)
        for name, values in columns.items():
            place = table.column_names.index(name)
            table = table.set_column(place, table.schema.field(name), pa.array(values, table.schema.field(name).type))
        return table, footer

    return apply


def left_out(*rows: int) -> Callable[[pa.Table, dict[str, Any]], tuple[pa.Table, dict[str, Any]]]:
    return lambda table, footer: (table.take([row for row in range(table.num_rows) if row not in rows]), footer)


def test_damaged_chunks_are_found_and_repaired(source: str, tiny_model: Path, tmp_path: Path) -> None:
    output, options = str(tmp_path / "out"), CHUNK | {"chunk_overlap": 0}
    made = embed_here(source, output, tiny_model, **options)
    shard = made[0]  # the first row is the only chunk of its text, the next two are of one text
    file = Path(output, shard)
    whole = file.read_bytes()
    ends = pq.read_table(file)["chunk_end"].to_pylist()
    damages: dict[str, tuple[str, Any]] = {
        "number": ("wrong chunks", of_chunks(lambda columns: columns["chunk"].__setitem__(2, 3))),
        "begins late": ("wrong chunks", of_chunks(lambda columns: columns["chunk_start"].__setitem__(1, 5))),
        "ends early": ("wrong chunks", of_chunks(lambda columns: columns["chunk_end"].__setitem__(2, ends[2] - 1))),
        "behind the text": ("wrong chunks", of_chunks(lambda columns: columns["chunk_end"].__setitem__(0, 6))),
        "before the text": ("wrong chunks", of_chunks(lambda columns: columns["chunk_start"].__setitem__(0, -5))),
        "ends before it begins": (
            "wrong chunks",
            of_chunks(
                lambda columns: columns.update({name: [*columns[name][:-1], at] for name, at in (("chunk_start", 9), ("chunk_end", 3))})
            ),
        ),
        "order": ("wrong chunks", of_chunks(lambda columns: columns["chunk_start"].__setitem__(2, 0))),
        "middle left out": ("wrong chunks", left_out(2)),
        "text left out": ("wrong row count", left_out(0)),
        "last chunk left out": ("wrong chunks", left_out(pq.read_table(file).num_rows - 2)),
        "column renamed": ("wrong chunks", lambda table, footer: (table.rename_columns({"chunk": "part"}), footer)),
        "count": ("wrong record", lambda table, footer: (table, footer | {"record": footer["record"] | {"chunks": 3}})),
        "vectors": ("wrong vector", lambda table, footer: swapped_vectors(table, footer)),
        "id": ("wrong ids", lambda table, footer: (table.set_column(0, "id", pa.array([9, *table["id"].to_pylist()[1:]])), footer)),
    }
    findings = []
    for name, (kind, change) in damages.items():
        file.write_bytes(rebuilt(whole, change))
        proof = prove_here(output, sample=10_000 if kind == "wrong vector" else 0)
        assert found(proof) == {(kind, shard)}, name
        findings = proof.details
    repair(Output(output), findings)
    embed_here(source, output, tiny_model, run="second", **options)
    assert file.read_bytes() == whole
    manifest = Path(output, "_control/manifest.parquet")
    table = pq.read_table(manifest)
    pq.write_table(table.set_column(table.column_names.index("rows"), table.schema.field("rows"), pa.array([4, 3, 4])), manifest)
    [ledger] = [name for name in outputs.files(output) if "/records/second-" in name]
    records = pq.read_table(Path(output, ledger)).to_pylist()
    schema = pq.read_schema(Path(output, ledger))
    pq.write_table(pa.Table.from_pylist([row | {"chunks": row["chunks"] + 1} for row in records], schema=schema), Path(output, ledger))
    assert {kind for kind, _ in found(prove_here(output, sample=0))} == {"wrong manifest", "wrong ledger"}


def test_a_text_with_one_bad_chunk_is_rejected_whole(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "bert")
    weights = load_file(model / "model.safetensors")
    vocabulary = json.loads((model / "tokenizer.json").read_text())["model"]["vocab"]
    weights["embeddings.word_embeddings.weight"][vocabulary["z"]] = torch.nan
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    texts = ["a b c " * 20, "a b c " * 20 + "z " + "a b c " * 20, "d e f " * 20]
    source = corpora.Corpus({"a.parquet": corpora.parquet(pa.table({"id": range(3), "text": texts}))}, []).write(tmp_path / "in")
    for how in ("chunk", "average"):
        output = str(tmp_path / how)
        embed_here(source, output, model, long_text=how, max_tokens=20)
        assert sorted(set(outputs.table(output)["id"].to_pylist())) == [0, 2]
        [rejected] = outputs.control(output, "rejected").to_pylist()
        assert (rejected["id"], rejected["reason"]) == ("1", "the model gives a non-finite vector")
        assert prove_here(output, sample=0).status == "proved"


def test_parts_of_a_unit_make_the_same_shard(source: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    embed_here(source, str(tmp_path / "one"), tiny_model, **CHUNK)
    monkeypatch.setattr(windows, "_PART_TOKENS", 100)
    embed_here(source, str(tmp_path / "parts"), tiny_model, **CHUNK)
    one, parts = (outputs.table(str(tmp_path / name)) for name in ("one", "parts"))
    assert parts.drop_columns("embedding").equals(one.drop_columns("embedding"))
    np.testing.assert_allclose(matrix(parts), matrix(one), rtol=0, atol=3e-6)


def test_options_that_do_not_fit_are_refused(source: str, tiny_model: Path, tmp_path: Path) -> None:
    for options, sentence in (
        ({"chunk_overlap": 5}, "--chunk-overlap needs windows, but --long-text=truncate makes none; set --long-text to chunk or average"),
        ({"chunk_by": "sentences", "long_text": "reject"}, "--chunk-by needs windows, but --long-text=reject makes none"),
        ({"long_text": "chunk", "keep_columns": ["text"]}, "--keep-columns text would repeat the whole text in the row of each chunk"),
        ({"long_text": "chunk", "keep_columns": ["chunk"]}, "column 'chunk' has a name that is reserved for the shards' own columns"),
        ({"long_text": "chunk", "chunk_overlap": 81}, "--chunk-overlap=81 is more than half of the model's max_tokens=160; lower it"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            embed_here(source, str(tmp_path / "out"), tiny_model, **options)


def test_a_run_on_a_cluster_counts_chunks(source: str, embed: Embed, tmp_path: Path) -> None:
    summary = embed(input=source, output=str(tmp_path / "out"), **(CHUNK | {"report": "yes"}))
    assert (summary.status, summary.rows_in, summary.rows_out, summary.rows_rejected) == ("complete", 12, 11, 1)
    assert summary.chunks == outputs.table(str(tmp_path / "out")).num_rows > 30
    [report] = [data.decode() for name, data in outputs.files(str(tmp_path / "out")).items() if name.endswith("report.html")]
    assert f"{summary.chunks:,} chunks" in report
    assert embed(input=source, output=str(tmp_path / "out"), **CHUNK).status == "nothing to do"


def test_a_report_draws_documents_that_are_all_longer_than_a_window() -> None:
    counts = np.zeros(len(LENGTH_EDGES), np.int64)
    counts[-20:-18] = 1
    assert "<svg" in lengths_svg(counts, 0, 40)
