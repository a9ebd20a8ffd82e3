"""What a dry run tells: tokens from a sample and how far off they may be, time, cost, and every refusal; and that it leaves nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pytest

from embedding import JobConfig, Summary, embed_corpus
from embedding.corpus.lease import Lease
from embedding.corpus.output import Output
from embedding.corpus.plan import Unit, plan_units
from embedding.corpus.reader import Columns, read_layouts
from embedding.corpus.sources import list_sources
from embedding.errors import ConfigError, OutputBusyError
from embedding.model.spec import LongTexts, ModelSpec, resolve_model
from embedding.model.tokenizer import Tokenizer
from embedding.run.estimate import sample_texts
from embedding.run.foretold import lines
from tests.run.conftest import Embed
from tests.support import corpora, outputs
from tests.support.job import run_job
from tests.support.s3_server import S3Server

DryRun: TypeAlias = Callable[..., Summary]


@pytest.fixture
def model(tiny_model: Path) -> ModelSpec:
    return resolve_model(JobConfig(input=("x",), output="x", model=str(tiny_model)), precision="fp32")


@pytest.fixture
def dry_run(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> DryRun:
    """`dry_run(input=..., output=..., **options)` on this machine, in this process; it may not start Ray."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray.init", None)

    def run(**options: Any) -> Summary:
        defaults = {"model": str(tiny_model), "id_column": "id", "unit_rows": 10, "dry_run": True}
        return embed_corpus(JobConfig.build(input=(options.pop("input"),), **(defaults | options)))

    return run


def units_of(folder: str, unit_rows: int = 100) -> list[Unit]:
    return list(plan_units(read_layouts(list_sources([folder]), Columns("text")), unit_rows=unit_rows, fingerprint="f"))


def write(folder: Path, texts: list[str | None], files: int = 3) -> str:
    """A corpus of files with as many rows each."""
    table, rows = pa.table({"id": range(len(texts)), "text": pa.array(texts, pa.string())}), len(texts) // files
    parts = {f"{number}.parquet": corpora.parquet(table.slice(number * rows, rows), row_group_rows=70) for number in range(files)}
    return corpora.Corpus(parts, []).write(folder)


def test_few_rows_are_all_counted(tmp_path: Path, model: ModelSpec) -> None:
    texts: list[str | None] = [f"{number} {'word ' * number}" for number in range(300)]
    texts[5] = texts[250] = None
    found = sample_texts(units_of(write(tmp_path, texts)), model, Columns("text"), "seed")
    truth = Tokenizer(model, model.source.folder(()))([text for text in texts if text is not None])
    assert found is not None
    assert (found.rows, found.tokens_error) == (300, 0)
    assert found.tokens_per_row == pytest.approx(truth.lengths.sum() / 300)
    assert truth.truncated.any()
    assert found.truncated_share == found.long_share == pytest.approx(truth.truncated.sum() / 300)
    assert found.rejected_share == pytest.approx(2 / 300)


def test_long_texts_count_as_what_becomes_of_them(tmp_path: Path, model: ModelSpec) -> None:
    texts = ["a few words", "word " * (3 * model.max_tokens)] * 30
    units = units_of(write(tmp_path, [*texts]))
    chunked = sample_texts(units, model, Columns("text"), "seed", LongTexts("chunk"))
    rejected = sample_texts(units, model, Columns("text"), "seed", LongTexts("reject"))
    assert chunked is not None
    assert rejected is not None
    assert chunked.tokens_per_row * 60 == chunked.tokens.lengths.sum() > 30 * 3 * model.max_tokens
    assert (chunked.truncated_share, chunked.rejected_share, chunked.long_share) == (0, 0, 0.5)
    assert (rejected.truncated_share, rejected.rejected_share, rejected.long_share) == (0, 0.5, 0.5)
    assert chunked.windows_per_row * 60 == len(chunked.tokens.lengths) > 30 * 4


