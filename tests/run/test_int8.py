"""Outputs of int8: the ranges are settled once, are in every footer, and are what a reader, a proof and a report go by."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from sentence_transformers.util import quantize_embeddings

from docs.tables import README
from embedding.corpus.ledger import read_ledger
from embedding.corpus.output import Output
from embedding.corpus.plan import SourceLayout
from embedding.corpus.review import sample_shards
from embedding.corpus.shards.parquet import PARQUET
from embedding.corpus.sources import Source
from embedding.errors import ConfigError, CorpusError, SettingsChangedError
from embedding.run.calibrator import calibration_sample
from embedding.run.proof.verify import compare_steps
from embedding.run.report.vectors import study
from embedding.run.summary import CLIPPED_SHARE
from tests.model.tiny import TEXTS, save_model
from tests.run.conftest import Embed
from tests.run.here import embed_here, found, prove_here
from tests.support import corpora, outputs
from tests.support.pages import fenced

ROWS = 40


@pytest.fixture
def source(tmp_path: Path) -> str:
    return corpora.Corpus({"a.parquet": corpora.parquet(pa.table({"id": range(ROWS), "text": TEXTS[:ROWS]}))}, []).write(tmp_path / "in")


def values(output: str, column: str = "embedding") -> NDArray[Any]:
    return np.array(outputs.table(output)[column].to_pylist())


def ranges(output: str, column: str = "embedding") -> NDArray[np.float32]:
    """As a reader finds them, who has no more than a shard."""
    [*_, file] = Path(output, "data").iterdir()
    return np.array(json.loads(pq.read_metadata(file).metadata[b"embedding.calibration"])[column], np.float32)


def record_of(output: str, shard: str) -> dict[str, Any]:
    """What a shard's footer counts."""
    return dict(PARQUET.facts(io.BytesIO(Path(output, shard).read_bytes()))["record"])


def clipped(output: str, shard: str) -> int:
    """Numbers of a shard that its ranges do not hold, as the ledger and the shard itself count them."""
    ledger = read_ledger(Output(output).storage, ["shard", "clipped"])
    [listed] = ledger.filter(pc.equal(ledger["shard"], shard))["clipped"].to_pylist()
    assert record_of(output, shard)["clipped"] == listed
    return int(listed)


def test_steps_of_the_ranges_of_the_corpus(source: str, tiny_model: Path, tmp_path: Path) -> None:
    """The sample is the whole of so small a corpus, so no number is outside of its range."""
    whole, output = str(tmp_path / "whole"), str(tmp_path / "out")
    embed_here(source, whole, tiny_model)
    names = embed_here(source, output, tiny_model, output_dtype="int8")
    vectors, measured = np.array(outputs.table(whole)["embedding"].to_pylist(), np.float32), ranges(output)
    np.testing.assert_allclose(measured, [vectors.min(axis=0), vectors.max(axis=0)], atol=1e-6)
    np.testing.assert_array_equal(values(output), quantize_embeddings(vectors, "int8", ranges=measured))
    assert [clipped(output, name) for name in names] == [0] * len(names)
    assert not any("clipped" in record_of(whole, name) for name in outputs.shards(whole))
    proof = prove_here(output)
    assert (proof.status, proof.details, proof.sampled) == ("proved", [], ROWS)
    assert proof.worst_cosine == pytest.approx(1, abs=1e-9)

    sample = sample_shards(Output(output).storage, names, rows=ROWS, seed="s", until=float("inf"))
    facts, plain = study(sample.vectors_RD, sample.rounding), study(vectors)
    assert facts.unit_length
    assert not study(sample.vectors_RD * np.float32(0.5), sample.rounding).unit_length
    assert facts.mean_cosine == pytest.approx(plain.mean_cosine, abs=0.01)
    assert 0 < sample.rounding < 0.02

    names_of_block: dict[str, Any] = {}
    [block] = [block.text for block in fenced(README.parent / "docs" / "models.md") if "def floats" in block.text]
    exec(block, names_of_block)
    back = np.concatenate([names_of_block["floats"]("embedding", Path(output, name)) for name in names])
    assert (np.abs(back - vectors) <= 0.501 * (measured[1] - measured[0]) / 255).all()


def test_a_resumed_run_makes_the_same_bytes(source: str, tiny_model: Path, tmp_path: Path) -> None:
    """Also where the corpus has grown, so that other ranges would be measured now."""
    output = str(tmp_path / "out")
    [first, *_] = embed_here(source, output, tiny_model, output_dtype="int8")
    settings, data = Output(output).settings(), Path(output, first).read_bytes()
    assert settings is not None
    Path(output, first).unlink()
    more = pa.table({"id": range(ROWS, 2 * ROWS), "text": ["x " * (1 + row % 7) for row in range(ROWS)]})
    pq.write_table(more, Path(source, "b.parquet"))
    again = embed_here(source, output, tiny_model, run="second", output_dtype="int8")
    assert first in again
    assert Path(output, first).read_bytes() == data
    kept = Output(output).settings()
    assert kept is not None
    assert (kept.calibration, kept.fingerprint) == (settings.calibration, settings.fingerprint)
    assert prove_here(output).status == "proved"  # b.parquet's numbers are outside of the ranges, and clipped
    whole = str(tmp_path / "whole")
    embed_here(source, whole, tiny_model)
    numbers = np.array(outputs.table(whole)["embedding"].to_pylist(), np.float32)[ROWS:]
    low, high = ranges(output)
    counted = [clipped(output, name) for name in again]
    assert counted[0] == 0 < counted[-1]
    margin = (high - low) / 255 / 100
    assert sum(counted) == ((numbers < low - margin) | (numbers > high + margin)).sum()
    with pytest.raises(SettingsChangedError, match=r'calibration: ".*" -> null; output_dtype: "int8" -> null'):
        embed_here(source, output, tiny_model)


