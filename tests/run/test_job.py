"""Whole runs: a corpus in, shards out, and every kind of second run on the same output. The main ones on a disk and on an S3 server."""

from __future__ import annotations

import io
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedding import JobConfig
from embedding.errors import ConfigError, CorpusError, SettingsChangedError
from embedding.model.embedder import Embedder
from embedding.model.spec import resolve_model
from tests.run.conftest import Embed
from tests.support import corpora, outputs
from tests.support.s3_server import S3Server


def vectors_of(texts: list[str], model: Path) -> npt.NDArray[np.float32]:
    spec = resolve_model(JobConfig(input=("x",), output="x", model=str(model)), precision="fp32")
    embedder = Embedder(spec, device="cpu")
    return embedder.embed(embedder.tokenize(texts), 4096).vectors_RD


def test_every_row_gets_its_vector(storage_root: str, embed: Embed, tiny_model: Path) -> None:
    corpus = corpora.plain(rows=70, files=2, row_group_rows=8)
    source, output = corpus.write(f"{storage_root}/in"), f"{storage_root}/out"

    summary = embed(input=source, output=output, token_columns=True)

    assert summary.status == "complete"
    assert (summary.rows_in, summary.rows_out, summary.rows_rejected) == (70, 70, 0)
    found = outputs.table(output)
    assert found.column_names == ["id", "embedding", "num_tokens", "truncated"]
    assert found["id"].to_pylist() == [row["id"] for row in corpus.rows]
    vectors = np.array(found["embedding"].to_pylist(), np.float32)
    np.testing.assert_allclose(vectors, vectors_of([row["text"] for row in corpus.rows], tiny_model), atol=2e-6)
    assert sum(found["num_tokens"].to_pylist()) == summary.tokens
    manifest = outputs.control(output, "manifest.parquet")
    assert manifest["shard"].to_pylist() == list(outputs.shards(output))
    assert sum(manifest["rows"].to_pylist()) == 70
    assert manifest["bytes"].to_pylist() == [len(data) for data in outputs.shards(output).values()]
    assert outputs.files(output)["_SUCCESS"] == b""
    secret = os.environ.get("AWS_SECRET_ACCESS_KEY", "no secret").encode()
    assert not [name for name, data in outputs.files(output).items() if secret in data]


def test_a_second_run_does_what_changed_and_nothing_else(storage_root: str, embed: Embed) -> None:
    root, output = f"{storage_root}/in", f"{storage_root}/out"
    corpora.plain(rows=60, files=3).write(root)
    embed(input=root, output=output)
    first = outputs.versions(output)

    assert embed(input=root, output=output).status == "nothing to do"
    assert embed(input=root, output=output, batch_tokens=512, unit_rows=7).status == "nothing to do"
    assert outputs.versions(output) == first

    fs, path = outputs.filesystem(root)
    fs.pipe_file(f"{path}/part-1.parquet", corpora.parquet(pa.table({"id": [900, 901], "text": ["changed", "file"]})))
    fs.pipe_file(f"{path}/part-9.parquet", corpora.parquet(pa.table({"id": [999], "text": ["new file"]})))
    fs.rm_file(f"{path}/part-2.parquet")
    summary = embed(input=root, output=output)

    assert (summary.rows_in, summary.rows_skipped, summary.units_done) == (3, 20, 2)
    assert outputs.table(output)["id"].to_pylist() == [*range(20), 900, 901, 999]
    kept = {name: version for name, version in outputs.versions(output).items() if "part-0" in name}
    assert kept == {name: version for name, version in first.items() if "part-0" in name}
    assert outputs.control(output, "manifest.parquet")["shard"].to_pylist() == list(outputs.shards(output))


def test_a_batch_that_cannot_hold_a_text_is_refused(embed: Embed, tmp_path: Path) -> None:
    source = corpora.plain(rows=4, files=1).write(tmp_path / "in")
    with pytest.raises(ConfigError, match=r"--batch-tokens=10 is below the model's max_tokens=160"):
        embed(input=source, output=str(tmp_path / "out"), batch_tokens=10)


