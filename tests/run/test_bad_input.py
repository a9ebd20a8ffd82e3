"""Whole runs over rows, files and names that are not as they should be."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from sentence_transformers import SentenceTransformer

from embedding import Summary
from embedding.errors import CorpusError
from tests.run.conftest import Embed
from tests.support import corpora, outputs

TEN_MEGABYTES = 10_000_000
CUT = corpora.plain(rows=6, files=1).files["part-0.parquet"][:-9]
DAMAGED = {"empty.parquet": b"", "garbage.parquet": b"no Parquet at all", "cut.parquet": CUT}


def failed_files(summary: Summary) -> dict[str, object]:
    return {str(failure["source"]).rpartition("/")[2]: failure["rows"] for failure in summary.failures}


def test_files_that_cannot_be_read_are_set_aside(embed: Embed, storage_root: str) -> None:
    source, output = f"{storage_root}/in", f"{storage_root}/out"
    corpora.plain(rows=20, files=2).write(source)
    embed(input=source, output=output)
    before = outputs.versions(output)
    fs, path = outputs.filesystem(source)
    sound = fs.cat_file(f"{path}/part-1.parquet")
    new = corpora.parquet(pa.table({"id": [90], "text": ["new"]}))
    for name, data in {**DAMAGED, "part-1.parquet": sound[:-1], "new.parquet": new}.items():
        fs.pipe_file(f"{path}/{name}", data)

    with pytest.raises(CorpusError, match="is not a readable Parquet file"):
        embed(input=source, output=output, bad_rows="fail")
    planned = embed(input=source, output=output, dry_run=True)
    assert (planned.plan["unreadable files"], planned.plan["stale shards"], planned.units_pending) == (4, 0, 1)
    for _ in range(2):  # a run that has nothing left but such files fails too
        summary = embed(input=source, output=output)
        assert (summary.status, summary.exit_code, summary.files_failed, summary.units_failed) == ("failed units", 3, 4, 0)
        assert failed_files(summary) == dict.fromkeys([*DAMAGED, "part-1.parquet"])
        assert "_SUCCESS" not in outputs.files(output)
        # What part-1 gave while it was whole stays until it can be planned again.
        assert before.items() <= outputs.versions(output).items()
        assert len(outputs.shards(output)) == len(before) + 1

    for name in DAMAGED:
        fs.rm_file(f"{path}/{name}")
    fs.pipe_file(f"{path}/part-1.parquet", sound)
    assert embed(input=source, output=output).status == "complete"
    assert sorted(outputs.table(output)["id"].to_pylist()) == [*range(20), 90]


def test_rows_that_cannot_be_embedded_fail_their_unit_if_asked(embed: Embed, tmp_path: Path) -> None:
    texts = [*corpora.sentences(13), None, "end", None]
    corpora.Corpus({"a.parquet": corpora.parquet(pa.table({"id": range(16), "text": texts}))}, []).write(tmp_path / "in")
    options: dict[str, Any] = {"input": str(tmp_path / "in"), "output": str(tmp_path / "out"), "unit_rows": 4}

    summary = embed(**options, bad_rows="fail")

    assert (summary.status, summary.rows_out, summary.rows_rejected, summary.rows_failed) == ("failed units", 12, 0, 4)
    [failure] = summary.failures
    assert (failure["first_row"], failure["rows"]) == (12, 4)
    remedy = "correct the source, or set --bad-rows reject to list such rows and continue"
    reason = f"2 rows cannot be embedded, the first being row 13: text is null; {remedy}"
    assert failure["reason"] == reason  # no attempts: the next would end the same
    assert not outputs.files(str(tmp_path / "out"), "_control/rejected")

    summary = embed(**options)  # not in the fingerprint: the same output goes on
    assert (summary.status, summary.rows_skipped, summary.rows_out, summary.rows_rejected) == ("complete", 12, 2, 2)


PLANES = ["".join(map(chr, range(plane << 16, (plane << 16) + 0x10000, 61))) for plane in range(17)]
SHORT = [
    *("", " ", "\t\n\r ", "\0", "nul\0inside", "\ufeff", "\u200b" * 300, "a" + "\u0301" * 100_000),
    *("[CLS]", "[SEP] [PAD] [MASK]", "</s> <s> <pad>", "[CLS][CLS] text [SEP]", "## ##s ##ing", "a [SE P] [UNK]"),
    *("\u202eright to left\u202c \u2066and back\u2069", "שלום עולם " * 2000, "العربية " * 2000, "👩‍👩‍👧‍👦" * 500, "नमस्ते दुनिया " * 800),
    *(plane.encode(errors="ignore").decode() for plane in PLANES),
]
LONG = [unit * (TEN_MEGABYTES // len(unit.encode())) for unit in ("x", "no,space.at;all", "漢字", "[", "\n", "слово ", "[CLS]")]
"""10 MB each; their first 100,000 characters give the same tokens, and the reference reads those in less than minutes."""
NO_UTF8 = [b"\xed\xa0\x80 lone surrogate", b"cut \xe6\x97", b"\xff\xfe", b"over\xc0\xaflong", PLANES[0].encode(errors="surrogatepass")]


@pytest.mark.timeout(600)
def test_hostile_texts_get_the_reference_vectors_or_are_rejected(embed: Embed, tmp_path: Path, packaged_model: Path) -> None:
    good = [*SHORT, *LONG]
    texts = pa.array([*(text.encode() for text in good), *NO_UTF8], pa.binary()).view(pa.string())
    corpora.Corpus({"a.parquet": corpora.parquet(pa.table({"id": range(len(texts)), "text": texts}))}, []).write(tmp_path / "in")
    output = str(tmp_path / "out")

    summary = embed(input=str(tmp_path / "in"), output=output, model=str(packaged_model), unit_rows=100)

    assert (summary.status, summary.rows_in, summary.rows_out, summary.rows_rejected) == ("complete", len(texts), len(good), len(NO_UTF8))
    rejected = outputs.control(output, "rejected")
    assert rejected["row_index"].to_pylist() == list(range(len(good), len(texts)))
    assert set(rejected["reason"].to_pylist()) == {"text is not valid UTF-8"}
    found = outputs.table(output)
    assert found["id"].to_pylist() == list(range(len(good)))
    reference = SentenceTransformer(str(packaged_model), device="cpu")
    expected = reference.encode([*SHORT, *(text[:100_000] for text in LONG)], batch_size=8)
    np.testing.assert_allclose(np.array(found["embedding"].to_pylist(), np.float32), expected, atol=2e-5)


@pytest.mark.parametrize("unit", ["x", "some ordinary words, ", "漢字"])
def test_a_long_text_costs_a_few_copies_of_itself(unit: str, tmp_path: Path, packaged_model: Path) -> None:
    """From the file to the tokens, both stages together: the page, the column, its stream, the Python string, the tokenizer's own."""
    size = 32_000_000
    text = unit * (size // len(unit.encode()))
    for name, value in (("long.parquet", text), ("small.parquet", "x")):
        (tmp_path / name).write_bytes(corpora.parquet(pa.table({"text": [value]}), codec="none"))
    command = [sys.executable, "-m", "tests.run.long_text", str(tmp_path / "long.parquet"), str(packaged_model)]
    found = json.loads(subprocess.run(command, capture_output=True, check=True, timeout=250).stdout)
    assert 1.0 < found["grown"] / size < 10.0


def test_names_cannot_lead_out_of_the_output(embed: Embed, tmp_path: Path) -> None:
    """Folders, files and columns with names that are paths, commands or escapes of something else."""
    folders = ["a=..", "a=..%2F..%2Fx", "k=$(touch x)", "b=..\\..\\x", "~", "-rf", "c=;rm"]
    names = ["-.parquet", "a\nb.parquet", "%2f..%2f..%2fx.parquet"]
    column = "../../../escaped"
    files = {}
    for number, path in enumerate(f"{folder}/{name}" for folder in folders for name in names):
        files[path] = corpora.parquet(pa.table({"id": [number], "text": ["one"], column: [number]}))
    root, output = tmp_path / "deep" / "er" / "in", tmp_path / "deep" / "er" / "out"
    corpora.Corpus(files, []).write(root)
    before = set(tmp_path.rglob("*"))

    summary = embed(input=str(root), output=str(output), keep_columns=[column])

    assert (summary.status, summary.rows_out) == ("complete", len(files))
    assert {path for path in tmp_path.rglob("*") if not path.is_relative_to(output)} == before
    assert {path.name for path in output.iterdir()} == {"data", "_control", "_SUCCESS"}
    assert all(path.resolve().is_relative_to(output / "data") for path in (output / "data").rglob("*"))
    assert column in outputs.table(str(output)).column_names
