"""What every format answers about a source file."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa

START = (0, 0)
_ROWS_PER_BYTE = 10_000
"""More no file holds in earnest; one that lies may ask for more units than the driver has memory for."""


@dataclass(frozen=True, slots=True)
class Found:
    """What a file holds, as its format tells it without reading more than it must."""

    schema: pa.Schema | None
    """None where the file has no rows that would say."""
    row_groups: tuple[int, ...]
    """Rows of each part that is cheap to begin at; a format without such parts has one."""
    marks: tuple[tuple[int, int], ...] = (START,)
    """Ascending (row, place): a reader of a later row may begin there. What a place is, the format knows."""


class RowError(ValueError):
    """What is wrong with one row; the sentence says which one, and is to follow the file's name."""


def require_possible(rows: tuple[int, ...], size: int) -> None:
    """Check what a file says about its rows.

    Raises:
        ValueError: `size` bytes hold no such rows.
    """
    if min(rows, default=0) < 0 or sum(rows) > _ROWS_PER_BYTE * size:
        raise ValueError(f"it is said to have {sum(rows)} rows in {size} bytes")
