"""What is decided from what was measured, by literals; and measuring itself, on a tiny model, with memory that runs out."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import psutil
import pytest
from torch import Tensor

from embedding.model import measure as measuring
from embedding.model import memory
from embedding.model.embedder import Embedder
from embedding.model.encoder import Encoder
from embedding.model.measure import Trial, budgets_from, choose, measure
from embedding.model.memory import DeviceMemory
from embedding.model.packing import PackedBatch
from tests.model.scarce import limit_memory
from tests.model.tiny import POSITIONS, TEXTS, save_model, spec_of

FIRST = 256
"""The smallest budget for texts as short as the tiny model reads."""
MANY = [f"{number} {text}" for number in range(20) for text in TEXTS]
"""Two thousand texts; the number makes them differ where long ones are cut as well."""
MEGABYTE = 2**20


@pytest.fixture(autouse=True)
def _time_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on a machine that is busy with other things."""
    monkeypatch.setattr(measuring, "_SECONDS", 300)


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Embedder:
    return Embedder(spec_of(save_model(tmp_path_factory.mktemp("model"), "bert")), device="cpu")


def trials(*rates: float, fitting: int | None = None) -> list[Trial]:
    return [Trial(FIRST << step, rate, fitting is None or step < fitting) for step, rate in enumerate(rates)]


@pytest.mark.parametrize(
    ("measured", "chosen"),
    [
        (trials(100), 256),
        (trials(100, 150, 200, 201), 1024),  # 0.5% is no gain
        (trials(100, 102, 104), 512),  # what counts is the distance to the fastest, not to the next
        (trials(100, 90, 300, 280), 1024),
        (trials(300, 200, 100), 256),
        (trials(100, 200, 400, fitting=2), 512),
        (trials(100, 200, fitting=0), 256),  # the smallest must do
    ],
)
def test_the_smallest_budget_that_is_as_fast_as_any_and_fits(measured: list[Trial], chosen: int) -> None:
    assert choose(measured).batch_tokens == chosen


@pytest.mark.parametrize(("max_tokens", "expected"), [(16, [256, 512, 1024]), (256, [256, 512, 1024]), (257, [512, 1024, 2048])])
def test_a_budget_holds_a_text_of_any_length(max_tokens: int, expected: list[int]) -> None:
    assert list(islice(budgets_from(max_tokens), 3)) == expected


def test_a_device_is_measured(embedder: Embedder) -> None:
    found = measure(embedder, DeviceMemory("cpu"), MANY, [256, 512, 1024, 2048])
    budgets = [trial.batch_tokens for trial in found.trials]
    assert budgets in ([256, 512, 1024], [256, 512, 1024, 2048])
    assert all(trial.fits and trial.tokens_per_second > 0 for trial in found.trials)
    assert found.in_time
    chosen = choose(found.trials)
    assert (found.batch_tokens, found.tokens_per_second) == (chosen.batch_tokens, chosen.tokens_per_second)
    tokens = embedder.tokenize(MANY).once
    assert found.rows_per_second <= found.tokens_per_second * len(MANY) / len(tokens.ids) * (1 + 1e-9)


def test_a_sample_that_is_smaller_than_a_batch_bounds_it(embedder: Embedder) -> None:
    tokens = embedder.tokenize(TEXTS)
    found = measure(embedder, DeviceMemory("cpu"), TEXTS, budgets_from(POSITIONS))
    assert max(trial.batch_tokens for trial in found.trials) <= len(tokens.ids)
    assert [trial.batch_tokens for trial in measure(embedder, DeviceMemory("cpu"), ["a"], budgets_from(POSITIONS)).trials] == [FIRST]


def test_a_given_budget_is_the_only_trial(embedder: Embedder) -> None:
    found = measure(embedder, DeviceMemory("cpu"), MANY, [300])
    assert (found.batch_tokens, [trial.batch_tokens for trial in found.trials]) == (300, [300])
    assert found.tokens_per_second > 0


def test_a_climb_that_time_cuts_off_says_so(embedder: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "_SECONDS", 0)
    found = measure(embedder, DeviceMemory("cpu"), MANY, budgets_from(POSITIONS))
    assert [trial.batch_tokens for trial in found.trials] == [FIRST]
    assert not found.in_time


def test_texts_without_tokens_are_refused(embedder: Embedder) -> None:
    with pytest.raises(ValueError, match="no tokens"):
        measure(embedder, DeviceMemory("cpu"), [], [300])


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: ...")])
def test_a_budget_that_runs_out_of_memory_is_not_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    embedder = Embedder(spec_of(save_model(tmp_path, "bert")), device="cpu")
    tried = limit_memory(monkeypatch, error, 700)
    found = measure(embedder, DeviceMemory("cpu"), MANY, budgets_from(POSITIONS))
    assert [(trial.batch_tokens, trial.fits) for trial in found.trials] == [(256, True), (512, True), (1024, False)]
    assert found.batch_tokens <= 512
    assert max(tried) <= 1024  # nothing larger is tried after that


def test_a_budget_that_leaves_too_little_memory_is_not_chosen(embedder: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches above 700 tokens take 300 MB more than the process ever had; 200 MB more would leave what must stay free."""
    run, before = Encoder.__call__, DeviceMemory("cpu").peak()

    def hungry(self: Encoder, batch: PackedBatch) -> Tensor:
        if len(batch.ids_T) > 700:
            np.ones(max(0, before + 300 * MEGABYTE - psutil.Process().memory_info().rss), np.uint8).sum()  # 0: another batch holds it
        return run(self, batch)

    monkeypatch.setattr(Encoder, "__call__", hungry)
    monkeypatch.setattr(memory, "_host_bytes", lambda: (before + 200 * MEGABYTE) / 0.7)
    found = measure(embedder, DeviceMemory("cpu"), MANY, budgets_from(POSITIONS))
    assert [(trial.batch_tokens, trial.fits) for trial in found.trials] == [(256, True), (512, True), (1024, False)]
    assert found.batch_tokens <= 512


def test_the_memory_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    here = DeviceMemory("cpu")
    here.watch()
    assert 10 * MEGABYTE < here.peak() < memory._host_bytes()
    here.release()
    assert here.has_room()
    monkeypatch.setattr(memory, "_host_bytes", here.peak)
    assert not DeviceMemory("cpu").has_room()
