"""Whether two columns hold the same, value by value, whatever their type and chunks."""

from __future__ import annotations

import pyarrow as pa

_COMPARE_ROWS = 1024


def first_difference(found: pa.ChunkedArray, expected: pa.ChunkedArray) -> int | None:
    """The first row in which two columns of one type and length differ; NaN equals NaN."""
    for start in range(0, len(expected), _COMPARE_ROWS):
        one, other = found.slice(start, _COMPARE_ROWS), expected.slice(start, _COMPARE_ROWS)
        if one.equals(other):
            continue
        for row, (value, right) in enumerate(zip(one.to_pylist(), other.to_pylist(), strict=True)):
            if repr(value) != repr(right):
                return start + row
    return None
