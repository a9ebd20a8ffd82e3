"""What a storm must leave behind: the output of an undisturbed run, byte for byte, and every row in exactly one place."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

Files: TypeAlias = Mapping[str, bytes]
"""Everything in an output, by name."""


def differences(found: Files, expected: Files, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Every way in which an output is not the `expected` one of an undisturbed run over these source rows; empty where there is none."""
    return [
        *_unequal(found, expected, "data/"),
        *_unequal(found, expected, "_control/rejected/"),
        *_unequal(found, expected, "_control/manifest.parquet"),
        *_unequal(found, expected, "_SUCCESS"),
        *[f"{name} is left" for name in found if name.startswith("_control/tmp/")],
        *_misplaced(found, rows),
    ]


def _unequal(found: Files, expected: Files, prefix: str) -> Iterator[str]:
    names = sorted(name for name in {*found, *expected} if name.startswith(prefix))
    if not names:
        yield f"neither output has {prefix}"
    for name in names:
        if found.get(name) != expected.get(name):
            yield f"{name} is {'missing' if name not in found else 'surplus' if name not in expected else 'another'}"


def _misplaced(found: Files, rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Rows that are not in exactly one shard or, without a text, listed exactly once with a reason."""
    embedded = Counter(row["id"] for row in _rows(found, "data/"))
    rejected = Counter(int(row["id"]) for row in _rows(found, "_control/rejected/") if row["reason"])
    good = Counter(row["id"] for row in rows if row["text"] is not None)
    bad = Counter(row["id"] for row in rows if row["text"] is None)
    for place, there, expected in (("in a shard", embedded, good), ("listed as rejected", rejected, bad)):
        for row in sorted(there.keys() | expected.keys()):
            if there[row] != expected[row]:
                yield f"row {row} is {there[row]} times {place}, not {expected[row]} times"


def _rows(found: Files, prefix: str) -> Iterator[dict[str, Any]]:
    for name, data in found.items():
        if name.startswith(prefix):
            try:
                yield from pq.read_table(io.BytesIO(data)).to_pylist()
            except pa.ArrowException:
                continue  # it is another than expected, which `_unequal` says
