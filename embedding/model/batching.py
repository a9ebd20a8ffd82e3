"""Rows into batches: equal ones once, sorted by length, cut by a budget of tokens. Plain numpy, no torch."""

# Shape suffixes: T packed tokens, R rows.

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Int64Array = npt.NDArray[np.int64]

_BATCH_TOKENS = {"cpu": 1024, "cuda": 131_072}
"""A core computes a batch by itself and has the hidden states of a layer in its cache; a GPU needs some ten thousand tokens to be busy."""
_KERNEL_ROWS = 65_535
"""Flash attention has a row of the batch in the second axis of its CUDA grid, whose limit this is."""
_SAMPLES = 12
"""Tokens of a row, evenly spread over it, that tell most rows apart."""
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
"""Odd, so that no token's bits are lost but by overflow."""


def default_batch_tokens(device_type: str, max_tokens: int) -> int:
    """A batch that keeps a device of that type (cpu, cuda) busy; never below one text of `max_tokens`."""
    return max(_BATCH_TOKENS.get(device_type, _BATCH_TOKENS["cpu"]), max_tokens)


def distinct_rows(values_T: npt.NDArray[np.int32], offsets: Int64Array) -> tuple[Int64Array, Int64Array]:
    """(the first row of each kind, in row order; for every row the place of its kind among them).

    Rows "7 8", "9", "7 8", "9 9" -> 0, 1, 3 and 0, 1, 0, 2. Some tokens of each row sort out those that have no equal; only the
    others are compared as a whole, so that a corpus without duplicates costs next to nothing.
    """
    rows_R = np.arange(len(offsets) - 1)
    first_R = rows_R.copy()
    maybe_equal = _maybe_equal(values_T, offsets)
    content = values_T.view(np.uint8).data
    rows, starts, ends = (each.tolist() for each in (maybe_equal, 4 * offsets[:-1][maybe_equal], 4 * offsets[1:][maybe_equal]))
    seen: dict[bytes, int] = {}
    first_R[maybe_equal] = [seen.setdefault(bytes(content[start:end]), row) for row, start, end in zip(rows, starts, ends, strict=True)]
    is_first_R = first_R == rows_R
    return np.flatnonzero(is_first_R), (np.cumsum(is_first_R) - 1)[first_R]


def _maybe_equal(values_T: npt.NDArray[np.int32], offsets: Int64Array) -> Int64Array:
    """Rows that share their length and a digest of a few of their tokens with another row."""
    starts_R, lengths_R = offsets[:-1], np.diff(offsets)
    digest_R = lengths_R.astype(np.uint64)
    for sample in range(_SAMPLES if len(values_T) else 0):
        place_R = starts_R + (lengths_R - 1).clip(min=0) * sample // (_SAMPLES - 1)
        digest_R = digest_R * _MULTIPLIER + values_T[place_R.clip(max=len(values_T) - 1)].astype(np.uint64)
    digest_R[lengths_R == 0] = 0
    _, kind_R, counts = np.unique(digest_R, return_inverse=True, return_counts=True)
    return np.flatnonzero(counts[kind_R] > 1)


def longest_first(lengths_R: Int64Array) -> Int64Array:
    """Row numbers by falling length, equal lengths in row order, so that the same rows always form the same batches."""
    return np.argsort(-lengths_R, kind="stable")


def batch_end(sorted_lengths_R: Int64Array, start: int, batch_tokens: int, *, padded: bool) -> int:
    """The end (exclusive) of the batch that begins at row `start` of rows sorted by falling length.

    A packed batch holds at most `batch_tokens` tokens in 65,535 rows; a padded one at most `batch_tokens` cells, which is its number of
    rows times its longest row. A row above the budget is a batch of its own. Every row has a token at least.
    """
    if padded:
        return min(len(sorted_lengths_R), start + max(1, batch_tokens // int(sorted_lengths_R[start])))
    most = min(batch_tokens + 1, _KERNEL_ROWS)  # a batch cannot have more rows than tokens
    totals = np.cumsum(sorted_lengths_R[start : start + most])
    return start + max(1, int(np.searchsorted(totals, batch_tokens, side="right")))


def split_rows(values_T: npt.NDArray[np.int32], offsets: Int64Array) -> list[npt.NDArray[np.int32]]:
    """Each row's values."""
    return np.split(values_T, offsets[1:-1])


def join_rows(rows: list[npt.NDArray[np.int32]]) -> tuple[npt.NDArray[np.int32], Int64Array]:
    """The flat values of the rows, one at least, and their offsets."""
    return np.concatenate(rows), offsets_of(np.fromiter(map(len, rows), dtype=np.int64))


def gather_rows(values_T: npt.NDArray[np.int32], offsets: Int64Array, rows: Int64Array) -> tuple[npt.NDArray[np.int32], Int64Array]:
    """The flat values and offsets of `rows`, in that order. (lengths 3, 2, 4; rows 2, 0 -> offsets 0, 4, 7)"""
    lengths = np.diff(offsets)[rows]
    new_offsets = offsets_of(lengths)
    index = np.arange(new_offsets[-1]) + np.repeat(offsets[rows] - new_offsets[:-1], lengths)
    return values_T[index], new_offsets


def offsets_of(lengths_R: npt.NDArray[np.integer]) -> Int64Array:
    """Where each row begins, and the end of the last: lengths 3, 2, 4 -> 0, 3, 5, 9."""
    offsets = np.zeros(len(lengths_R) + 1, dtype=np.int64)
    np.cumsum(lengths_R, out=offsets[1:])
    return offsets
