"""Every architecture against plain padded transformers, and against itself in other batches."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding, AutoTokenizer, Gemma3TextConfig

from embedding.model.embedder import Embedder
from embedding.model.parity import probe_batch
from tests.model.tiny import FAMILIES, TEXTS, save_model, spec_of

NOT_PACKABLE = {"t5"}
"""It adds a bias for relative positions to the attention scores."""


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp(request.param), request.param)


def plain_vectors(folder: Path, texts: list[str], max_tokens: int) -> npt.NDArray[np.float32]:
    """Mean (last token for a causal model) of one padded batch, by nothing but transformers."""
    config = AutoConfig.from_pretrained(folder)
    loader = AutoModelForTextEncoding if config.model_type == "t5" else AutoModel
    model = loader.from_pretrained(folder, attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    features = tokenizer(texts, padding=True, truncation=True, max_length=max_tokens, return_tensors="pt", return_token_type_ids=False)
    with torch.inference_mode():
        hidden = model(**features).last_hidden_state
    lengths = features["attention_mask"].sum(dim=1)
    if config.model_type == "qwen3":
        return np.stack([hidden[row, length - 1].numpy() for row, length in enumerate(lengths)])
    return np.stack([hidden[row, :length].mean(dim=0).numpy() for row, length in enumerate(lengths)])


def worst_cosine(left: npt.NDArray[np.float32], right: npt.NDArray[np.float32]) -> float:
    products = np.einsum("rd,rd->r", left.astype(np.float64), right.astype(np.float64))
    return float((products / np.linalg.norm(left, axis=1) / np.linalg.norm(right, axis=1)).min())


def test_vectors_are_those_of_plain_transformers(folder: Path) -> None:
    spec = spec_of(folder)
    embedder = Embedder(spec)
    tokens = embedder.tokenize(TEXTS)
    found = embedder.embed(tokens, batch_tokens=1000).vectors_RD
    assert embedder.packed == (spec.model_type not in NOT_PACKABLE)
    assert worst_cosine(found, plain_vectors(folder, TEXTS, spec.max_tokens)) > 0.99999
    assert set(tokens.truncated) == {False, True}


@pytest.mark.parametrize(("window", "longest"), [(None, 160), (64, 160), (257, 289), (4096, 160)])
def test_the_rows_that_are_compared_show_a_sliding_window(window: int | None, longest: int) -> None:
    config = Gemma3TextConfig(vocab_size=50, sliding_window=window)
    assert probe_batch(config, 2048, torch.device("cpu")).lengths.tolist() == [longest, 17, 17, 3, 1]
    assert probe_batch(config, 10, torch.device("cpu")).lengths.tolist() == [10, 10, 10, 3, 1]


def test_half_precision_is_near(folder: Path) -> None:
    spec = spec_of(folder)
    exact, near = (Embedder(each) for each in (spec, replace(spec, precision="bf16")))
    tokens = exact.tokenize(TEXTS)
    assert near.packed == exact.packed
    assert 0.995 < worst_cosine(exact.embed(tokens, 1000).vectors_RD, near.embed(tokens, 1000).vectors_RD) < 0.9999999


def test_batches_do_not_change_vectors(folder: Path) -> None:
    embedder = Embedder(spec_of(folder))
    texts = TEXTS[::6]
    together = embedder.embed(embedder.tokenize(texts), batch_tokens=100_000)
    alone = np.concatenate([embedder.embed(embedder.tokenize([text]), batch_tokens=160).vectors_RD for text in texts])
    np.testing.assert_allclose(alone, together.vectors_RD, rtol=0, atol=2e-5)
    assert together.vectors_RD.flags.c_contiguous
    assert together.vectors_RD.dtype == np.float32
    assert together.finite_R.all()
    assert (together.padding_tokens == 0) == embedder.packed
