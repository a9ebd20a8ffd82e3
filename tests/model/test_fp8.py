"""Matrix products in 8 bits: as near as they can be, a scale for each token, and only where a device has them."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from embedding.errors import ModelError
from embedding.model import linear
from embedding.model.embedder import Embedder
from embedding.model.encoder import Encoder
from embedding.model.linear import Fp8Linear, Linear, fp8_lacks, linear_for
from tests.model.test_families import worst_cosine
from tests.model.test_linear import numbers
from tests.model.tiny import FAMILIES, TEXTS, save_model, spec_of

pytestmark = pytest.mark.skipif(bool(fp8_lacks(torch.device("cpu"))), reason="this torch has no fp8 on CPUs")


def apart(found: Tensor, exact: Tensor) -> float:
    """The largest relative distance of two rows."""
    return float(((found.float() - exact).norm(dim=-1) / exact.norm(dim=-1)).max())


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 96), (77, 96), (2, 5, 96)])
def test_a_product_of_8_bits_is_near(shape: tuple[int, ...], has_bias: bool) -> None:
    """Three bits behind the point: each factor is off by up to a sixteenth, a sum of 96 by much less."""
    weight, bias, x = numbers(48, 96), numbers(48) if has_bias else None, numbers(*shape)
    found = linear_for(weight, bias, fp8=True)(x)
    assert found.dtype == torch.bfloat16
    assert found.shape == (*shape[:-1], 48)
    assert 1e-3 < apart(found, functional.linear(x, weight, bias)) < 0.06


def test_each_token_and_each_output_has_a_scale_of_its_own() -> None:
    """One scale for all would make the small ones 0."""
    weight, x = numbers(48, 96), numbers(60, 96)
    rising = weight * torch.logspace(-4, 4, 48)[:, None]
    assert apart(Fp8Linear(rising, None)(x).t(), functional.linear(x, rising).t()) < 0.06
    rising = x * torch.logspace(-6, 6, 60)[:, None]
    assert apart(Fp8Linear(weight, None)(rising), functional.linear(rising, weight)) < 0.06


def test_a_token_of_zeros_and_one_that_is_not_finite() -> None:
    weight, bias, x = numbers(48, 96), numbers(48).bfloat16(), numbers(4, 96)
    x[1], x[2, 3] = 0, torch.inf
    product = Fp8Linear(weight, bias)
    found, others = product(x), product(x[[0, 3]])
    assert torch.equal(found[1], bias)
    assert not found[2].isfinite().any()
    assert torch.equal(found[[0, 3]], others)


@pytest.mark.parametrize("shape", [(24, 96), (48, 40)])
def test_other_sizes_stay_as_they_are(shape: tuple[int, int]) -> None:
    assert not isinstance(linear_for(numbers(*shape), None, fp8=True), Fp8Linear)
    assert isinstance(linear_for(numbers(48, 96), None, fp8=True), Fp8Linear)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_multiplies_in_fp8(family: str, tmp_path: Path) -> None:
    spec = spec_of(save_model(tmp_path, family))
    exact, near = (Embedder(each) for each in (spec, replace(spec, precision="fp8")))
    products = [module for module in near._encoder._model.module.modules() if isinstance(module, nn.Linear | Linear)]  # type: ignore[attr-defined]
    assert len(products) > 2
    assert {type(module) for module in products} == {Fp8Linear}
    tokens = exact.tokenize(TEXTS)
    assert near.packed == exact.packed
    # By kind of processor, fp8 gave 0.895 (qwen3) to 0.998 (t5), where bf16 gives 0.9989 (nomic_bert) to 0.99999 (t5).
    assert 0.8 < worst_cosine(exact.embed(tokens, 1000).vectors_RD, near.embed(tokens, 1000).vectors_RD) < 0.9995


def test_a_gpu_without_fp8_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, spec = torch.device("cuda"), spec_of(save_model(tmp_path, "bert"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA L4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    message = re.escape("NVIDIA L4 has compute capability 8.9, and fp8 needs 9.0 (Hopper) or later; use --precision bf16")
    with pytest.raises(ModelError, match=f"^{message}$"):
        Encoder(spec, tmp_path, gpu, "fp8")
    for capability in ((9, 0), (10, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, capability=capability: capability)
        assert not fp8_lacks(gpu)


def test_a_cpu_whose_torch_has_no_fp8_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch 2.11, which has one scale for all tokens alone."""

    def one_scale(*_: object, **__: object) -> Tensor:
        raise RuntimeError("Now _scaled_mm only supports per-tensor scaling for CPU backend.")

    spec = spec_of(save_model(tmp_path, "bert"))
    monkeypatch.setattr(torch, "_scaled_mm", one_scale)
    monkeypatch.setattr(linear, "_cpu_multiplies_fp8", linear._cpu_multiplies_fp8.__wrapped__)  # what it knows is of another torch
    with pytest.raises(ModelError, match=r"^torch .* does not multiply in fp8 on a CPU; use --precision bf16$"):
        Embedder(replace(spec, precision="fp8"), device="cpu")
