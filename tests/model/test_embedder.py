"""Embedder under pressure: memory that runs out, numbers that overflow, threads."""

from __future__ import annotations

import gc
import json
import logging
import os
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from embedding.errors import ModelError
from embedding.model.embedder import Embedder
from embedding.model.encoder import Encoder
from embedding.model.packing import PackedBatch
from tests.model.scarce import limit_memory
from tests.model.tiny import TEXTS, WIDTH, save_model, spec_of, write_json


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), "bert")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: ..."),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_out_of_memory_halves_the_batch_for_good(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    embedder = Embedder(spec_of(folder))
    tokens = embedder.tokenize(TEXTS)
    expected = embedder.embed(tokens, 4000)
    tried = limit_memory(monkeypatch, error, 700)
    with caplog.at_level(logging.WARNING, "embedding.model"):
        found = embedder.embed(tokens, 4000)
    np.testing.assert_allclose(found.vectors_RD, expected.vectors_RD, rtol=0, atol=2e-5)
    assert expected.batch_tokens == 4000
    assert 350 <= found.batch_tokens <= 700
    assert "does not fit in memory" in caplog.text
    tried.clear()
    again = embedder.embed(tokens, 4000)
    assert max(tried) <= found.batch_tokens == again.batch_tokens
    assert embedder.embed(tokens, 200).batch_tokens == 200


def test_a_text_that_does_not_fit_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    embedder = Embedder(spec_of(folder))
    limit_memory(monkeypatch, torch.OutOfMemoryError(), 100)
    with pytest.raises(ModelError, match="a single text of 160 tokens does not fit in the memory"):
        embedder.embed(embedder.tokenize(TEXTS), 4000)


