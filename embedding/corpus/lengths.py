"""Lengths of texts in tokens, counted in the same few bins everywhere, so that records of units can be added up.

Bins are one token wide below 8 and a quarter of an octave above (8, 10, 12, 14, 16, 20, ...), as HdrHistogram makes them: 32 bins
reach 512 tokens, 52 reach 16,384, and no bin is wider than a quarter of the lengths in it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

LENGTH_EDGES = np.array([*range(8), *((4 + quarter) << (octave - 2) for octave in range(3, 31) for quarter in range(4))], np.int64)
"""Tokens from which each bin counts; it ends before the next one begins."""


def length_counts(lengths: NDArray[Any]) -> list[int]:
    """How many of the lengths fall into each bin, up to the last bin that has one."""
    counts: list[int] = np.bincount(np.searchsorted(LENGTH_EDGES, lengths, side="right") - 1).tolist()
    return counts