def test_ranges_are_shared(source: str, tiny_model: Path, tmp_path: Path) -> None:
    """Of a file, or of another output, whose corpus is another one."""
    first, second, third = (str(tmp_path / name) for name in ("first", "second", "third"))
    embed_here(source, first, tiny_model, output_dtype="int8", dimensions=(20, 8))
    other = corpora.Corpus({"b.parquet": corpora.parquet(pa.table({"id": [1], "text": ["another"]}))}, []).write(tmp_path / "other")
    options: dict[str, Any] = {"output_dtype": "int8", "dimensions": (20, 8)}
    embed_here(other, second, tiny_model, calibration=first, **options)
    file = tmp_path / "ranges.npy"
    np.save(file, np.concatenate([ranges(first), ranges(first, "embedding_8")], axis=1, dtype=np.float64))
    embed_here(other, third, tiny_model, calibration=str(file), **options)
    assert [Path(second, name).read_bytes() for name in outputs.shards(second)] == list(outputs.shards(third).values())
    assert ranges(second).tolist() == ranges(first).tolist()
    assert prove_here(second).status == "proved"
    embed_here(other, second, tiny_model, **options)  # they are kept, though nobody says them again
    np.save(file, np.concatenate([ranges(first), ranges(first, "embedding_8")], axis=1) * 2)
    with pytest.raises(SettingsChangedError, match="calibration: "):
        embed_here(other, second, tiny_model, calibration=str(file), **options)


def test_ranges_that_are_refused(source: str, tiny_model: Path, tmp_path: Path) -> None:
    def refused(message: str, calibration: str | Path, **options: Any) -> None:
        with pytest.raises(ConfigError, match=message):
            embed_here(source, str(tmp_path / "out"), tiny_model, calibration=str(calibration), **({"output_dtype": "int8"} | options))

    refused("--calibration has no use with --output-dtype=float16, only with int8", "x.npy", output_dtype="float16")
    refused("ranges.npy does not exist", tmp_path / "ranges.npy")
    refused("is neither a .npy file nor an output of this job", tmp_path / "nothing")
    (tmp_path / "ranges.json").write_text("{}")
    refused("is neither a .npy file nor an output of this job", tmp_path / "ranges.json")
    plain = str(tmp_path / "plain")
    embed_here(source, plain, tiny_model)
    refused("is an output without int8 ranges", plain)
    embed_here(source, str(tmp_path / "other"), save_model(tmp_path / "model", "roberta"), output_dtype="int8")
    refused("is an output of another model", tmp_path / "other")
    file = tmp_path / "ranges.npy"
    for array, message in (
        (np.zeros((2, 31)), r"contains float64 \(2, 31\), not the minimum and maximum of 32 numbers, shape \(2, 32\)"),
        (np.array([["a"] * 32] * 2), "contains <U1"),
        (np.zeros((2, 32)), "does not fit the vectors: the range of dimension 0 of embedding is 0 to 0, too narrow for 255 steps"),
        (np.array([[0] * 32, [np.inf] * 32]), "does not fit the vectors: .*not finite"),
        (np.array([[0] * 32, [1e60] * 32]), "does not fit the vectors: .*not finite"),
    ):
        np.save(file, array)
        refused(message, file)
    file.write_bytes(b"nonsense")
    refused("is not a .npy file that numpy can read", file)
    np.save(file, np.array([{}]), allow_pickle=True)
    refused("is not a .npy file that numpy can read", file)
    assert not (tmp_path / "out").exists()


