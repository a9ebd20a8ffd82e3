"""Which rows of a unit cannot be embedded, and why, before any model is asked: the run and its proof must agree on them."""

from __future__ import annotations

import pyarrow as pa

from embedding.corpus.reader import UnitRows, text_faults


def row_faults(rows: UnitRows) -> dict[int, str]:
    """The rows that have no text, could not be read, or have a value that no shard should hold, with the reason."""
    copied: dict[int, str] = {}
    for name in reversed(rows.copied.column_names):  # of several columns, the first is named
        copied |= dict.fromkeys(_undecodable(rows.copied.column(name)), f"column {name!r} is not valid UTF-8")
    return copied | text_faults(rows.text) | dict(rows.faults)


def _undecodable(column: pa.ChunkedArray) -> list[int]:
    """Rows with bytes that are no text where their type says text: readers of the shard would fail on it."""
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        return [row for row, value in enumerate(column) if not _is_decodable(value)]
    return []


def _is_decodable(value: pa.Scalar) -> bool:
    try:
        value.as_py()
    except UnicodeDecodeError:
        return False
    except (ValueError, OverflowError):  # such as a date that Python does not have
        return True
    return True


def id_text(ids: pa.ChunkedArray | None, row: int) -> str | None:
    """A row's id as text, None where there is none that is."""
    if ids is None or not ids[row].is_valid or not _is_decodable(ids[row]):
        return None
    return str(ids[row].as_py())
