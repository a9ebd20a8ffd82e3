"""A layer's matrix products: oneDNN gives what torch's public operators give, and is left alone where it does not."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.electra.modeling_electra import ElectraIntermediate

from embedding.model import linear
from embedding.model.embedder import Embedder
from embedding.model.linear import Linear, OneDnnLinear, linear_for, onednn_fits_on
from tests.model.test_families import worst_cosine
from tests.model.tiny import TEXTS, save_model, spec_of

CPU = torch.device("cpu")
HAS_AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
TYPES = [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.skipif(not HAS_AVX512, reason="bf16 needs AVX-512 here"))]


@pytest.fixture(autouse=True)
def _asked_anew() -> Iterator[None]:
    linear._onednn_agrees.cache_clear()
    yield
    linear._onednn_agrees.cache_clear()


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("tokens", [1, 3, 77, 2500])
@pytest.mark.parametrize("has_bias", [True, False])
def test_onednn_is_torch(dtype: torch.dtype, tokens: int, has_bias: bool) -> None:
    weight = numbers(48, 96, dtype=dtype) / 10
    bias = numbers(48, dtype=dtype) if has_bias else None
    x, residual = numbers(tokens, 96), numbers(tokens, 48, dtype=dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    close = partial(torch.testing.assert_close, rtol=tolerance, atol=tolerance)
    with torch.inference_mode():
        product = functional.linear(x.to(dtype), weight, bias)
        found = OneDnnLinear(weight, bias)
        close(found(x), product)
        close(found.gelu(x), functional.gelu(product))
        close(found.added(x, residual), residual + product)
    assert found(x).dtype == found.gelu(x).dtype == found.added(x, residual).dtype == dtype


def test_more_dimensions_than_two() -> None:
    weight, bias, x = numbers(48, 96), numbers(48), numbers(2, 5, 96)
    with torch.inference_mode():
        torch.testing.assert_close(OneDnnLinear(weight, bias)(x), functional.linear(x, weight, bias), rtol=1e-4, atol=1e-4)


def test_the_rule_asks_the_machine_and_not_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    assert onednn_fits_on(CPU, torch.float32) == HAS_AVX512
    assert not onednn_fits_on(CPU, torch.float16)
    assert not onednn_fits_on(torch.device("cuda"), torch.bfloat16)
    assert not onednn_fits_on(torch.device("meta"), torch.float32)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert type(linear_for(numbers(8, 8), None)) is Linear


def _another_name(*_: object) -> Tensor:
    raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute '_linear_pointwise'")


def _another_result(x: Tensor, weight: Tensor, bias: Tensor | None, then: str, *_: object) -> Tensor:
    """As if its GELU were that of tanh, to a larger error."""
    product = functional.linear(x, weight, bias)
    return product * torch.sigmoid(1.7 * product) if then == "gelu" else product


@pytest.mark.skipif(not HAS_AVX512, reason="oneDNN is not used here at all")
@pytest.mark.parametrize("operator", [_another_name, _another_result])
def test_another_torch_is_noticed(operator: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    operator.binary = lambda x, residual, weight, bias, _: residual + functional.linear(x, weight, bias)
    operators = SimpleNamespace(_linear_pointwise=operator, _reorder_linear_weight=lambda weight, _: weight)
    monkeypatch.setattr(torch.ops, "mkldnn", operators)
    assert type(linear_for(numbers(8, 8), None)) is Linear


@pytest.mark.skipif(not HAS_AVX512, reason="oneDNN is not used here at all")
def test_models_of_transformers_multiply_by_onednn_too(tmp_path: Path) -> None:
    embedder = Embedder(spec_of(save_model(tmp_path, "modernbert")))
    products = [module for module in embedder._encoder._model.module.modules() if isinstance(module, nn.Linear | Linear)]  # type: ignore[attr-defined]
    assert len(products) > 4
    assert {type(module) for module in products} == {OneDnnLinear}


@pytest.mark.skipif(not HAS_AVX512, reason="oneDNN is not used here at all")
def test_a_model_that_reads_its_weights_itself_keeps_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the code that some models bring along does: functional.linear(x, self.dense.weight)."""
    folder = save_model(tmp_path, "electra")
    embedder = Embedder(spec_of(folder))
    tokens = embedder.tokenize(TEXTS)
    expected = embedder.embed(tokens, 300).vectors_RD

    def by_hand(self: Any, hidden_states: Tensor) -> Tensor:
        return self.intermediate_act_fn(functional.linear(hidden_states, self.dense.weight, self.dense.bias))  # type: ignore[no-any-return]

    monkeypatch.setattr(ElectraIntermediate, "forward", by_hand)
    vectors = Embedder(spec_of(folder)).embed(tokens, 300).vectors_RD
    assert worst_cosine(vectors, expected) > 0.99999


@pytest.mark.skipif(not HAS_AVX512, reason="oneDNN is the faster one with AVX-512")
@pytest.mark.parametrize("family", ["bert", "electra"])
def test_onednn_meets_few_numbers_of_tokens(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    embedder = Embedder(spec_of(save_model(tmp_path, family)))
    product, met = OneDnnLinear._product, set()

    def spy(self: OneDnnLinear, x: Tensor, *then: Any) -> Tensor:
        met.add(x.shape[-2])
        return product(self, x, *then)

    monkeypatch.setattr(OneDnnLinear, "_product", spy)
    tokens = embedder.tokenize(TEXTS)
    for budget in (160, 300, 4000):
        embedder.embed(tokens, budget)
    assert len(met) > 3
    assert all(number % 32 == 0 for number in met)
