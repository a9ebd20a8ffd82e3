"""Sizes that a user leaves open: measured once, for a new output of a large corpus, recorded, and kept."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from embedding.corpus.plan import SourceLayout
from embedding.corpus.reader import Columns, read_layouts
from embedding.corpus.sources import Source, list_sources
from embedding.errors import CorpusError
from embedding.model.measure import Measured, Trial
from embedding.model.spec import TRUNCATE, LongTexts
from embedding.run import pipeline
from embedding.run.probe import Findings, Probe, ProbeJob, sample_units
from embedding.run.sizes import batch_tokens, unit_rows
from tests.model.tiny import WIDTH, spec_of
from tests.run.conftest import Embed
from tests.support import corpora, outputs

WORTH = 8 * 2_048
"""Rows of a corpus that is not yet worth measuring on a CPU."""
OPEN: dict[str, Any] = {"unit_rows": "auto", "batch_tokens": "auto"}
DEFAULTS = {"unit_rows": 2_048, "batch_tokens": 1_024}


def findings(rows_per_second: float, row_bytes: float = 2_000.0) -> Findings:
    return Findings("GPU", 1000, row_bytes, Measured(4096, 1.0, rows_per_second, (Trial(4096, 1.0, fits=True),), in_time=True))


@pytest.mark.parametrize(
    ("found", "rows", "workers", "expected"),
    [
        (findings(200), 10**9, 8, 2_048),  # 10.2 s
        (findings(10_000), 10**9, 8, 131_072),  # 13.1 s: below 2^28 bytes of 2,000
        (findings(100_000), 10**9, 8, 131_072),
        (findings(100_000, row_bytes=3_500), 10**9, 8, 65_536),
        (findings(100_000), 10**6, 8, 16_384),  # four units for each worker, and some more
        (findings(100_000), 20_000, 500, 512),  # small enough for any number of workers
        (findings(1_000, row_bytes=500), 10**10, 500, 8_192),
        (findings(1_000, row_bytes=500), 10**10, 800, 16_384),  # longer ones, since one driver feeds them all
        (findings(1_000, row_bytes=500), 10**10, 9_999, 16_384),
        (findings(3), 10**6, 8, 32),  # long texts, each cut into many
        (findings(5), 400, 1, 64),
        (findings(5), 400, 20, 8),  # two seconds, at least a row each
        (findings(0.01), 10**6, 8, 1),
        (findings(3, row_bytes=10_000_000), 10**6, 8, 16),  # whatever the pace, it must fit
        (findings(3, row_bytes=1e9), 10**6, 8, 1),
    ],
)
def test_a_unit_is_seconds_of_work_within_bounds(found: Findings, rows: int, workers: int, expected: int) -> None:
    assert unit_rows(found, rows=rows, workers=workers) == expected


@pytest.mark.parametrize("rate", [60, 200, 333, 1_000, 5_555])
def test_a_unit_is_five_to_twenty_seconds(rate: float) -> None:
    assert 5 <= unit_rows(findings(rate), rows=10**9, workers=8) / rate <= 20


@pytest.mark.parametrize(("in_time", "measured", "expected"), [(True, 512, 512), (False, 512, 2_048), (False, 4_096, 4_096)])
def test_a_batch_is_not_small_for_want_of_time(in_time: bool, measured: int, expected: int) -> None:
    assert batch_tokens(replace(findings(1).pace, batch_tokens=measured, in_time=in_time), 2_048) == expected


def layouts(*files: tuple[int, ...], row_bytes: int = 10) -> list[SourceLayout]:
    return [
        SourceLayout(Source(f"{number}.parquet", f"file:///in/{number}.parquet", row_bytes * sum(groups), "1"), groups)
        for number, groups in enumerate(files)
    ]


def ranges(sources: list[SourceLayout], device: str = "cpu", limit_rows: int | None = None) -> list[tuple[str, int, int]]:
    return sorted((unit.source.path, unit.first_row, unit.num_rows) for unit in sample_units(sources, device, limit_rows))


def test_the_sample_begins_where_row_groups_do() -> None:
    assert ranges(layouts((5, 0, 7), (), (9,))) == [("0.parquet", 0, 5), ("0.parquet", 5, 7), ("2.parquet", 0, 9)]
    assert ranges(layouts((5, 7), (9,)), limit_rows=8) == [("0.parquet", 0, 5), ("0.parquet", 5, 3)]
    assert ranges(layouts((10**6,))) == [("0.parquet", 0, 2_048)]
    assert ranges(layouts((10**6,)), "cuda") == [("0.parquet", 0, 16_384)]


def test_the_sample_is_spread_over_the_corpus() -> None:
    places = ranges(layouts(*[(100,) * 10] * 96))
    assert [path for path, _, _ in places] == sorted(f"{number}.parquet" for number in range(0, 96, 3))
    assert {rows for _, _, rows in places} == {64}  # 2,048 in 32 places


def test_the_sample_of_large_rows_is_small() -> None:
    assert ranges(layouts((1000,), row_bytes=2**17)) == [("0.parquet", 0, 8)]
    assert ranges(layouts((1000,), row_bytes=2**24)) == [("0.parquet", 0, 1)]


def probe_job(source: str, model: Path, columns: Columns) -> ProbeJob:
    sample = sample_units(list(read_layouts(list_sources([source]), columns)), "cpu", None)
    return ProbeJob(
        model=spec_of(model), columns=columns, sample=sample, batch_tokens=None, device="cpu", share=0.0, threads=1, long_text=TRUNCATE
    )


def test_a_sample_is_measured(tiny_model: Path, tmp_path: Path) -> None:
    """Rows without text are left out of it, and so is what cannot be read any more; what is copied counts with its bytes."""
    texts = [None, *corpora.sentences(599)]
    files = {name: pa.table({"text": texts, "more": ["x" * 1000] * 600}) for name in ("a.parquet", "b.parquet")}
    source = corpora.Corpus({name: corpora.parquet(table) for name, table in files.items()}, []).write(tmp_path / "in")
    job = probe_job(source, tiny_model, Columns("text", ("more",)))
    (tmp_path / "in" / "b.parquet").unlink()
    found = Probe(job).find()
    assert found.sample_rows == 599
    text_bytes = sum(len(text) for text in texts if text) / 599
    assert 1000 + text_bytes + 4 * WIDTH < found.row_bytes < 1.05 * (1000 + text_bytes + 4 * WIDTH)
    assert found.pace.batch_tokens in {trial.batch_tokens for trial in found.pace.trials}
    assert [trial.batch_tokens for trial in Probe(replace(job, batch_tokens=777)).find().pace.trials] == [777]
    (tmp_path / "in" / "a.parquet").unlink()
    with pytest.raises(CorpusError, match="no text of the sample could be read"):
        Probe(job).find()


def test_long_texts_make_a_smaller_sample(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embedding.run.probe._SAMPLE_CHARS", 64_000)
    source = corpora.Corpus({"a.parquet": corpora.parquet(pa.table({"text": ["word " * 1000] * 300}))}, []).write(tmp_path / "in")
    job = probe_job(source, tiny_model, Columns("text"))
    found = Probe(job).find()
    assert found.sample_rows == 100  # of 5,000 characters, the model reads no further than 640
    assert found.row_bytes > 5_000

    chunked = Probe(replace(job, long_text=LongTexts("chunk"))).find()
    assert chunked.row_bytes > found.row_bytes + 4 * WIDTH  # a text has several vectors then


def test_what_counts_of_texts_that_are_cut_is_their_length(embed: Embed, tmp_path: Path) -> None:
    """One unit of default size would be minutes of work for one worker."""
    rows = [json.dumps({"id": number, "text": "a few words. " * 1_200}) for number in range(40)]
    source = tmp_path / "a.jsonl"
    source.write_text("\n".join(rows))
    assert source.stat().st_size > WORTH * 32

    def is_measured(how: str, **options: Any) -> bool:
        planned = embed(input=str(source), output=str(tmp_path / "out"), **OPEN, long_text=how, dry_run=True, **options)
        return "will be measured when the run starts" in str(planned.plan["kept from"])

    assert [is_measured(how) for how in ("chunk", "average", "truncate", "reject")] == [True, True, False, False]
    assert not is_measured("chunk", limit_rows=20)


def test_what_a_large_corpus_needs_is_measured_recorded_and_kept(embed: Embed, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    large = corpora.plain(rows=WORTH + 1, files=1, row_group_rows=3_000).write(tmp_path / "in")
    output = str(tmp_path / "out")
    with caplog.at_level(logging.INFO, "embedding.run"):
        planned = embed(input=large, output=output, **OPEN, dry_run=True)
        assert planned.plan["kept"] == DEFAULTS
        assert str(planned.plan["kept from"]).startswith("unit_rows and batch_tokens will be measured when the run starts")
        smaller = embed(input=large, output=output, **OPEN, dry_run=True, limit_rows=WORTH)
        assert smaller.plan["kept"] == DEFAULTS
        assert "measured" not in str(smaller.plan["kept from"])
        assert "measur" not in caplog.text

        assert embed(input=large, output=output, **OPEN, limit_rows=WORTH + 1).status == "complete"
    job = outputs.document(output, "_control/job.json")
    kept, found = job["kept"], job["measured"]
    assert f"batches of {kept['batch_tokens']:,} tokens and units of {kept['unit_rows']:,} rows" in caplog.text
    assert len(re.findall(r"measured [\d,]+ tokens/s; using batches of ", caplog.text)) == 1
    assert found["pace"]["batch_tokens"] in [trial["batch_tokens"] for trial in found["pace"]["trials"]]
    assert kept["batch_tokens"] == found["pace"]["batch_tokens"] or not found["pace"]["in_time"]
    assert 512 <= kept["unit_rows"] <= 4_096  # four units at least, whatever the pace
    rows = outputs.control(output, "manifest.parquet")["source_rows"].to_pylist()
    assert sum(rows) == WORTH + 1
    assert max(rows) <= kept["unit_rows"]

    caplog.clear()
    corpora.plain(rows=WORTH, files=1, row_group_rows=3_000, seed=1).write(f"{large}/more")
    with caplog.at_level(logging.INFO, "embedding.run"):
        again = embed(input=large, output=output, **OPEN, dry_run=True)
    assert again.plan["kept"] == kept
    assert "measur" not in caplog.text


def test_what_can_not_be_measured_is_taken_from_the_defaults(
    embed: Embed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("embedding.run.sizes._WORTH_UNITS", 0.001)
    source, output = corpora.plain(rows=30, files=1).write(tmp_path / "in"), str(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "_PLACE_SECONDS", 0)
        assert embed(input=source, output=output, **OPEN).status == "complete"
    assert "measuring failed (the worker that was to measure was not ready in time)" in caplog.text
    job = outputs.document(output, "_control/job.json")
    assert (job["kept"], job["measured"]) == (DEFAULTS, {})

    given = embed(input=source, output=output, restart=True, dry_run=True, unit_rows="auto", batch_tokens=777)
    assert given.plan["kept"] == {"unit_rows": 2_048, "batch_tokens": 777}
    assert str(given.plan["kept from"]).startswith("unit_rows will be measured when the run starts")
    assert embed(input=source, output=output, restart=True, unit_rows=10, batch_tokens="auto").status == "complete"
    job = outputs.document(output, "_control/job.json")
    assert job["kept"]["unit_rows"] == 10
    assert job["kept"]["batch_tokens"] >= job["measured"]["pace"]["batch_tokens"]
