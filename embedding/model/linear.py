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
_FP8_CAPABILITY: Final = (9, 0)
"""Of a GPU: scales for each token and each output came with Hopper."""
_FP8_STEP: Final = 16
"""A product in fp8 takes multiples of so many features."""
_LEAST_SCALE: Final = 1e-12
"""Of a token whose numbers are all 0."""
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


class Fp8Linear(Linear):
    """The same with both factors rounded to 8 bits (e4m3, Micikevicius et al. 2022), a scale for each token and each output.

    The scales of the tokens are found anew in every batch. The bias is added, and the result rounded, in bfloat16.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        weight_OI, scales_O1 = _in_eight_bits(weight)
        super().__init__(weight_OI, bias.bfloat16() if bias is not None else None)
        self.scales_1O = nn.Buffer(scales_O1.t().contiguous())

    def forward(self, x: Tensor) -> Tensor:
        """The product."""
        x_TI, scales_T1 = _in_eight_bits(x.flatten(0, -2))
        product_TO: Tensor = torch._scaled_mm(  # the public scaled_mm stops the compiler of torch 2.11
            x_TI,
            self.weight.t(),
            scale_a=scales_T1,
            scale_b=self.scales_1O,
            bias=self.bias,
            out_dtype=torch.bfloat16,
            use_fast_accum=x.is_cuda,
        )
        return product_TO.view(*x.shape[:-1], -1)


def _in_eight_bits(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """(numbers in e4m3, scale of each row): their product is about what was given."""
    exact = numbers.float()
    scales = (exact.abs().amax(1, keepdim=True) / 448.0).clamp_min(_LEAST_SCALE)  # the largest; as a name, it would reach kernels in fp64
    return (exact / scales).to(torch.float8_e4m3fn), scales


def fp8_lacks(device: torch.device) -> str:
    """Why the device does not multiply in fp8, "" where it does. A CPU does, slowly: enough to see what it makes of a model."""
    if device.type != "cuda":
        return "" if _cpu_multiplies_fp8() else f"torch {torch.__version__} does not multiply in fp8 on a CPU"
    if (capability := torch.cuda.get_device_capability(device)) >= _FP8_CAPABILITY:
        return ""
    has, needed = (".".join(map(str, version)) for version in (capability, _FP8_CAPABILITY))
    return f"{torch.cuda.get_device_name(device)} has compute capability {has}, and fp8 needs {needed} (Hopper) or later"


@functools.cache
def _cpu_multiplies_fp8() -> bool:
    """Whether this torch does; 2.11 does not with a scale for each token."""
    try:
        Fp8Linear(torch.ones(_FP8_STEP, _FP8_STEP), None)(torch.ones(1, _FP8_STEP))
    except RuntimeError:
        return False
    return True


def linear_for(weight: Tensor, bias: Tensor | None, *, fp8: bool = False) -> Linear:
    """The product with these numbers, of one type, on the device where they are; `fp8`: in 8 bits where their number allows it."""
    if fp8 and not any(size % _FP8_STEP for size in weight.shape):
        return Fp8Linear(weight, bias)
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