def test_settings_that_change_vectors_are_refused(tmp_path: Path, embed: Embed) -> None:
    source, output = corpora.plain(rows=10, files=1).write(str(tmp_path / "in")), str(tmp_path / "out")
    embed(input=source, output=output)
    before = outputs.files(output)

    with pytest.raises(SettingsChangedError) as refusal:
        embed(input=source, output=output, pooling="cls", prompt="query: ")

    assert 'pooling: ["mean"] -> ["cls"]' in str(refusal.value)
    assert 'prompt: "" -> "query: "' in str(refusal.value)
    assert "max_tokens" not in str(refusal.value)
    assert outputs.files(output) == before
    assert embed(input=source, output=output, pooling="cls", restart=True).status == "complete"
    assert outputs.document(output, "_control/job.json")["vectors"]["pooling"] == ["cls"]
    assert outputs.shards(output).keys().isdisjoint(before)


def test_rows_without_text_are_rejected_and_listed(tmp_path: Path, embed: Embed) -> None:
    texts = ["one", None, "", "four", None]
    corpus = corpora.Corpus({"a.parquet": corpora.parquet(pa.table({"id": list("abcde"), "text": texts}))}, [])
    source, output = corpus.write(str(tmp_path / "in")), str(tmp_path / "out")

    summary = embed(input=source, output=output, unit_rows=3)

    assert (summary.rows_in, summary.rows_out, summary.rows_rejected, summary.status) == (5, 3, 2, "complete")
    assert outputs.table(output)["id"].to_pylist() == ["a", "c", "d"]
    rejected = outputs.control(output, "rejected").sort_by("row_index")
    assert rejected.select(["row_index", "id", "reason"]).to_pylist() == [
        {"row_index": 1, "id": "b", "reason": "text is null"},
        {"row_index": 4, "id": "e", "reason": "text is null"},
    ]


def test_a_file_that_breaks_in_the_middle_fails_alone(tmp_path: Path, embed: Embed) -> None:
    root, output = str(tmp_path / "in"), str(tmp_path / "out")
    corpora.plain(rows=40, files=2, row_group_rows=20).write(root)
    fs, path = outputs.filesystem(root)
    data = fs.cat_file(f"{path}/part-0.parquet")
    fs.pipe_file(f"{path}/part-0.parquet", data[:40] + b"\xff" * 60 + data[100:])

    summary = embed(input=root, output=output)

    assert (summary.status, summary.exit_code, summary.rows_in) == ("failed units", 3, 20)
    assert {failure["source"].rpartition("/")[2] for failure in summary.failures} == {"part-0.parquet"}  # type: ignore[attr-defined]
    assert "part-0.parquet" in str(summary.failures[0]["reason"])
    assert "_SUCCESS" not in outputs.files(output)
    fs.pipe_file(f"{path}/part-0.parquet", data)
    summary = embed(input=root, output=output)
    assert (summary.status, summary.rows_in, summary.rows_skipped) == ("complete", 20, 20)
    assert outputs.table(output)["id"].to_pylist() == list(range(40))


@pytest.mark.parametrize("kind", ["nested", "huge_row_group"])
def test_kinds_that_need_a_run_of_their_own(kind: str, embed: Embed, tmp_path: Path) -> None:
    corpus = corpora.KINDS[kind]()
    summary = embed(input=corpus.write(tmp_path / "in"), output=str(tmp_path / "out"), text_column=corpus.text_column, unit_rows=500)
    embedded = [row["id"] for row in corpus.rows if row["text"] is not None]
    assert summary.rows_in == len(corpus.rows)
    assert outputs.table(str(tmp_path / "out"))["id"].to_pylist() == embedded


def test_all_other_kinds_in_one_corpus(embed: Embed, tmp_path: Path) -> None:
    expected: list[str] = []
    kinds = ["codecs", "hive", "libraries", "mixed_schemas", "odd_texts", "string_kinds", "tiny_row_groups", "zero_rows"]
    assert {*kinds, "nested", "huge_row_group", "plain"} == set(corpora.KINDS)
    for kind in kinds:
        corpus = corpora.KINDS[kind]()
        corpus.write(tmp_path / "in" / kind)
        expected += [row["text"] for row in corpus.rows if row["text"] is not None]
    summary = embed(input=str(tmp_path / "in"), output=str(tmp_path / "out"), id_column=None, keep_columns=["text"], unit_rows=200)
    assert summary.status == "complete"
    tables = [pq.read_table(io.BytesIO(data)) for data in outputs.shards(str(tmp_path / "out")).values()]
    assert {tuple(found.column_names) for found in tables} == {("source", "row_index", "text", "embedding")}
    assert {str(found["text"].type) for found in tables} >= {"string", "large_string", "string_view"}  # as in their sources
    assert sorted(text for found in tables for text in found["text"].to_pylist()) == sorted(expected)
    assert any("/" in name.removeprefix("data/") for name in outputs.shards(str(tmp_path / "out")))  # hive folders are kept


