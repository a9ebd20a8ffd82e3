"""Batches by tiny literals and by set laws."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedding.model.batching import batch_end, default_batch_tokens, distinct_rows, gather_rows, longest_first, offsets_of


def batches(lengths: list[int], batch_tokens: int, *, padded: bool) -> list[list[int]]:
    array = np.array(lengths, dtype=np.int64)
    order = longest_first(array)
    found, start = [], 0
    while start < len(order):
        end = batch_end(array[order], start, batch_tokens, padded=padded)
        found.append(order[start:end].tolist())
        start = end
    return found


def test_offsets() -> None:
    assert offsets_of(np.array([3, 2, 4])).tolist() == [0, 3, 5, 9]
    assert offsets_of(np.array([], dtype=np.int64)).tolist() == [0]


def test_rows_are_gathered_in_the_given_order() -> None:
    values, offsets = gather_rows(np.arange(9, dtype=np.int32), np.array([0, 3, 5, 9]), np.array([2, 0]))
    assert values.tolist() == [5, 6, 7, 8, 0, 1, 2]
    assert offsets.tolist() == [0, 4, 7]


@pytest.mark.parametrize(
    ("padded", "expected"),
    [
        (False, [[3], [0, 2], [1, 4, 5]]),  # 9 | 4 + 4 | 3 + 3 + 1
        (True, [[3], [0, 2], [1, 4], [5]]),  # 1 x 9 | 2 x 4 | 2 x 3 | 1 x 1
    ],
)
def test_budget_of_eight(padded: bool, expected: list[list[int]]) -> None:
    assert batches([4, 3, 4, 9, 3, 1], 8, padded=padded) == expected


def test_no_packed_batch_has_more_rows_than_a_gpu_launches() -> None:
    assert [len(batch) for batch in batches([2] * 65_537, 262_144, padded=False)] == [65_535, 2]


@given(st.lists(st.integers(1, 50), max_size=60), st.integers(1, 120), st.booleans())
def test_each_row_is_in_one_batch_within_the_budget(lengths: list[int], batch_tokens: int, padded: bool) -> None:
    found = batches(lengths, batch_tokens, padded=padded)
    assert sorted(row for batch in found for row in batch) == list(range(len(lengths)))
    for batch in found:
        sizes = [lengths[row] for row in batch]
        cells = len(sizes) * max(sizes) if padded else sum(sizes)
        assert cells <= batch_tokens or len(batch) == 1
    in_order = [lengths[row] for batch in found for row in batch]
    assert in_order == sorted(lengths, reverse=True)


def test_equal_rows_are_found() -> None:
    rows, places = distinct_rows(np.array([7, 8, 9, 7, 8, 9, 9], dtype=np.int32), np.array([0, 2, 3, 5, 7]))
    assert rows.tolist() == [0, 1, 3]
    assert places.tolist() == [0, 1, 0, 2]


def test_equal_digests_are_no_equal_rows() -> None:
    """Only some tokens of a long row are in its digest."""
    values = np.zeros((3, 40), dtype=np.int32)
    values[1, 1] = 5
    rows, places = distinct_rows(values.reshape(-1), np.array([0, 40, 80, 120]))
    assert (rows.tolist(), places.tolist()) == ([0, 1], [0, 1, 0])


@given(st.lists(st.lists(st.integers(0, 2), max_size=3), max_size=30))
def test_rows_are_equal_where_their_tokens_are(texts: list[list[int]]) -> None:
    flat = np.array([token for text in texts for token in text], dtype=np.int32)
    rows, places = distinct_rows(flat, offsets_of(np.array([len(text) for text in texts], dtype=np.int64)))
    kinds = list(dict.fromkeys(map(tuple, texts)))
    assert rows.tolist() == [texts.index(list(kind)) for kind in kinds]
    assert places.tolist() == [kinds.index(tuple(text)) for text in texts]


def test_the_default_never_splits_a_text() -> None:
    assert default_batch_tokens("cpu", 100_000) == 100_000
    assert default_batch_tokens("cuda", 512) > default_batch_tokens("cpu", 512) >= 512
