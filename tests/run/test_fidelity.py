"""fp8 is taken where it is near enough to fp32 on the corpus, and refused with the figure where it is not, before anything is written."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from embedding import JobConfig
from embedding.corpus.output import Output
from embedding.corpus.reader import read_layouts
from embedding.corpus.sources import list_sources
from embedding.errors import ConfigError, CorpusError, ModelError
from embedding.model.linear import fp8_lacks
from embedding.run.calibrator import calibration_job
from embedding.run.comparer import Comparer
from embedding.run.placement import place_workers
from embedding.run.settings import columns_of_corpus
from tests.model.test_families import worst_cosine
from tests.model.tiny import TEXTS, save_model, spec_of
from tests.run.conftest import Embed
from tests.run.here import prove_here
from tests.support import outputs

pytestmark = pytest.mark.skipif(bool(fp8_lacks(torch.device("cpu"))), reason="this torch has no fp8 on CPUs")
REFUSED = re.escape("--precision fp8 changes the vectors too much: of 40 vectors of the corpus, the worst has a cosine of 0.9")
COMPARED = "comparing fp8 with fp32"


@pytest.fixture
def source(tmp_path: Path) -> str:
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"id": range(40), "text": TEXTS[:40]}), tmp_path / "in" / "a.parquet")
    return str(tmp_path / "in")


@pytest.fixture(scope="module")
def calm_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its layers add little to what they read, so that rounding them turns no vector."""
    folder = save_model(tmp_path_factory.mktemp("calm"), "bert")
    model = AutoModel.from_pretrained(folder)
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if name.startswith("encoder.") and name.endswith("dense.weight"):
                weights *= 0.02
    model.save_pretrained(folder)
    return folder


def test_a_model_that_keeps_its_vectors_runs_in_fp8(
    embed: Embed, source: str, calm_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    output, exact = str(tmp_path / "out"), str(tmp_path / "exact")
    assert embed(input=source, output=output, model=str(calm_model), precision="fp8").status == "complete"
    embed(input=source, output=exact, model=str(calm_model), precision="fp32")
    assert caplog.text.count(COMPARED) == 1
    near, far = (np.array(outputs.table(folder)["embedding"].to_pylist(), np.float32) for folder in (output, exact))
    settings = Output(output).settings()
    assert settings is not None
    assert settings.vectors["precision"] == "fp8"
    measured = settings.measured["fp8"]
    assert measured["vectors"] == 40
    assert 0.999 <= measured["least_cosine"] <= measured["median_cosine"] < 1
    assert worst_cosine(near, far) == pytest.approx(measured["least_cosine"], abs=1e-6)
    assert prove_here(output).status == "proved"

    [first, *_] = outputs.shards(output)
    data = Path(output, first).read_bytes()
    Path(output, first).unlink()
    assert embed(input=source, output=output, model=str(calm_model), precision="fp8").status == "complete"
    assert Path(output, first).read_bytes() == data
    assert caplog.text.count(COMPARED) == 1  # what was near enough stays so


def test_another_is_refused_and_nothing_is_lost(embed: Embed, source: str, tmp_path: Path) -> None:
    """Also what a restart would remove."""
    output = str(tmp_path / "out")
    embed(input=source, output=output)
    before = {name: Path(output, name).read_bytes() for name in outputs.shards(output)}
    for asked in ({"output": output, "restart": True}, {"output": str(tmp_path / "new")}):
        with pytest.raises(ConfigError, match=REFUSED):
            embed(input=source, precision="fp8", **asked)
    assert {name: Path(output, name).read_bytes() for name in outputs.shards(output)} == before
    assert embed(input=source, output=output).status == "nothing to do"
    assert Output(str(tmp_path / "new")).settings() is None


def test_a_dry_run_refuses_what_the_run_would(
    embed: Embed, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On this machine; of a cluster, which it does not use, it says that the run will see."""
    options = {"input": source, "output": str(tmp_path / "out"), "precision": "fp8", "dry_run": True}
    assert embed(**options).plan is not None
    assert "a run begins by comparing fp8 with fp32" in caplog.text
    monkeypatch.delenv("RAY_ADDRESS")
    with pytest.raises(ConfigError, match=REFUSED):
        embed(**options)


def test_a_model_that_no_worker_can_load_is_the_users_mistake(embed: Embed, source: str, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "bert")
    tensors = load_file(folder / "model.safetensors")
    del tensors["encoder.layer.1.output.dense.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"^fp8 could not be compared with fp32: model '.*' has no weights for encoder\.layer\.1"):
        embed(input=source, output=str(tmp_path / "out"), model=str(folder), precision="fp8")


def test_a_sample_without_texts_says_nothing_of_fp8(embed: Embed, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"id": range(3), "text": pa.array([None] * 3, pa.string())}), tmp_path / "in" / "a.parquet")
    with pytest.raises(CorpusError, match="no text of the sample could be embedded to compare fp8 with fp32; use --precision bf16"):
        embed(input=str(tmp_path / "in"), output=str(tmp_path / "out"), precision="fp8")


def test_every_vector_of_a_row_counts(source: str, tmp_path: Path) -> None:
    """The shorter one, of fewer numbers, loses more."""
    folder = save_model(tmp_path / "model", "bert")
    least = []
    for dimensions in ((32,), (4,), (32, 4)):
        options = {"input": (source,), "output": "unused", "model": str(folder), "dimensions": dimensions}
        config = JobConfig.build(**options)
        sources = list_sources(config.input)
        columns = columns_of_corpus(config, sources, lambda: None)
        spec = replace(spec_of(folder, dimensions=dimensions), precision="fp8")
        job = calibration_job(config, list(read_layouts(sources, columns)), columns, spec, 1024, place_workers(config, [{"CPU": 3.0}]))
        found = Comparer(job).find()
        assert found.vectors == 40
        least.append(found.least_cosine)
    whole, short, both = least
    assert both == pytest.approx(min(whole, short), abs=1e-6)
    assert both < max(whole, short) - 1e-5
