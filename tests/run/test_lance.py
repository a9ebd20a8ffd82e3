"""Outputs that are Lance datasets: the rows of the same job's Parquet, whatever dies, however they are stored, and proved as those are."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest

from embedding import JobConfig
from embedding.corpus.output import Output
from embedding.corpus.review import sample_shards
from embedding.corpus.shards.lance import LANCE
from embedding.corpus.verify import repair
from embedding.errors import ConfigError, CorpusError, SettingsChangedError
from tests.run.conftest import Embed
from tests.run.here import embed_here, found, prove_here
from tests.run.test_crash import has_shards
from tests.support import corpora, outputs
from tests.support.damage import CHANGES, flipped, rebuilt
from tests.support.job import run_job, start_job
from tests.support.ray_cluster import RayCluster

FIRST = "_versions/18446744073709551614.manifest"


def copied(url: str, folder: Path) -> str:
    """The output on the disk: Lance's own client of S3 is nothing of ours."""
    for name, data in outputs.files(url).items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    return str(folder)


def rows(dataset: lance.LanceDataset) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = dataset.to_table(scan_in_order=True).to_pylist()
    return found


def test_killed_resumed_and_run_again_every_night(
    storage_root: str, tiny_model: Path, tmp_path: Path, ray_cluster: RayCluster, embed: Embed
) -> None:
    output, source, undisturbed = f"{storage_root}/out", f"{storage_root}/in", str(tmp_path / "undisturbed")
    corpora.plain(rows=150, files=2, row_group_rows=5).write(f"{source}/date=2025-01-01")
    options: dict[str, Any] = {"input": source, "unit_rows": 5, "output_format": "lance"}
    arguments: list[str | Path] = [
        "--input",
        source,
        "--id-column",
        "id",
        "--unit-rows",
        "5",
        "--model",
        tiny_model,
        "--output-format",
        "lance",
    ]
    with start_job(*arguments, "--output", output, env=ray_cluster.environment()) as job:
        job.wait_until(has_shards(output, 3), what="three shards")
        job.kill()
    assert "_SUCCESS" not in outputs.files(output)
    assert embed(output=output, lease_seconds=3, **options).units_skipped >= 3
    embed(output=undisturbed, **options)
    shards = outputs.shards(output)
    assert shards == outputs.shards(undisturbed)
    assert len(shards) == 30
    assert all(name.startswith("data/date=2025-01-01-part-") and name.endswith(".lance") for name in shards)
    first = lance.dataset(copied(output, tmp_path / "first"))
    assert (first.version, rows(first)) == (1, rows(lance.dataset(undisturbed)))

    more = corpora.plain(rows=15, files=1, row_group_rows=5, seed=7)
    more.write(f"{source}/date=2025-01-02")
    assert embed(output=output, **options).units_done == 3
    second = lance.dataset(copied(output, tmp_path / "second"))
    assert (second.version, rows(second)[:150]) == (2, rows(first))
    assert [row["id"] for row in rows(second)[150:]] == [row["id"] for row in more.rows]
    assert shards.items() <= outputs.shards(output).items()
    assert prove_here(output).status == "proved"


KINDS: dict[str, dict[str, Any]] = {
    "float32": {"token_columns": True, "keep_columns": ("text", "more", "deep", "when", "word", "view")},
    "float16": {"output_dtype": "float16", "id_column": None},
    "int8": {"output_dtype": "int8", "dimensions": (20, 8)},
    "binary": {"output_dtype": "binary", "dimensions": (24, 8)},
    "ubinary": {"output_dtype": "ubinary"},
    "chunks": {"long_text": "chunk", "max_tokens": 12, "chunk_overlap": 2},
}


@pytest.fixture
def source(tmp_path: Path) -> str:
    """Two files of 30 rows, each with null texts and columns of many types."""
    words = pa.array(["x", "y", None] * 10).dictionary_encode()
    for number in range(2):
        texts: list[str | None] = [*corpora.sentences(28, seed=number), None, "\ud7ff"]
        table = pa.table(
            {
                "id": range(30 * number, 30 * number + 30),
                "text": texts,
                "more": [float("nan"), None, 1.5] * 10,
                "deep": [{"x": [1, None], "y": {"z": "a"}}, None, {"x": None, "y": None}] * 10,
                "when": pa.array(range(30), pa.timestamp("ns", "UTC")),
                "word": words,
                "view": pa.array(["short", None, "a long one that is not kept in line"] * 10, pa.string_view()),
            }
        )
        corpora.Corpus({f"{number}.parquet": corpora.parquet(table, row_group_rows=10)}, []).write(tmp_path / "in")
    return str(tmp_path / "in")


