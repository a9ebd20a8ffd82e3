"""Attention over packed rows: a batch's rows lie one after another in one sequence, without padding."""

# Shape suffixes: T packed tokens, H heads, G key and value heads, K head width, S positions of a row.

from __future__ import annotations

from inspect import signature
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from embedding.model.packing import PackedRows

_FLASH_CAPABILITY: Final = (8, 0)
"""Of a GPU: flash attention is written for Ampere and what came after it."""
_FLASH_WIDTHS: Final = range(8, 257, 8)
"""Of a head."""


def attend(
    query_THK: Tensor,
    key_TGK: Tensor,
    value_TGK: Tensor,
    rows: PackedRows,
    *,
    by_kernel: bool,
    scaling: float | None = None,
    causal: bool = False,
    window: int | None = None,
    bias_HSS: Tensor | None = None,
) -> Tensor:
    """Attention of each token to the tokens of its own row: [T, H, K], contiguous; G divides H (grouped queries).

    `by_kernel` is what `has_kernel` says of these tensors. `scaling` is 1 / sqrt(K) unless given. `window` w lets token i see token j
    where |i - j| < w. `bias_HSS`, in the type of the queries, is added to the scores; no kernel does that, and no window goes with it.
    """
    if by_kernel:
        assert bias_HSS is None
        return _by_kernel(query_THK, key_TGK, value_TGK, rows, scaling, causal, window)
    return _by_length(query_THK, key_TGK, value_TGK, rows, scaling, causal, window, bias_HSS)


def has_kernel(device: torch.device, dtype: torch.dtype, head_width: int) -> bool:
    """Whether one launch does all rows of a batch, whatever their lengths."""
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16) or head_width not in _FLASH_WIDTHS:
        return False
    return torch.cuda.get_device_capability(device) >= _FLASH_CAPABILITY


def keep_to_flash_attention(device: torch.device) -> None:
    """Let this process do without cuDNN's attention, which plans a kernel for each shape of a batch, tens of milliseconds each.

    torch prefers it on Hopper, for packed rows from 2.14 on (pytorch issues 187770, 191576); hardly two batches here have the same shape.
    """
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)


def _by_kernel(
    query_THK: Tensor, key_TGK: Tensor, value_TGK: Tensor, rows: PackedRows, scaling: float | None, causal: bool, window: int | None
) -> Tensor:
    """One launch for all rows (CUDA, half precision)."""
    from torch.nn.attention.varlen import varlen_attn  # brings torch's compiler, a second and a half that a CPU need not spend

    reach = -1 if window is None else window - 1
    options: dict[str, Any] = {}
    if _kernel_takes("num_splits") and not torch.version.hip:
        options["num_splits"] = 1  # torch 2.14, which asks no setting, leaves cuDNN for it; and no row's bits depend on other rows
    if query_THK.shape[1] != key_TGK.shape[1]:
        if _kernel_takes("enable_gqa"):
            options["enable_gqa"] = True
        else:
            key_TGK, value_TGK = (_ungrouped(query_THK, heads_TGK) for heads_TGK in (key_TGK, value_TGK))
    result = varlen_attn(
        query_THK,
        key_TGK,
        value_TGK,
        rows.offsets,
        rows.offsets,
        rows.longest,
        rows.longest,
        scale=scaling,
        window_size=(reach, 0 if causal else reach),
        **options,
    )
    assert isinstance(result, Tensor)
    return result


def _kernel_takes(option: str) -> bool:
    """Whether this torch's kernel has the option; 2.11's has neither. Not cached: torch's compiler does not look into caches."""
    from torch.nn.attention.varlen import varlen_attn

    return option in signature(varlen_attn).parameters


def _by_length(
    query_THK: Tensor,
    key_TGK: Tensor,
    value_TGK: Tensor,
    rows: PackedRows,
    scaling: float | None,
    causal: bool,
    window: int | None,
    bias_HSS: Tensor | None,
) -> Tensor:
    """One ordinary attention per length: rows of equal length lie together, so that a reshape makes a batch of them.

    Tokens behind the last row get zeros.
    """
    result_THK = torch.empty(query_THK.shape, dtype=query_THK.dtype, device=query_THK.device)
    grouped = query_THK.shape[1] != key_TGK.shape[1]
    if grouped and query_THK.is_cuda:  # of its kernels, only the one that holds all scores in memory groups heads in every case
        key_TGK, value_TGK = (_ungrouped(query_THK, heads_TGK) for heads_TGK in (key_TGK, value_TGK))
        grouped = False
    start = 0
    for count, length in rows.groups:
        stop = start + count * length
        query, key, value = (
            tensor[start:stop].view(count, length, -1, tensor.shape[-1]).transpose(1, 2) for tensor in (query_THK, key_TGK, value_TGK)
        )
        mask = None if bias_HSS is None else bias_HSS[:, :length, :length].unsqueeze(0)
        if window is not None and length > window:
            mask = _window_mask(length, window, causal, query.device)
        attended = scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=scaling, is_causal=causal and mask is None, enable_gqa=grouped
        )
        result_THK[start:stop].view(count, length, *result_THK.shape[1:]).copy_(attended.transpose(1, 2))
        start = stop
    result_THK[start:] = 0
    return result_THK


def _ungrouped(query_THK: Tensor, heads_TGK: Tensor) -> Tensor:
    """A head of keys or values for each of queries: [T, H, K]."""
    return heads_TGK.repeat_interleave(query_THK.shape[1] // heads_TGK.shape[1], dim=1)


def _window_mask(length: int, window: int, causal: bool, device: torch.device) -> Tensor:
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    near = distance.abs() < window
    return near & (distance >= 0) if causal else near
