"""Whether a faster way gives the same: rows to try it on, and how far two results lie apart."""

# Shape suffixes: T packed tokens, D width, R rows.

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from embedding.model.packing import PackedBatch, pack

_LENGTHS: Final = (17, 17, 3, 1)
_LONGEST: Final = range(160, 513)
"""What the longest row may have: as many tokens as show a sliding window, if those are not too many to try. ModernBERT's is 64 wide,
EmbeddingGemma's 257.
"""
_BEYOND_THE_WINDOW: Final = 32
_TOLERANCES: Final = {torch.float32: 1e-3, torch.bfloat16: 0.3, torch.float16: 0.3, torch.float8_e4m3fn: 0.7}
"""Largest relative difference of a token's hidden state, by the type of the products. Rounding stays a hundred times below in fp32; of
half precision it is some hundredths itself, of 8 bits some tenths, and only a kernel that does something else is above: hidden states
that have nothing to do with each other differ by 1.4.
"""


def probe_batch(config: Any, max_tokens: int, device: torch.device, tokens: int = 1) -> PackedBatch:
    """Rows of some lengths with tokens of a model's vocabulary, by its configuration, so many at least; always the same."""
    beyond = (getattr(config, "sliding_window", None) or 0) + _BEYOND_THE_WINDOW
    longest = beyond if beyond in _LONGEST else _LONGEST.start
    lengths = np.minimum(np.array([longest, *_LENGTHS], dtype=np.int64), max_tokens)
    lengths = lengths.repeat(-(-tokens // int(lengths.sum())))
    vocabulary = [token for token in range(min(config.vocab_size, 1000)) if token != config.pad_token_id]
    ids = np.random.default_rng(0).choice(np.array(vocabulary, dtype=np.int32), int(lengths.sum()))
    return pack(torch.from_numpy(ids), lengths, device)


def difference(found_TD: Tensor, expected_TD: Tensor, dtype: torch.dtype) -> str:
    """A sentence if a token's hidden state is off by more of how far tokens lie apart than products of `dtype` explain, else ""."""
    expected_TD = expected_TD.float()
    spread = (expected_TD - expected_TD.mean(0)).norm(dim=1).mean()
    off = float(((found_TD.float() - expected_TD).norm(dim=1) / spread).max())
    return "" if off <= _TOLERANCES[dtype] else f"hidden states differ by {off:.2g} of their spread"


def cosines(found_RD: npt.NDArray[np.float32], expected_RD: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Of the vectors of each row, [R]; 1 where both are 0, as those of empty texts can be."""
    found, expected = found_RD.astype(np.float64), expected_RD.astype(np.float64)
    lengths_R = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
    same_R = (found == expected).all(axis=1)
    return np.where(same_R, 1.0, (found * expected).sum(axis=1) / np.maximum(lengths_R, np.finfo(np.float64).tiny))