@pytest.mark.parametrize("kind", KINDS)
def test_the_rows_are_those_of_parquet(kind: str, source: str, tiny_model: Path, tmp_path: Path) -> None:
    plain, output, options = str(tmp_path / "plain"), str(tmp_path / "out"), KINDS[kind]
    embed_here(source, plain, tiny_model, **options)
    made = embed_here(source, output, tiny_model, output_format="lance", **options)
    dataset, expected = lance.dataset(output), outputs.table(plain)
    assert list(map(repr, rows(dataset))) == list(map(repr, expected.to_pylist()))
    assert dataset.schema.names == expected.schema.names
    stored = [(field.type.value_type, field.type.list_size) for field in expected.schema if pa.types.is_fixed_size_list(field.type)]
    assert [(field.type.value_type, field.type.list_size) for field in dataset.schema if pa.types.is_fixed_size_list(field.type)] == stored
    proof = prove_here(output)
    assert (proof.status, proof.details, proof.rows_rejected) == ("proved", [], 2)
    assert outputs.control(output, "manifest.parquet")["rows"].to_pylist() == outputs.control(plain, "manifest.parquet")["rows"].to_pylist()
    sample = sample_shards(Output(output).storage, made, rows=40, seed="s", until=float("inf"), form=LANCE)
    assert (sample.unread, len(sample.vectors_RD)) == ([], 40)
    whole = outputs.shards(output)
    Path(output, made[1]).unlink()
    assert embed_here(source, output, tiny_model, run="second", output_format="lance", **options) == [made[1]]
    assert outputs.shards(output) == whole


def test_nearest_neighbours_and_filters(source: str, tiny_model: Path, tmp_path: Path) -> None:
    output = str(tmp_path / "out")
    embed_here(source, output, tiny_model, output_format="lance", keep_columns=("word",))
    dataset = lance.dataset(output)
    table = dataset.to_table(scan_in_order=True)
    vectors = np.array(table["embedding"].to_pylist(), np.float32)
    nearest = {"column": "embedding", "q": vectors[7], "k": 3, "metric": "cosine"}
    answer = dataset.to_table(columns=["id", "_distance"], nearest=nearest).to_pydict()
    order = np.argsort(-(vectors @ vectors[7]), kind="stable")[:3]
    assert answer["id"] == [table["id"][row].as_py() for row in order]
    assert dataset.to_table(columns=["id"], filter="id = 31").to_pydict() == {"id": [31]}


def test_a_proof_finds_each_damage_and_the_next_run_mends_it(tiny_model: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"output_format": "lance", "keep_columns": ("text",), "token_columns": True}
    source, output = corpora.plain(rows=10 * (len(CHANGES) + 3), files=1, row_group_rows=10).write(tmp_path / "in"), str(tmp_path / "out")
    made = embed_here(source, output, tiny_model, **options)
    whole = outputs.shards(output)
    names = iter(made)
    expected = {("wrong version", FIRST)}
    for kind, change in CHANGES.values():
        name = next(names)
        Path(output, name).write_bytes(rebuilt(whole[name], change, LANCE))
        expected.add((kind, name))
    byte, gone = next(names), next(names)
    Path(output, byte).write_bytes(flipped(whole[byte], 200))
    Path(output, gone).unlink()
    expected |= {("unreadable shard", byte), ("missing shard", gone)}
    Path(output, FIRST).write_bytes(b"no manifest")
    proof = prove_here(output)
    assert found(proof) == expected
    repair(Output(output, LANCE), proof.details)
    assert outputs.shards(output).keys() == {made[-1]}
    embed_here(source, output, tiny_model, run="second", **options)
    assert outputs.shards(output) == whole
    assert prove_here(output).status == "proved"
    assert lance.dataset(output).count_rows() == 10 * len(made)


