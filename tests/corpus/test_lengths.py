"""Histograms of token lengths: few bins, every row in one of them."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from embedding.corpus.lengths import LENGTH_EDGES, length_counts


def test_bins_are_fine_below_and_a_quarter_of_an_octave_above() -> None:
    assert LENGTH_EDGES[:20].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56]
    assert length_counts(np.array([], np.int32)) == []
    assert length_counts(np.array([2, 9, 8, 10, 2], np.int32)) == [0, 0, 2, 0, 0, 0, 0, 0, 2, 1]
    assert len(length_counts(np.array([511], np.int32))) == 32


@given(st.lists(st.integers(0, 2**20), min_size=1))
def test_every_length_is_counted_in_its_bin(lengths: list[int]) -> None:
    counts = length_counts(np.array(lengths, np.int32))
    expected = [sum(low <= length < high for length in lengths) for low, high in pairwise(LENGTH_EDGES)]
    assert counts == expected[: len(counts)]
    assert sum(counts) == len(lengths)
