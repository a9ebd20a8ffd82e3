"""What every format answers about a source file."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import pyarrow as pa

START = (0, 0)
_ROWS_PER_BYTE = 10_000
"""No real file has more; one that lies about its rows could ask for more units than the driver has memory for."""


@dataclass(frozen=True, slots=True)
class Found:
    """What a file holds, as its format tells it without reading more than it must."""

    schema: pa.Schema | None
    """None where the file has no rows that would show it."""
    row_groups: tuple[int, ...]
    """Rows of each part that is cheap to begin at; a format without such parts has one."""
    marks: tuple[tuple[int, int], ...] = (START,)
    """Ascending (row, place): a reader of a later row may begin there. What a place is, the format knows."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows as their format reads them."""

    table: pa.Table
    """The columns that were asked for, or those that their paths begin with, and perhaps others."""
    faults: dict[int, str] = field(default_factory=dict)
    """Why rows of the table could not be read, by their number in it; they are null but for the columns that could be read."""


def joined(parts: Iterable[Rows], schema: pa.Schema) -> Rows:
    """The rows of all parts, whose columns are those of the schema."""
    tables, rows = [schema.empty_table()], 0
    faults: dict[int, str] = {}
    for part in parts:
        tables.append(part.table)
        faults |= {rows + row: reason for row, reason in part.faults.items()}
        rows += part.table.num_rows
    return Rows(pa.concat_tables(tables), faults)


class RowError(ValueError):
    """A file cannot be split into rows from some row on; the sentence follows the file's name."""


def require_possible(rows: tuple[int, ...], size: int) -> None:
    """Check what a file says about its rows.

    Raises:
        ValueError: `size` bytes hold no such rows.
    """
    if min(rows, default=0) < 0 or sum(rows) > _ROWS_PER_BYTE * size:
        raise ValueError(f"it claims to have {sum(rows)} rows in {size} bytes")