def test_what_can_be_known_is_refused_before_anything_is_written(embed: Embed, tmp_path: Path) -> None:
    source, output = corpora.plain(rows=4, files=1).write(tmp_path / "in"), str(tmp_path / "out")
    with pytest.raises(
        CorpusError,
        match=r"part-0\.parquet has no column 'txt'; set --text-column to one of its columns \(did you mean 'text'\?\): id, text",
    ):
        embed(input=source, output=output, text_column="txt")
    with pytest.raises(CorpusError, match="column 'id' is int64, not string; set --text-column to one of its string columns: text"):
        embed(input=source, output=output, text_column="id")
    with pytest.raises(CorpusError, match="does not exist"):
        embed(input=str(tmp_path / "nowhere"), output=output)
    with pytest.raises(ConfigError, match="lies inside --input"):
        embed(input=source, output=f"{source}/vectors")
    with pytest.raises(ConfigError, match="lies inside --input"):
        embed(input=f"{tmp_path}/**/*.parquet", output=output)
    corpora.plain(rows=4, files=1).write(tmp_path / "at" / "data")
    with pytest.raises(
        ConfigError, match=r"^--input .*/at/data lies where --output .*/at puts its shards \(data/\); choose another --output$"
    ):
        embed(input=str(tmp_path / "at" / "data"), output=str(tmp_path / "at"))
    (tmp_path / "in" / "part-1.parquet").write_bytes(b"PAR1 this is no Parquet file PAR1")
    with pytest.raises(CorpusError, match=r"^file:.*part-1\.parquet is not a readable Parquet file"):
        embed(input=source, output=output, bad_rows="fail")
    with pytest.raises(
        CorpusError, match=r"^none of the source files \(1\) can be read; first error: .*part-1\.parquet is not a readable Parquet file"
    ):
        embed(input=f"{source}/part-1.parquet", output=output)
    assert not Path(output).exists()


def test_shards_are_not_removed_by_a_slip_of_the_options(embed: Embed, tmp_path: Path) -> None:
    corpora.plain(rows=20, files=2, row_group_rows=10).write(tmp_path / "in")
    one, both, output = str(tmp_path / "in" / "part-0.parquet"), str(tmp_path / "in"), str(tmp_path / "out")
    embed(input=both, output=output)
    before = outputs.shards(output)
    with pytest.raises(ConfigError, match=r"--input no longer names .*/in, so 1 finished shard of .* add --yes"):
        embed(input=one, output=output)
    with pytest.raises(ConfigError, match="--limit-rows=3 leaves out rows"):
        embed(input=both, output=output, limit_rows=3)
    assert outputs.shards(output) == before
    with pytest.raises(ConfigError, match="add --yes"):
        embed(input=one, output=output, dry_run=True)
    assert embed(input=one, output=output, yes=True).status == "complete"
    assert outputs.table(output)["id"].to_pylist() == list(range(10))
    embed(input=[one, str(tmp_path / "in" / "part-1.parquet")], output=output)
    with pytest.raises(ConfigError, match=r"--input no longer names .*part-1\.parquet"):  # inputs that came later are guarded too
        embed(input=one, output=output)


def test_input_on_one_store_and_output_on_the_other(embed: Embed, s3: S3Server, tmp_path: Path) -> None:
    bucket, elsewhere = s3.folder(), str(tmp_path / "disk")
    corpus = corpora.plain(rows=12, files=1)
    embed(input=corpus.write(f"{bucket}/in"), output=elsewhere)
    assert outputs.table(elsewhere)["id"].to_pylist() == [row["id"] for row in corpus.rows]
    embed(input=corpus.write(tmp_path / "in"), output=f"{bucket}/out")
    assert outputs.table(f"{bucket}/out")["embedding"].to_pylist() == outputs.table(elsewhere)["embedding"].to_pylist()


