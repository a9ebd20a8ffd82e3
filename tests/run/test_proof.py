"""What a proof finds, and that it finds nothing where nothing is wrong; in this process, on real shards."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedding.corpus.check import check_unit
from embedding.corpus.findings import Rules
from embedding.corpus.output import MANIFEST, Output
from embedding.corpus.plan import Unit, make_unit
from embedding.corpus.sources import Source
from embedding.corpus.verify import repair
from embedding.errors import ConfigError, ModelError
from embedding.run.proof.verify import choose_rows, compare, plan_of_output, rules_of_output
from tests.model.tiny import save_model
from tests.run.here import embed_here, found, prove_here
from tests.support import corpora, outputs
from tests.support.damage import OF_A_SHARD, damage, flipped, of_vectors, rebuilt

COLUMNS: dict[str, Any] = {"keep_columns": ("text",), "token_columns": True}
SHARDS = len(OF_A_SHARD) + 3


def corpus(folder: Path) -> str:
    return corpora.plain(rows=10 * SHARDS, files=1, row_group_rows=10).write(folder)


def test_each_damage_is_found_and_repaired_alone(tmp_path: Path, tiny_model: Path) -> None:
    source, output = corpus(tmp_path / "in"), str(tmp_path / "out")
    made = embed_here(source, output, tiny_model, **COLUMNS)
    assert len(made) == SHARDS
    whole = outputs.files(output)
    proof = prove_here(output)
    assert (proof.status, proof.findings, proof.rows, proof.sampled) == ("proved", {}, 10 * SHARDS, 10 * SHARDS)
    assert outputs.files(output) == whole

    expected = damage(output, made)
    before = outputs.files(output)
    proof = prove_here(output)

    assert found(proof) == expected
    assert len(proof.details) == len(expected)
    assert outputs.files(output) == before
    removed = repair(Output(output), proof.details)
    assert set(made) - set(outputs.shards(output)) == {name for _, name in expected if name in made}
    assert set(before) - set(removed) == set(outputs.files(output))
    assert embed_here(source, output, tiny_model, run="second", **COLUMNS) == [name for name in made if name != made[-1]]
    assert prove_here(output).status == "proved"
    again = outputs.files(output)
    assert {name: again[name] for name in [*made, "_control/manifest.parquet", "_SUCCESS"]} == {
        name: whole[name] for name in [*made, "_control/manifest.parquet", "_SUCCESS"]
    }
    assert [name for name in again if name.startswith("data/")] == made


def test_every_flipped_bit_of_a_shard_is_found(tmp_path: Path, tiny_model: Path) -> None:
    source, output = corpora.plain(rows=4, files=1).write(tmp_path / "in"), str(tmp_path / "out")
    [name] = embed_here(source, output, tiny_model, **COLUMNS)
    unit, rules, storage = unit_of(output), rules_of(output), Output(output).storage
    file = Path(output, name)
    data = file.read_bytes()
    assert check_unit(unit, rules, storage).finding is None
    unnoticed = []
    for place in range(0, len(data), 9):
        file.write_bytes(flipped(data, place, 1 << place % 8))
        if check_unit(unit, rules, storage).finding is None:
            unnoticed.append(place)
    assert unnoticed == []


def test_flipped_bits_of_vectors_are_found_by_other_versions_too(tmp_path: Path, tiny_model: Path) -> None:
    """They cannot build the shard again, so it is the pages' checksums that tell; of any length, each number could be right."""
    source, output = corpora.plain(rows=4, files=1).write(tmp_path / "in"), str(tmp_path / "out")
    [name] = embed_here(source, output, tiny_model, normalize="no")
    rules, file = replace(rules_of(output), package_version="another"), Path(output, name)
    data = file.read_bytes()
    column = pq.read_metadata(file).row_group(0).column(1)
    assert column.path_in_schema.startswith("embedding")
    end = column.data_page_offset + column.total_compressed_size
    unnoticed = []
    for place in range(end - column.total_compressed_size // 2, end, 9):  # the page's second half: none of its header
        file.write_bytes(flipped(data, place, 1 << place % 8))
        if check_unit(unit_of(output), rules, Output(output).storage).finding is None:
            unnoticed.append(place)
    assert unnoticed == []


def unit_of(output: str) -> Unit:
    settings = Output(output).settings()
    assert settings is not None
    [unit], _ = plan_of_output(settings)
    return unit


def rules_of(output: str) -> Rules:
    settings = Output(output).settings()
    assert settings is not None
    return rules_of_output(settings)


def test_no_kind_of_corpus_raises_a_false_alarm(tmp_path: Path, tiny_model: Path) -> None:
    """Shards are built again byte for byte, whatever the types and chunks of their sources, NaN and nested values too."""
    nested = corpora.nested()
    for kind in sorted(set(corpora.KINDS) - {"nested", "huge_row_group", "tiny_row_groups"}):
        corpora.KINDS[kind]().write(tmp_path / "in" / kind)
    odd = {"id": range(20), "text": ["a", None] * 10, "more": [float("nan"), None, 1.5, -0.0] * 5, "deep": [{"x": [1, None]}, None] * 10}
    table = pa.table({**odd, "when": pa.array(range(20), pa.timestamp("ns", "UTC")), "word": pa.array(["x", "y"] * 10).dictionary_encode()})
    corpora.Corpus({"in/odd/odd.parquet": corpora.parquet(table, row_group_rows=6)}, []).write(tmp_path)
    nested.write(tmp_path / "nested")

    embed_here(str(tmp_path / "in"), str(tmp_path / "out"), tiny_model, keep_columns=["text"], id_column=None, unit_rows=17)
    embed_here(f"{tmp_path}/in/odd", str(tmp_path / "odd"), tiny_model, keep_columns=["more", "deep", "when", "word"], unit_rows=17)
    embed_here(f"{tmp_path}/nested", str(tmp_path / "deep"), tiny_model, text_column="doc.body.text", keep_columns=["doc"], unit_rows=17)

    for output in ("out", "odd", "deep"):
        proof = prove_here(str(tmp_path / output))
        assert (proof.status, proof.details) == ("proved", [])
        assert proof.rows_rejected > 0
        assert proof.sampled == proof.rows


def stretched(shard: bytes) -> bytes:
    """With longer vectors, and of the same size, which the manifest states: how well they compress is chance."""

    def stretch(vectors: npt.NDArray[np.float32], factor: float) -> None:
        vectors *= factor

    factors = np.linspace(1.1, 2, 91)
    tried = (rebuilt(shard, of_vectors(partial(stretch, factor=factor))) for factor in factors)
    return next(found for found in tried if len(found) == len(shard))


def test_an_output_without_unit_lengths_and_one_of_no_rows_are_proved(tmp_path: Path, tiny_model: Path) -> None:
    source, output = corpora.plain(rows=6, files=1).write(tmp_path / "in"), str(tmp_path / "out")
    embed_here(source, output, tiny_model, normalize="no", limit_rows=5)
    proof = prove_here(output)
    assert (proof.status, proof.rows) == ("proved", 5)
    [shard] = outputs.shards(output)
    file = Path(output, shard)
    file.write_bytes(stretched(file.read_bytes()))
    assert prove_here(output).findings == {"wrong vector": 1}
    assert prove_here(output, sample=0).status == "proved"  # what only the model can know
    table = pa.table({"id": [1, 2], "text": pa.array([None, None], pa.string())})
    corpora.Corpus({"a.parquet": corpora.parquet(table)}, []).write(tmp_path / "null")
    embed_here(str(tmp_path / "null"), str(tmp_path / "none"), tiny_model)
    proof = prove_here(str(tmp_path / "none"))
    assert (proof.status, proof.rows, proof.rows_rejected, proof.worst_cosine) == ("proved", 0, 2, None)


def test_false_lists_of_rejected_rows_are_found(tmp_path: Path, tiny_model: Path) -> None:
    table = pa.table({"id": range(4), "text": ["one", None, "three", "four"]})
    corpora.Corpus({"a.parquet": corpora.parquet(table)}, []).write(tmp_path / "in")
    output = str(tmp_path / "out")
    [shard] = embed_here(str(tmp_path / "in"), output, tiny_model)
    [name] = [name for name in outputs.files(output) if "/rejected/" in name]
    file = Path(output, name)
    right, rows = file.read_bytes(), pq.read_table(file)
    [row] = rows.to_pylist()
    lies = ({"reason": "no reason"}, {"row_index": 99}, {"row_index": -3}, {"row_index": 0}, {"id": "7"}, {"source": "elsewhere"})
    for listed in ([], [row, row], *([row | lie] for lie in lies)):
        pq.write_table(pa.Table.from_pylist(listed, schema=rows.schema), file)
        assert found(prove_here(output, sample=0)) == {("wrong rejected rows", shard)}, listed
    file.write_bytes(right[:-9])
    assert found(prove_here(output, sample=0)) == {("wrong rejected rows", shard)}
    file.unlink()
    proof = prove_here(output, sample=0)
    assert found(proof) == {("wrong rejected rows", shard)}
    repair(Output(output), proof.details)
    embed_here(str(tmp_path / "in"), output, tiny_model, run="second")
    assert prove_here(output, sample=0).status == "proved"
    assert file.read_bytes() == right


def test_changed_sources_are_told_as_such_and_nothing_is_deleted_for_them(tmp_path: Path, tiny_model: Path) -> None:
    source, output = corpora.plain(rows=40, files=4).write(tmp_path / "in"), str(tmp_path / "out")
    embed_here(source, output, tiny_model)
    Path(source, "part-0.parquet").write_bytes(corpora.parquet(pa.table({"id": [900], "text": ["replaced"]})))
    Path(source, "part-1.parquet").unlink()
    Path(source, "part-9.parquet").write_bytes(corpora.parquet(pa.table({"id": [901], "text": ["new"]})))
    proof = prove_here(output)
    assert found(proof) == {("source changed", f"file://{source}/part-{number}.parquet") for number in (0, 1, 9)}
    assert (proof.status, proof.exit_code, proof.rows) == ("not proved", 3, 20)
    before = outputs.files(output)
    assert repair(Output(output), proof.details) == []
    assert outputs.files(output) == before
    assert len(embed_here(source, output, tiny_model, run="second")) == 2
    assert prove_here(output).status == "proved"


def test_what_is_committed_of_an_unfinished_output_is_checked(tmp_path: Path, tiny_model: Path) -> None:
    source, output = corpora.plain(rows=40, files=4).write(tmp_path / "in"), str(tmp_path / "out")
    made = embed_here(source, output, tiny_model)
    Path(output, "_SUCCESS").unlink()
    Path(output, made[0]).unlink()
    Path(output, made[1]).write_bytes(b"PAR1")
    Path(output, "_control", "manifest.parquet").unlink()
    assert found(proof := prove_here(output)) == {("not complete", "_SUCCESS"), ("unreadable shard", made[1])}
    assert [finding.what for finding in proof.details if finding.name == "_SUCCESS"] == [
        "a run is still at work or did not finish, leaving 1 unit without a shard; run the job to complete the output"
    ]


def test_a_foreign_file_is_told_and_left_alone(tmp_path: Path, tiny_model: Path) -> None:
    source, output = corpora.plain(rows=10, files=1).write(tmp_path / "in"), str(tmp_path / "out")
    embed_here(source, output, tiny_model)
    Path(output, "data", "notes.txt").write_text("mine")
    proof = prove_here(output, sample=0)
    assert found(proof) == {("foreign file", "data/notes.txt")}
    assert repair(Output(output), proof.details) == []


def test_a_manifest_that_is_gone_or_lists_too_much_is_false(tmp_path: Path, tiny_model: Path) -> None:
    source, output = corpora.plain(rows=20, files=2).write(tmp_path / "in"), str(tmp_path / "out")
    embed_here(source, output, tiny_model)
    file = Path(output, MANIFEST)
    rows = pq.read_table(file)
    first, second = rows.to_pylist()
    for listed in ([second, first], [first], [first, second, second | {"shard": "data/z.parquet"}], [first, second | {"bytes": 1}]):
        pq.write_table(pa.Table.from_pylist(listed, schema=rows.schema), file)
        assert found(prove_here(output, sample=0)) == {("wrong manifest", MANIFEST)}
    for data in (b"PAR1", None):
        file.write_bytes(data) if data else file.unlink()
        assert found(prove_here(output, sample=0)) == {("wrong manifest", MANIFEST)}


def test_a_proof_needs_the_model_that_made_the_vectors(tmp_path: Path, tiny_model: Path) -> None:
    source, output = corpora.plain(rows=10, files=1).write(tmp_path / "in"), str(tmp_path / "out")
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    embed_here(source, output, model)
    model.rename(tmp_path / "moved")
    with pytest.raises(ModelError, match="neither a folder"):
        prove_here(output)
    assert prove_here(output, model=str(tmp_path / "moved")).status == "proved"
    with pytest.raises(ModelError, match=r"is not the model of .*, but differs in model_type, weights_sha256"):
        prove_here(output, model=str(save_model(tmp_path / "other", "distilbert")))
    assert prove_here(output, sample=0).status == "proved"
    job = Path(output, "_control", "job.json")
    job.write_text(json.dumps({key: value for key, value in json.loads(job.read_text()).items() if key != "asked"}))
    with pytest.raises(ConfigError, match="does not record where its model is; set --model"):
        prove_here(output)
    embed_here(source, output, tiny_model)
    assert prove_here(output).status == "proved"


def test_the_sample_is_spread_over_all_rows_and_repeatable() -> None:
    source = Source("a.parquet", "file:///a.parquet", 1, "1")
    units = [make_unit(source, first, rows, "f") for first, rows in ((0, 3), (3, 1), (4, 6))]
    everything = choose_rows(units, 99, seed=1)
    assert everything == {units[0].id: (0, 1, 2), units[1].id: (0,), units[2].id: (0, 1, 2, 3, 4, 5)}
    assert choose_rows(units, 4, seed=1) == choose_rows(units, 4, seed=1) != choose_rows(units, 4, seed=2)
    assert sum(map(len, choose_rows(units, 4, seed=1).values())) == 4
    assert choose_rows(units, 0, seed=1) == {}


def test_how_like_two_vectors_are() -> None:
    assert compare(np.array([3.0, 0.0]), np.array([1.0, 0.0])) == (1.0, 3.0)
    assert compare(np.array([0.0, 2.0]), np.array([1.0, 0.0])) == (0.0, 2.0)
    assert compare(np.zeros(2), np.zeros(2)) == (1.0, 1.0)
    assert compare(np.zeros(2), np.array([1.0, 0.0])) == (0.0, 0.0)