def test_the_error_is_as_large_as_it_says(tmp_path: Path, model: ModelSpec) -> None:
    """Lengths that differ from file to file and are alike within one: what misleads a sample, and makes its error larger."""
    chance = np.random.default_rng(0)
    lengths = np.concatenate([chance.poisson(mean, 1200) for mean in (5, 20, 60)])
    units = units_of(write(tmp_path, ["word " * length for length in lengths]))
    tokenizer = Tokenizer(model, model.source.folder(()))
    truth = tokenizer(["word " * length for length in lengths]).lengths.mean()
    samples = [sample_texts(units, model, Columns("text"), str(seed)) for seed in (*range(12), 0)]
    *off, again = [(sample.tokens_per_row - truth) / sample.tokens_error for sample in samples if sample is not None]
    assert len(set(off)) == 12
    assert again == off[0]
    assert max(map(abs, off)) < 3
    assert 0.2 < np.std(off) < 2


def test_what_cannot_be_read_is_said_and_left_out(tmp_path: Path, model: ModelSpec) -> None:
    folder = write(tmp_path, ["the same words"] * 300)
    units = units_of(folder)
    for name in ("0.parquet", "1.parquet"):
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[:4] + b"\xff" * 400 + data[404:])
    units = units_of(folder)
    found = sample_texts(units, model, Columns("text"), "seed")
    assert found is not None
    assert found.rows == 100
    assert "0.parquet" in found.unreadable
    assert sample_texts([unit for unit in units if "2.parquet" not in unit.source.uri], model, Columns("text"), "seed") is None


def test_a_dry_run_starts_no_ray_and_writes_nothing(tmp_path: Path, tiny_model: Path) -> None:
    source, output = write(tmp_path / "in", ["some words"] * 60), tmp_path / "out"
    named = ["--input", source, "--output", str(output), "--model", str(tiny_model), "--json-summary", str(tmp_path / "summary.json")]
    result = run_job(*named, "--unit-rows", "20", "--dry-run", env={"RAY_ADDRESS": ""})
    plan = json.loads((tmp_path / "summary.json").read_text())["plan"]
    assert not output.exists()
    assert "starting Ray" not in result.stderr
    assert (plan["tokens to do"], plan["standard error of tokens"], plan["rows sampled"]) == (60 * plan["tokens a row"], 0, 60)
    assert plan["shard bytes"] == 60 * 32 * 4
    assert plan["tokens a second"] > 0
    assert plan["rate"].startswith("measured on this machine by encoding the sample")
    assert plan["cost"] is None
    block, _, last = result.stdout.rstrip().rpartition("\n")
    assert block.splitlines() == list(lines(plan))
    assert json.loads(last)["status"] == "planned"
    assert "tokens      480, counted in every row; 8.0 per row" in block


@pytest.mark.parametrize(("dtype", "vector_bytes"), [("float16", 64), ("binary", 4)])
def test_bytes_are_those_of_the_numbers_that_are_stored(dry_run: DryRun, tmp_path: Path, dtype: str, vector_bytes: int) -> None:
    source = write(tmp_path / "in", ["some words"] * 60)
    plan = dry_run(input=source, output=str(tmp_path / "out"), output_dtype=dtype, rate=1).plan
    assert (plan["shard bytes"], plan["shard bytes measured"]) == (60 * vector_bytes, False)


def test_time_and_cost_at_a_rate_that_is_given(dry_run: DryRun, tmp_path: Path) -> None:
    source = write(tmp_path / "in", ["some words"] * 60)
    options = {"gpus_per_worker": 1, "workers": "1:4", "rate": 0.1, "gpu_hour_price": 3.0}
    plan: dict[str, Any] = dry_run(input=source, output=str(tmp_path / "out"), **options).plan
    tokens = plan["tokens to do"]
    assert plan["seconds"] == pytest.approx(tokens / 0.1 / 4)
    assert plan["GPU hours"] == pytest.approx(tokens / 0.1 / 3600)
    assert plan["cost"] == pytest.approx(3 * tokens / 0.1 / 3600, abs=0.005)
    assert any("GPU hours, cost 4.00; startup" in line for line in lines(plan))


def test_hardware_that_is_not_here_is_not_guessed_at(dry_run: DryRun, tmp_path: Path) -> None:
    source = write(tmp_path / "in", ["some words"] * 60)
    plan = dry_run(input=source, output=str(tmp_path / "out"), gpus_per_worker=1, workers="1:4").plan
    assert (plan["seconds"], plan["tokens a second"], plan["cost"]) == (None, None, None)
    assert any(line.startswith("time        unknown (nothing was measured on such hardware; set --rate") for line in lines(plan))


