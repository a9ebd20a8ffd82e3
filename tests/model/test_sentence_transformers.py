"""Vectors equal sentence-transformers' own, for all that a sentence-transformers folder can say."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer

from embedding.config import JobConfig
from embedding.model.embedder import Embedder
from embedding.model.spec import ModelSpec, resolve_model
from embedding.names import DEFAULT_MODEL
from tests.model.tiny import TEXTS, WIDTH, save_model, spec_of, write_json

MODES = {
    "cls": "cls",
    "max": "max",
    "mean": "mean",
    "mean_sqrt_len": "mean_sqrt_len_tokens",
    "weightedmean": "weightedmean",
    "lasttoken": "lasttoken",
}
PROMPTS = {"query": "Find the passage: ", "plain": ""}


def embed(spec: ModelSpec, texts: list[str], batch_tokens: int = 500) -> npt.NDArray[np.float32]:
    embedder = Embedder(spec)
    result = embedder.embed(embedder.tokenize(texts), batch_tokens)
    assert result.finite_R.all()
    assert result.vectors_RD.shape == (len(texts), embedder.dim)
    return result.vectors_RD


def close(found: npt.NDArray[np.float32], expected: Any) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=3e-5)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("bare"), "bert")


def save_sentence_model(folder: Path, bare: Path, *modules: torch.nn.Module, pooling: Pooling, **options: Any) -> SentenceTransformer:
    """Make the model by sentence-transformers and save it as a folder; returns sentence-transformers' reading of the folder."""
    made = SentenceTransformer(modules=[Transformer(str(bare)), pooling, *modules], device="cpu", **options)
    made.save(str(folder), create_model_card=False)
    return SentenceTransformer(str(folder), device="cpu")


def docstrings(count: int) -> list[str]:
    """Docstrings of the standard library in a fixed order."""
    found: dict[str, None] = {}
    for module in sorted(info.name for info in pkgutil.iter_modules(importlib.import_module("email").__path__, "email.")):
        for value in vars(importlib.import_module(module)).values():
            members = vars(value).values() if inspect.isclass(value) else ()
            found.update(dict.fromkeys(filter(None, map(inspect.getdoc, [value, *members]))))
    return list(found)[:count]


def test_the_packaged_model_on_real_texts(packaged_model: Path) -> None:
    texts = ["", "Sehr kurz.", "very long " * 20_000, *docstrings(300)]
    config = JobConfig.build(input=("corpus.parquet",), output="vectors", model=DEFAULT_MODEL)
    found = embed(resolve_model(config, precision="fp32"), texts, batch_tokens=4096)
    expected = SentenceTransformer(str(packaged_model), device="cpu").encode(texts)
    assert len(texts) > 200
    assert np.einsum("rd,rd->r", found, expected).min() >= 0.99999
    close(found, expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("include_prompt", [True, False])
def test_pooling_with_a_prompt(tmp_path: Path, bare: Path, mode: str, include_prompt: bool) -> None:
    pooling = Pooling(WIDTH, MODES[mode], include_prompt=include_prompt)
    reference = save_sentence_model(tmp_path, bare, pooling=pooling, prompts=PROMPTS)
    spec = spec_of(tmp_path, prompt_name="query")
    assert spec.pooling == (mode,)
    assert spec.include_prompt == include_prompt
    close(embed(spec, TEXTS), reference.encode(TEXTS, prompt_name="query"))


def test_a_row_that_is_all_prompt(tmp_path: Path, bare: Path) -> None:
    """max_tokens cuts the text away; only what sentence-transformers itself can express is compared."""
    prompt = "a very long prompt that leaves no room " * 10
    pooling = Pooling(WIDTH, ("mean", "weightedmean", "mean_sqrt_len_tokens"), include_prompt=False)
    reference = save_sentence_model(tmp_path, bare, pooling=pooling)
    reference.max_seq_length = 20
    close(embed(spec_of(tmp_path, prompt=prompt, max_tokens=20), TEXTS[:9]), reference.encode(TEXTS[:9], prompt=prompt))


def test_several_poolings_are_joined(tmp_path: Path, bare: Path) -> None:
    reference = save_sentence_model(tmp_path, bare, pooling=Pooling(WIDTH, ("cls", "mean", "max")))
    close(embed(spec_of(tmp_path), TEXTS), reference.encode(TEXTS))


def test_poolings_of_an_old_folder(tmp_path: Path, bare: Path) -> None:
    save_sentence_model(tmp_path, bare, pooling=Pooling(WIDTH))
    old = {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True, "pooling_mode_max_tokens": False}
    write_json(tmp_path / "1_Pooling" / "config.json", {"word_embedding_dimension": WIDTH} | old)
    close(embed(spec_of(tmp_path), TEXTS), SentenceTransformer(str(tmp_path), device="cpu").encode(TEXTS))


@pytest.mark.parametrize("residual", [False, True])
def test_dense_and_normalize(tmp_path: Path, bare: Path, residual: bool) -> None:
    torch.manual_seed(1)
    modules = [
        Dense(WIDTH, WIDTH, activation_function=torch.nn.GELU(), use_residual=residual),
        Dense(WIDTH, 12, bias=False, use_residual=residual),
        Normalize(),
    ]
    reference = save_sentence_model(tmp_path, bare, *modules, pooling=Pooling(WIDTH))
    found = embed(spec_of(tmp_path), TEXTS)
    close(found, reference.encode(TEXTS))
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)


