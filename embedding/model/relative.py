"""The bias for relative positions that MPNet adds to its scores of attention, as T5 does (Raffel et al. 2020, section 2.1)."""

# Shape suffixes: B buckets, H heads, S positions of a row.

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

_BUCKETS: Final = 32
_FARTHEST: Final = 128
"""Tokens that lie farther apart share the last bucket of their direction."""


def relative_bias(table_BH: Tensor, positions: int) -> Tensor:
    """What each head adds to the score of query i and key j: [H, S, S]; that of a shorter row is its beginning in both directions.

    Raises:
        ValueError: the table has not one row for each bucket.
    """
    if len(table_BH) != _BUCKETS:
        raise ValueError(f"the table of relative positions has {len(table_BH)} rows, not {_BUCKETS}")
    position = torch.arange(positions, device=table_BH.device)
    return table_BH[_buckets(position[None, :] - position[:, None])].permute(2, 0, 1).contiguous()


def _buckets(distance_SS: Tensor) -> Tensor:
    """Half of the buckets for keys that come later; of each half, a bucket for each short distance, then ever wider ones."""
    half = _BUCKETS // 2
    exact = half // 2
    far_SS = distance_SS.abs()
    wide_SS = exact + (torch.log(far_SS.clamp(min=1).float() / exact) / math.log(_FARTHEST / exact) * (half - exact)).long()
    return half * (distance_SS > 0) + torch.where(far_SS < exact, far_SS, wide_SS.clamp(max=half - 1))