def test_a_proof_finds_what_is_wrong(source: str, tiny_model: Path, tmp_path: Path) -> None:
    output = str(tmp_path / "out")
    [name, *_] = embed_here(source, output, tiny_model, output_dtype="int8")
    file = Path(output, name)
    data, footer, table = file.read_bytes(), PARQUET.facts(file.open("rb")), pq.read_table(file).replace_schema_metadata(None)
    place = table.column_names.index("embedding")

    def with_vectors(vectors: pa.ChunkedArray) -> bytes:
        return PARQUET.encode(table.set_column(place, table.schema.field("embedding"), vectors), footer)

    file.write_bytes(with_vectors(table["embedding"].take([1, 0, *range(2, len(table))])))
    assert found(prove_here(output)) == {("wrong vector", name)}
    kind = table.schema.field("embedding").type
    nought = pa.FixedSizeListArray.from_arrays(pa.array(np.full(len(table) * 32, 0, np.int8)), type=kind)
    file.write_bytes(with_vectors(pa.chunked_array([nought])))
    assert found(prove_here(output, sample=0)) == {("wrong norm", name)}
    other = {"embedding": [[low - 1 for low in footer["calibration"]["embedding"][0]], footer["calibration"]["embedding"][1]]}
    file.write_bytes(PARQUET.encode(table, footer | {"calibration": other}))
    assert found(prove_here(output, sample=0)) == {("wrong provenance", name)}
    file.write_bytes(data)
    assert prove_here(output).status == "proved"
    job = Path(output, "_control/job.json")
    document = json.loads(job.read_text())
    job.write_text(json.dumps(document | {"calibration": other}))
    with pytest.raises(ConfigError, match="its calibration is not the one that it was started with"):
        Output(output).settings()


def test_steps_bound_the_cosine() -> None:
    """Nothing is lost inside of a step; outside of it, it is the distance to the step that counts."""
    ranges_2D = np.array([[-1.0] * 2, [1.0] * 2], np.float32)
    step = 2 / 255
    values_D = np.array([100, 127], np.int8)
    inside = np.array([-1 + 228.9 * step, 5.0])
    assert compare_steps(values_D, inside, ranges_2D) == pytest.approx((1, 1))
    right = np.array([-1 + 230 * step, 1.0])
    nearest = np.array([-1 + 229 * step, 1.0])
    cosine = right @ nearest / np.linalg.norm(right) / np.linalg.norm(nearest)
    assert compare_steps(values_D, right, ranges_2D)[0] == pytest.approx(cosine, abs=1e-7)
    assert compare_steps(-values_D, right, ranges_2D)[0] < 0


def test_the_sample_is_from_everywhere() -> None:
    layouts = [
        SourceLayout(Source(f"{n}.parquet", f"file:///in/{n}.parquet", 10 * rows, "1"), (rows,))
        for n, rows in enumerate([50_000, 0, 9, 7_000])
    ]
    sample = calibration_sample(layouts, "cpu", None)
    assert calibration_sample(layouts, "cpu", None) == sample
    assert (len(sample), {unit.num_rows for unit in sample} <= {32, 9}) == (64, True)
    files = [sum(unit.source.path == layout.source.path for unit in sample) for layout in layouts]
    assert files == [56, 0, 0, 8]
    firsts = [unit.first_row for unit in sample[:56]]
    assert firsts == sorted(firsts)
    assert np.diff(firsts).max() < 2 * 57_009 / 64
    assert {unit.source.path for unit in calibration_sample(layouts, "cpu", 10_000)} == {"0.parquet"}
    small = calibration_sample(layouts[2:3], "cpu", None)
    assert [(unit.first_row, unit.num_rows) for unit in small] == [(0, 9)]
    assert calibration_sample(layouts[1:2], "cpu", None) == []
    assert {unit.num_rows for unit in calibration_sample([SourceLayout(Source("a", "file:///a", 2**30, "1"), (1024,))], "cpu", None)} == {1}


def test_a_whole_run(embed: Embed, source: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Told by a dry run, measured on the cluster, kept, and the same in every run; that it does not fit the whole corpus is told."""
    output = str(tmp_path / "out")
    options: dict[str, Any] = {"input": source, "output": output, "output_dtype": "int8", "dimensions": [20, 8], "normalize": "yes"}
    plan: dict[str, Any] = embed(**options, dry_run=True, rate=1).plan
    assert (plan["shard bytes"], plan["settings"]["calibration"]) == (28 * ROWS, "to be measured")
    begun = embed(**options, limit_rows=10)
    assert (begun.clipped_numbers, begun.clipped_share) == (0, 0)
    settings = Output(output).settings()
    assert settings is not None
    assert settings.measured["calibration_rows"] == 10
    with caplog.at_level(logging.WARNING):
        second = embed(**options)
    assert second.status == "complete"
    assert CLIPPED_SHARE < second.clipped_share == round(second.clipped_numbers / (28 * second.rows_out), 6)
    [warning] = [record.message for record in caplog.records if "clipped" in record.message]
    assert warning == second.warning
    assert embed(**options, dry_run=True).plan["fingerprint"] == settings.fingerprint
    for column in ("embedding", "embedding_8"):
        assert ranges(output, column).tolist() == np.array(settings.calibration[column], np.float32).tolist()
    assert prove_here(output).status == "proved"


def test_a_corpus_that_has_nothing_to_measure(embed: Embed, tmp_path: Path) -> None:
    table = pa.table({"id": [1, 2], "text": pa.array([None, None], pa.string())})
    source = corpora.Corpus({"a.parquet": corpora.parquet(table)}, []).write(tmp_path / "in")
    with pytest.raises(CorpusError, match="no text of the sample could be embedded to measure the int8 ranges; provide them with --cal"):
        embed(input=source, output=str(tmp_path / "out"), output_dtype="int8")
    assert Output(str(tmp_path / "out")).settings() is None