def test_normalize_can_be_switched(tmp_path: Path, bare: Path) -> None:
    reference = save_sentence_model(tmp_path, bare, pooling=Pooling(WIDTH))
    close(embed(spec_of(tmp_path, normalize="yes"), TEXTS), reference.encode(TEXTS, normalize_embeddings=True))
    normalized = save_sentence_model(tmp_path, bare, Normalize(), pooling=Pooling(WIDTH))
    assert len(normalized) == 3
    close(embed(spec_of(tmp_path, normalize="no"), TEXTS), reference.encode(TEXTS))


def test_matryoshka(tmp_path: Path, bare: Path) -> None:
    reference = save_sentence_model(tmp_path, bare, Normalize(), pooling=Pooling(WIDTH))
    expected = reference.encode(TEXTS, truncate_dim=8, normalize_embeddings=True)
    close(embed(spec_of(tmp_path, dimensions=8), TEXTS), expected)
    config = {"truncate_dim": 8, "prompts": {}, "default_prompt_name": None}
    write_json(tmp_path / "config_sentence_transformers.json", config)
    close(embed(spec_of(tmp_path), TEXTS), expected)


def test_prompts(tmp_path: Path, bare: Path) -> None:
    reference = save_sentence_model(tmp_path, bare, pooling=Pooling(WIDTH), prompts=PROMPTS, default_prompt_name="query")
    close(embed(spec_of(tmp_path), TEXTS), reference.encode(TEXTS))
    close(embed(spec_of(tmp_path, prompt_name="plain"), TEXTS), reference.encode(TEXTS, prompt_name="plain"))
    close(embed(spec_of(tmp_path, prompt="Title: "), TEXTS), reference.encode(TEXTS, prompt="Title: "))
    assert spec_of(tmp_path, prompt="").prompt == ""


def test_settings_of_the_transformer_module(tmp_path: Path, bare: Path) -> None:
    save_sentence_model(tmp_path, bare, pooling=Pooling(WIDTH))
    tokenizer = (tmp_path / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(tokenizer.replace('"lowercase": true', '"lowercase": false'))
    write_json(tmp_path / "sentence_bert_config.json", {"max_seq_length": 11, "do_lower_case": True})
    spec = spec_of(tmp_path)
    assert (spec.max_tokens, spec.lower_case) == (11, True)
    texts = [text.upper() for text in TEXTS]
    close(embed(spec, texts), SentenceTransformer(str(tmp_path), device="cpu").encode(texts))


def test_a_bare_folder(bare: Path) -> None:
    close(embed(spec_of(bare), TEXTS), SentenceTransformer(str(bare), device="cpu").encode(TEXTS))