def test_a_corpus_of_one_unit_is_counted_exactly(dry_run: DryRun, tmp_path: Path) -> None:
    plan = dry_run(input=write(tmp_path / "in", ["some words"] * 3, files=1), output=str(tmp_path / "out")).plan
    assert (plan["units to do"], plan["rows sampled"], plan["standard error of tokens"]) == (1, 3, 0)
    assert "tokens      24, counted in every row; 8.0 per row" in list(lines(plan))


@pytest.mark.parametrize(
    ("error", "told"), [(None, " (of unknown accuracy)"), (0, " ± 0 (standard error)"), (1200, " ± 1,200 (standard error)")]
)
def test_what_is_estimated_is_not_called_counted(dry_run: DryRun, tmp_path: Path, error: int | None, told: str) -> None:
    plan = dry_run(input=write(tmp_path / "in", ["some words"] * 3, files=1), output=str(tmp_path / "out")).plan
    plan |= {"rows to do": 3000, "tokens to do": 24_000, "standard error of tokens": error}
    assert f"tokens      24,000{told}, estimated from 3 rows; 8.0 per row" in list(lines(plan))


def test_a_corpus_that_is_too_small_tells_no_rate(dry_run: DryRun, tmp_path: Path) -> None:
    source, output = write(tmp_path / "in", ["some words"] * 30), str(tmp_path / "out")
    plan = dry_run(input=source, output=output).plan
    assert plan["tokens to do"] == 240
    assert (plan["seconds"], plan["tokens a second"], plan["too small to measure"]) == (None, None, True)
    assert "time        unknown (the corpus is too small to measure)" in list(lines(plan))
    assert dry_run(input=source, output=output, rate=10).plan["seconds"] == 24


def test_an_earlier_run_on_the_output_is_the_measure(embed: Embed, tmp_path: Path) -> None:
    source, output = write(tmp_path / "in", ["some words"] * 60), str(tmp_path / "out")
    first = embed(input=source, output=output, limit_rows=40)
    plan: dict[str, Any] = embed(input=source, output=output, dry_run=True).plan
    assert (plan["units done"], plan["rows to do"], plan["kept from"]) == (4, 20, "this output's first run")
    assert (plan["rate"], plan["tokens a second"]) == (f"the rate of run {first.run} with 1 worker", round(first.tokens_per_second))
    shards = outputs.shards(output).values()
    assert (plan["shard bytes"], plan["shard bytes measured"]) == (round(20 * sum(map(len, shards)) / 40), True)
    assert plan["place"] == "the running cluster"
    done: dict[str, Any] = embed(input=f"{source}/0.parquet", output=output, dry_run=True, yes=True).plan
    assert done["units to do"] == 0
    assert not [line for line in lines(done) if line.startswith(("tokens", "time"))]


def test_rows_without_any_text(dry_run: DryRun, tmp_path: Path) -> None:
    plan = dry_run(input=write(tmp_path / "in", [None] * 6), output=str(tmp_path / "out")).plan
    assert (plan["tokens to do"], plan["rejected share"], plan["seconds"]) == (0, 1, None)
    assert "texts       0.0% longer than max_tokens, 100.0% cannot be embedded" in list(lines(plan))


def test_an_output_that_is_held_is_told_now(dry_run: DryRun, tmp_path: Path) -> None:
    source, output = write(tmp_path / "in", ["some words"] * 6), str(tmp_path / "out")
    with Lease.acquire(Output(output).storage, "other", 30.0):
        before = outputs.files(output)
        with pytest.raises(OutputBusyError, match="is held by run other on "):
            dry_run(input=source, output=output)
        assert outputs.files(output) == before
    assert dry_run(input=source, output=output).status == "planned"


def test_an_output_that_cannot_be_written_is_told_now(dry_run: DryRun, tmp_path: Path, s3: S3Server) -> None:
    source = write(tmp_path / "in", ["some words"] * 6)
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(ConfigError, match=r"/file failed: .*/file is not a folder; check the path"):
        dry_run(input=source, output=str(tmp_path / "file"))
    with pytest.raises(ConfigError):
        dry_run(input=source, output="s3://no-such-bucket/out")
    folder = s3.folder()
    assert dry_run(input=source, output=folder).status == "planned"
    assert outputs.files(folder) == {}