def test_other_errors_pass(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    embedder = Embedder(spec_of(folder))
    limit_memory(monkeypatch, RuntimeError("expected scalar type Float"), 0)
    with pytest.raises(RuntimeError, match="expected scalar type"):
        embedder.embed(embedder.tokenize(TEXTS), 4000)


def break_rows(monkeypatch: pytest.MonkeyPatch, token: int, *, in_fp32: bool) -> None:
    """Give every token of this id an infinite hidden state."""
    run = Encoder.__call__

    def broken(self: Encoder, batch: PackedBatch) -> Tensor:
        hidden = run(self, batch).clone()
        if in_fp32 or self.dtype != torch.float32:
            hidden[batch.ids_T == token] = torch.inf
        return hidden

    monkeypatch.setattr(Encoder, "__call__", broken)


@pytest.mark.parametrize("in_fp32", [False, True])
def test_rows_that_overflow_are_computed_again_in_fp32(folder: Path, monkeypatch: pytest.MonkeyPatch, in_fp32: bool) -> None:
    exact = Embedder(spec_of(folder))
    tokens = exact.tokenize(TEXTS[:12])
    expected = exact.embed(tokens, 1000).vectors_RD
    embedder = Embedder(replace(spec_of(folder), precision="bf16"))
    token = int(tokens.ids[tokens.offsets[2] + 1])  # the first letter of the text about zebras
    has_token = np.array([token in tokens.ids[start:end] for start, end in zip(tokens.offsets, tokens.offsets[1:], strict=False)])
    assert set(has_token) == {False, True}
    break_rows(monkeypatch, token, in_fp32=in_fp32)
    found = embedder.embed(tokens, 1000)
    if in_fp32:
        assert found.finite_R.tolist() == (~has_token).tolist()
    else:
        assert found.finite_R.all()
        np.testing.assert_allclose(found.vectors_RD[has_token], expected[has_token], rtol=0, atol=2e-5)
    cosines = torch.cosine_similarity(torch.from_numpy(found.vectors_RD), torch.from_numpy(expected))[~has_token]
    assert 0.98 < float(cosines.min()) < 0.999999  # bf16: near, and not the same


def test_what_does_not_fit_in_fp32_still_fits_in_half(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    embedder = Embedder(replace(spec_of(folder), precision="bf16"))
    tokens = embedder.tokenize(TEXTS)
    break_rows(monkeypatch, int(tokens.ids[1]), in_fp32=False)
    run = Encoder.__call__

    def in_little_memory(self: Encoder, batch: PackedBatch) -> Tensor:
        if self.dtype == torch.float32 and len(batch.rows.groups) > 1:
            raise torch.OutOfMemoryError
        return run(self, batch)

    monkeypatch.setattr(Encoder, "__call__", in_little_memory)
    found = embedder.embed(tokens, 4000)
    assert found.finite_R.all()
    assert found.batch_tokens == 4000


def test_fp32_is_fp32_where_the_environment_allows_less(folder: Path) -> None:
    words = f"""
import torch
allowed = torch.get_float32_matmul_precision()
from embedding.model.embedder import Embedder
from tests.model.tiny import spec_of
from pathlib import Path
Embedder(spec_of(Path({str(folder)!r})))
print(allowed, torch.get_float32_matmul_precision())
"""
    environment = os.environ | {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"}
    done = subprocess.run([sys.executable, "-c", words], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["high", "highest"]


def test_equal_texts_are_encoded_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    embedder = Embedder(spec_of(folder))
    texts = ["to be", "or", "not", "to be", "or", "to be"]
    alone = embedder.embed(embedder.tokenize(texts[:3]), 1000)
    tokens = embedder.tokenize(texts)
    tried = limit_memory(monkeypatch, MemoryError(), 1000)
    found = embedder.embed(tokens, 1000)
    assert tried == [int(tokens.lengths[:3].sum())]
    assert (alone.distinct_rows, found.distinct_rows, found.padding_tokens) == (3, 3, 0)
    assert found.vectors_RD.tobytes() == alone.vectors_RD[[0, 1, 2, 0, 1, 0]].tobytes()
    assert found.vectors_RD.flags.c_contiguous
    assert len(found.finite_R) == 6


@pytest.mark.parametrize("texts", [["to be", "or", "not"], ["to be", "or", "to be"]])
def test_what_needs_no_device_is_done_before_it_is_taken(folder: Path, texts: list[str]) -> None:
    embedder = Embedder(spec_of(folder))
    tokens = embedder.tokenize(texts)
    made = [set(vars(rows)) for rows in (tokens, tokens.once)]
    embedder.embed(tokens, 1000)
    assert [set(vars(rows)) for rows in (tokens, tokens.once)] == made


def test_tokens_go_with_their_unit(folder: Path) -> None:
    """Not some units later, when Python looks for what holds itself."""
    tokens = Embedder(spec_of(folder)).tokenize(["to be", "or", "not"])
    kept = weakref.ref(tokens)
    gc.disable()
    try:
        del tokens
        assert kept() is None
    finally:
        gc.enable()


def test_a_model_that_cannot_run_packed_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = save_model(tmp_path, "t5")
    embedder = Embedder(spec_of(folder))
    assert not embedder.packed
    assert caplog.text.count("runs padded: the t5 classes") == 1
    assert embedder.description["batches"].startswith("padded: ")
    result = embedder.embed(embedder.tokenize(["a", "one two three four"]), 1000)
    assert result.padding_tokens > 0


def test_a_wrong_attention_is_found_at_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an architecture would be whose packed rows see each other's positions."""
    folder = save_model(tmp_path, "electra")
    right = Embedder(spec_of(folder))
    tokens = right.tokenize(TEXTS)
    expected = right.embed(tokens, 4000).vectors_RD
    monkeypatch.setattr(PackedBatch, "position_ids", lambda batch, _: batch.positions_T.flip(0))
    embedder = Embedder(spec_of(folder))
    assert not embedder.packed
    assert "differ by" in embedder.description["batches"]
    np.testing.assert_allclose(embedder.embed(tokens, 4000).vectors_RD, expected, rtol=0, atol=2e-5)


def test_tokenizing_goes_on_while_another_thread_encodes(folder: Path) -> None:
    embedder = Embedder(spec_of(folder), threads=1)
    assert torch.get_num_threads() == 1
    tokens = embedder.tokenize(TEXTS)
    expected = embedder.embed(tokens, 500).vectors_RD
    with ThreadPoolExecutor(2) as pool:
        others = [pool.submit(embedder.tokenize, TEXTS) for _ in range(4)]
        assert (embedder.embed(tokens, 500).vectors_RD == expected).all()
    assert all(other.result().ids.tolist() == tokens.ids.tolist() for other in others)


def test_the_bits_do_not_depend_on_the_number_of_threads(folder: Path) -> None:
    alone, together = (Embedder(spec_of(folder), device="cpu", threads=threads) for threads in (1, 3))
    assert (alone.lanes, together.lanes) == (1, 3)
    tokens = alone.tokenize(TEXTS)
    assert alone.embed(tokens, 60).vectors_RD.tobytes() == together.embed(tokens, 60).vectors_RD.tobytes()


def test_two_callers_get_their_own_vectors(folder: Path) -> None:
    embedder = Embedder(spec_of(folder), device="cpu", threads=2)
    units = [embedder.tokenize(texts) for texts in (TEXTS, TEXTS[::-1], [*TEXTS[:5], *TEXTS[:5]])]
    expected = [embedder.embed(unit, 60) for unit in units]
    found = [finish() for finish in [embedder.submit(unit, 60) for unit in units]]
    assert [one.vectors_RD.tobytes() for one in found] == [one.vectors_RD.tobytes() for one in expected]


def test_a_text_without_any_token_gets_zeros(tmp_path: Path) -> None:
    folder = save_model(tmp_path, "bert")
    settings = json.loads((folder / "tokenizer.json").read_text())
    write_json(folder / "tokenizer.json", settings | {"post_processor": None})
    embedder = Embedder(spec_of(folder))
    tokens = embedder.tokenize(["", "a", " "])
    assert tokens.lengths.tolist() == [0, 1, 0]
    found = embedder.embed(tokens, 100)
    assert found.finite_R.all()
    assert found.vectors_RD.any(axis=1).tolist() == [False, True, False]


def test_facts(folder: Path) -> None:
    embedder = Embedder(spec_of(folder), device="cpu")
    assert embedder.dim == WIDTH
    assert set(embedder.description) == {"device", "torch", "transformers", "tokenizers", "tokenized_by", "batches"}
    nothing = embedder.embed(embedder.tokenize([]), 100)
    assert nothing.vectors_RD.shape == (0, WIDTH)
