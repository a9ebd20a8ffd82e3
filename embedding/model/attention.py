"""Attention over packed rows: a batch's rows lie one after another in one sequence, without padding.

Registered with transformers' AttentionInterface under `PACKED`, for every model class with `_supports_attention_backend`.
No mask function is registered under that name, so transformers builds no mask.
"""

# Shape suffixes: T packed tokens, H heads, G key and value heads, K head width.

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

PACKED: Final = "packed_rows"


@dataclass(frozen=True)
class PackedRows:
    """Where the rows of a packed batch lie, in the two forms that the kernels want."""

    offsets: Tensor
    """int32 [R + 1], on the device of the tokens."""
    groups: tuple[tuple[int, int], ...]
    """(number of rows, their length) on the host, in the order of the rows, longest first."""

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return self.groups[0][1]


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed_rows: PackedRows,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    **_unused: object,
) -> tuple[Tensor, None]:
    """Attention of each token to the tokens of its own row.

    Shapes: query [1, H, T, K], key and value [1, G, T, K] with G dividing H (grouped queries); the result is [1, T, H, K].
    `sliding_window` w lets token i see token j where |i - j| < w, as transformers' flash attention does.

    Raises:
        NotImplementedError: the model adds a bias to the scores or caps them, which no packed kernel here does.
    """
    if attention_mask is not None or position_bias is not None or softcap is not None:
        raise NotImplementedError("attention with a mask, bias or cap of its own cannot run packed")
    causal = bool(getattr(module, "is_causal", False)) if is_causal is None else is_causal
    attend = _attend_by_kernel if query.is_cuda and value.dtype in (torch.float16, torch.bfloat16) else _attend_by_length
    # Rotary embeddings may have widened query and key under autocast; value comes straight from its projection.
    query_THK, key_TGK, value_TGK = (tensor[0].transpose(0, 1).to(value.dtype) for tensor in (query, key, value))
    return attend(query_THK, key_TGK, value_TGK, packed_rows, scaling, causal, sliding_window).unsqueeze(0), None


def _attend_by_kernel(
    query_THK: Tensor, key_TGK: Tensor, value_TGK: Tensor, rows: PackedRows, scaling: float | None, causal: bool, window: int | None
) -> Tensor:
    """One launch for all rows (CUDA, half precision)."""
    reach = -1 if window is None else window - 1
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
        enable_gqa=query_THK.shape[1] != key_TGK.shape[1],
    )
    assert isinstance(result, Tensor)
    return result


def _attend_by_length(
    query_THK: Tensor, key_TGK: Tensor, value_TGK: Tensor, rows: PackedRows, scaling: float | None, causal: bool, window: int | None
) -> Tensor:
    """One ordinary attention per length: rows of equal length lie together, so that a reshape makes a batch of them."""
    result_THK = torch.empty_like(query_THK)
    start = 0
    for count, length in rows.groups:
        stop = start + count * length
        query, key, value = (
            tensor[start:stop].view(count, length, -1, tensor.shape[-1]).transpose(1, 2) for tensor in (query_THK, key_TGK, value_TGK)
        )
        mask = _window_mask(length, window, causal, query.device) if window is not None and length > window else None
        attended = scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=scaling, is_causal=causal and mask is None, enable_gqa=query.shape[1] != key.shape[1]
        )
        result_THK[start:stop].view(count, length, *result_THK.shape[1:]).copy_(attended.transpose(1, 2))
        start = stop
    return result_THK


def _window_mask(length: int, window: int, causal: bool, device: torch.device) -> Tensor:
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    near = distance.abs() < window
    return near & (distance >= 0) if causal else near


AttentionInterface.register(PACKED, packed_attention)
