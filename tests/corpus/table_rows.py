"""What the tests of tables share: rows to put into them, and what a run would read of them."""

from __future__ import annotations

import sys
from typing import Any

import pyarrow as pa
import pytest

from embedding.corpus.columns import Columns
from embedding.corpus.plan import plan_units
from embedding.corpus.reader import read_layouts, read_unit
from embedding.corpus.sources import list_inputs

NEEDED = ("id", "text")


def rows(first: int, stop: int, **more: list[Any]) -> pa.Table:
    ids = list(range(first, stop))
    return pa.table({"id": pa.array(ids, pa.int64()), "text": [f"text {number}" for number in ids], **more})


def ids_read(url: str, needed: tuple[str, ...] = NEEDED) -> list[int]:
    """What a run would embed, sorted."""
    sources = list_inputs([url], needed=needed).sources
    columns = Columns("text", ("id",))
    units = plan_units(read_layouts(sources, columns), unit_rows=10, fingerprint="f")
    return sorted(number for unit in units for number in read_unit(unit, columns).copied["id"].to_pylist())


def forget_library(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the library were not installed."""
    ours = [name for name in sys.modules if name in ("embedding.corpus.tables.delta", "embedding.corpus.tables.iceberg")]
    for name in [*ours, *(name for name in sys.modules if name.partition(".")[0] == package)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