def test_a_version_that_says_something_else_is_found(tiny_model: Path, tmp_path: Path) -> None:
    source, output, other = (
        corpora.plain(rows=20, files=1, row_group_rows=10).write(tmp_path / "in"),
        str(tmp_path / "out"),
        str(tmp_path / "less"),
    )
    embed_here(source, output, tiny_model, output_format="lance")
    embed_here(source, other, tiny_model, output_format="lance", limit_rows=10)
    Path(output, FIRST).write_bytes(Path(other, FIRST).read_bytes())
    proof = prove_here(output, sample=0)
    assert found(proof) == {("wrong version", FIRST)}
    Path(output, FIRST).unlink()
    assert found(prove_here(output, sample=0)) == {("wrong version", FIRST)}


def test_whole_runs(embed: Embed, source: str, tmp_path: Path) -> None:
    """The report samples it, a dry run tells of it, another format is refused, and --restart begins again as Parquet."""
    output, options = str(tmp_path / "out"), {"output_format": "lance", "report": "yes"}
    summary = embed(input=source, output=output, **options)
    assert (summary.status, summary.rows_out, summary.rows_rejected) == ("complete", 58, 2)
    assert lance.dataset(output).count_rows() == 58
    [report] = Path(output, "_control/runs").glob("*/report.html")
    assert "could not be read" not in report.read_text()
    assert outputs.document(output, "_control/job.json")["versions"]["pylance"] == lance.__version__
    with pytest.raises(SettingsChangedError, match='output_format: "lance" -> null'):
        embed(input=source, output=output)
    assert embed(input=source, output=output, output_format="lance").status == "nothing to do"
    assert embed(input=source, output=output, restart=True, yes=True).rows_out == 58
    assert not Path(output, "_transactions").exists() or not list(Path(output, "_transactions").iterdir())
    assert list(Path(output, "_versions").iterdir()) == []
    assert all(name.endswith(".parquet") for name in outputs.shards(output))


def test_without_the_library_a_run_is_not_begun(source: str, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "lance.py").write_text("raise ModuleNotFoundError(\"No module named 'lance'\", name='lance')")
    env = {"PYTHONPATH": os.pathsep.join([str(tmp_path / "path"), os.environ.get("PYTHONPATH", "")])}
    output = tmp_path / "out"
    arguments = ["--input", source, "--output", str(output), "--model", str(tiny_model), "--output-format", "lance", "--dry-run"]
    result = run_job(*arguments, env=env, check=2)
    assert re.fullmatch(r"error: --output-format=lance needs pylance, .*; pip install 'embed-corpus\[lance\]'\n", result.stderr)
    assert not output.exists()


@pytest.mark.parametrize("dry_run", [False, True])
def test_what_a_dataset_can_not_have_is_refused_before_anything_is_made(dry_run: bool, embed: Embed, tmp_path: Path) -> None:
    output = str(tmp_path / "out")
    table = pa.table({"id": [1], "text": ["a"], "tags": pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int64())), "doc": [{"n": 1}]})
    one = corpora.Corpus({"a.parquet": corpora.parquet(table)}, [])
    two = corpora.Corpus({"b.parquet": corpora.parquet(table.set_column(0, "id", pa.array([1], pa.int32())))}, [])
    source, options = one.write(tmp_path / "in"), {"output_format": "lance", "dry_run": dry_run}
    with pytest.raises(CorpusError, match=r"column 'tags' is map<string, int64.*>, which Lance shards cannot hold"):
        embed(input=source, output=output, keep_columns=("tags",), **options)
    with pytest.raises(CorpusError, match=r"column 'doc\.n' has a name that Lance does not accept"):
        embed(input=source, output=output, keep_columns=("doc.n",), **options)
    two.write(tmp_path / "in")
    with pytest.raises(CorpusError, match=r"column 'id' is int\d\d; in .* it is int\d\d, and a column of a Lance dataset has one type"):
        embed(input=source, output=output, **options)
    with pytest.raises(ConfigError, match="--byte-stream-split is an encoding of Parquet, not of --output-format=lance; leave it out"):
        JobConfig.build(input=(source,), output=output, byte_stream_split=True, **options)
    assert not Path(output).exists()