def test_a_dry_run_touches_nothing(embed: Embed, tmp_path: Path) -> None:
    source = corpora.plain(rows=25, files=1, row_group_rows=5).write(tmp_path / "in")
    summary = embed(input=source, output=str(tmp_path / "out"), dry_run=True, limit_rows=22)
    assert (summary.status, summary.units_pending, summary.rows_pending) == ("planned", 3, 22)
    assert {key: summary.plan[key] for key in ("source files", "rows", "units to do")} == {
        "source files": 1,
        "rows": 22,
        "units to do": 3,
    }
    assert not (tmp_path / "out").exists()


def test_the_summary_is_also_written_where_it_is_asked_for(embed: Embed, storage_root: str, tmp_path: Path) -> None:
    source = corpora.plain(rows=4, files=1).write(tmp_path / "in")
    summary = embed(input=source, output=str(tmp_path / "out"), json_summary=f"{storage_root}/report/summary.json")
    assert outputs.document(storage_root, "report/summary.json") == json.loads(summary.document())


def test_a_summary_that_cannot_be_written_is_told_before_anything_runs(embed: Embed, tmp_path: Path) -> None:
    source, output = corpora.plain(rows=4, files=1).write(tmp_path / "in"), str(tmp_path / "out")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=rf"^writing {tmp_path}/file failed: {tmp_path}/file is not a folder; check the path$"):
        embed(input=source, output=output, json_summary=f"{tmp_path}/file/summary.json")
    assert not Path(output).exists()


def test_a_summary_that_fails_at_the_end_leaves_the_run_complete(embed: Embed, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source, output = corpora.plain(rows=4, files=1).write(tmp_path / "in"), str(tmp_path / "out")
    (tmp_path / "summary.json").mkdir()
    summary = embed(input=source, output=output, json_summary=f"{tmp_path}/summary.json", report="yes")
    assert (summary.status, summary.exit_code) == ("complete", 0)
    assert any(said.startswith(f"--json-summary is not there: writing {tmp_path}/summary.json failed: ") for said in caplog.messages)
    assert Path(output, "_control", "runs", summary.run, "report.html").exists()


@pytest.mark.parametrize("pattern", ["*", "o*", "*/data", "?ut/d*"])
def test_a_glob_that_matches_the_output_is_refused(embed: Embed, tmp_path: Path, pattern: str) -> None:
    """Each run would embed what the last one wrote, and add it to the output."""
    corpora.plain(rows=4, files=1).write(tmp_path / "in")
    with pytest.raises(ConfigError, match="lies inside --input"):
        embed(input=f"{tmp_path}/{pattern}", output=str(tmp_path / "out"))


def test_a_glob_that_reaches_into_the_output_is_refused(embed: Embed, tmp_path: Path) -> None:
    corpora.plain(rows=4, files=1).write(tmp_path / "in" / "deep")
    options: dict[str, Any] = {"input": f"{tmp_path}/*/*/*.parquet", "output": str(tmp_path / "out"), "keep_columns": ["text"]}
    assert embed(**options).rows_out == 4
    with pytest.raises(
        ConfigError, match=r"/out/data/.*\.parquet lies where --output .*/out puts its shards and would be read as corpus; "
    ):
        embed(**options)


def test_files_that_disagree_on_a_type_are_told_of(embed: Embed, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = pa.array(["a text", "another"])
    for number, (ids, texts) in enumerate(
        [([1, 2], text), (["3", "4"], text.dictionary_encode()), (["5", "6"], text.cast("large_string"))]
    ):
        pq.write_table(pa.table({"id": ids, "text": texts}), tmp_path / f"{number}.parquet")
    summary = embed(input=f"{tmp_path}/*.parquet", output=str(tmp_path / "out"), keep_columns=["text"])
    assert summary.rows_out == 6
    [said] = [said for said in caplog.messages if "column" in said]
    assert re.fullmatch(
        r"column 'id' is (int64|string) in \S+\.parquet and (int64|string) in \S+\.parquet, so the output's shards cannot be read as one "
        "table; cast it in the source, or leave it out",
        said,
    )


def test_rows_without_an_id_are_told_of(embed: Embed, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pq.write_table(pa.table({"id": [1, None, 3], "text": ["a", "b", "c"]}), tmp_path / "a.parquet")
    summary = embed(input=str(tmp_path / "a.parquet"), output=str(tmp_path / "out"))
    assert (summary.rows_out, summary.status) == (3, "complete")
    assert any("rows whose 'id' is null have vectors without an id" in said for said in caplog.messages)
