"""A layer's matrix products, each with the step that follows it, by the fastest kernel that the device has for them.

torch multiplies fp32 on CPUs by MKL, which on AMD keeps to AVX2 and so to half of what the cores can do; oneDNN, which torch carries too,
writes its kernels for the instructions that are there, and adds the bias, the residual or GELU while the result is still in a register.
Its operators are those that torch's own compiler emits for inference. They are not part of torch's public interface, so that they are
tried, and compared with the public ones, before they are used.
"""

# Shape suffixes: T packed tokens, I and O features in and out.

from __future__ import annotations

import functools
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear, pad

_TYPICAL_TOKENS: Final = 1024
"""Of a batch on a CPU: oneDNN lays the weights out for products of that size, and multiplies any other with them."""
_STEP: Final = 32
"""oneDNN makes a kernel for each number of tokens, and keeps it amid the memory of tensors: 550 MB more than for multiples of 32 alone."""
_TOLERANCE: Final = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Largest difference of two products of numbers around 1, both rounded to that type."""


class Linear(nn.Module):
    """x W^T + b with torch's public operators.

    Shapes: x is [..., I], `weight` [O, I], `bias` [O] or None, the result [..., O] in the type of `weight`.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Buffer(weight)
        self.bias = nn.Buffer(bias) if bias is not None else None

    def forward(self, x: Tensor) -> Tensor:
        """The product."""
        return linear(x.to(self.weight.dtype), self.weight, self.bias)

    def gelu(self, x: Tensor) -> Tensor:
        """GELU of the product, by the error function."""
        return gelu(self(x))

    def added(self, x: Tensor, residual: Tensor) -> Tensor:
        """The product plus `residual`, which has the type of `weight`."""
        total: Tensor = residual + self(x)
        return total


class OneDnnLinear(Linear):
    """The same by oneDNN, one pass over the result."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(torch.ops.mkldnn._reorder_linear_weight(weight, _TYPICAL_TOKENS), bias)

    def forward(self, x: Tensor) -> Tensor:
        """The product."""
        return self._product(x, "none", None)

    def gelu(self, x: Tensor) -> Tensor:
        """GELU of the product, by the error function."""
        return self._product(x, "gelu", "none")

    def added(self, x: Tensor, residual: Tensor) -> Tensor:
        """The product plus `residual`, which has the type of `weight`."""
        total: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x.to(self.weight.dtype), residual, self.weight, self.bias, "add")
        return total

    def _product(self, x: Tensor, then: str, variant: str | None) -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x.to(self.weight.dtype), self.weight, self.bias, then, [], variant)
        return product


def linear_for(weight: Tensor, bias: Tensor | None) -> Linear:
    """The product with these numbers, of one type, on the device where they are."""
    return (OneDnnLinear if onednn_fits_on(weight.device, weight.dtype) else Linear)(weight, bias)


def onednn_fits_on(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the device is a CPU with the instructions that make oneDNN the faster one, and this torch has its operators.

    A rule and no race of the two: the same machine has to give the same bits at every start.
    """
    if device.type != "cpu" or not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    return dtype in _TOLERANCE and _onednn_agrees(dtype)


def filled(tokens_T: Tensor, dtype: torch.dtype) -> Tensor:
    """Integers of each token, with zeros behind them where oneDNN multiplies in `dtype`, so that it meets few numbers of tokens."""
    return pad(tokens_T, (0, -len(tokens_T) % _STEP)) if onednn_fits_on(tokens_T.device, dtype) else tokens_T


@functools.cache
def _onednn_agrees(dtype: torch.dtype) -> bool:
    """Whether its operators are there and give what the public ones give."""
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    generator = torch.Generator().manual_seed(0)
    x, weight, bias, residual = (torch.randn(shape, generator=generator).to(dtype) for shape in ((5, 64), (32, 64), (32,), (5, 32)))
    plain = Linear(weight / 8, bias)
    with torch.inference_mode():
        expected = plain(x), plain.gelu(x), plain.added(x, residual)
        try:
            fused = OneDnnLinear(plain.weight, plain.bias)
            found = fused(x), fused.gelu(x), fused.added(x, residual)
        except (AttributeError, RuntimeError, TypeError):  # another torch, whose operators have other names or arguments
            return False
    tolerance = _TOLERANCE[dtype]
    return all(torch.allclose(one, other, rtol=tolerance, atol=tolerance) for one, other in zip(found, expected, strict=True))
