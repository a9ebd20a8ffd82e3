"""Which units travel through Ray together. Knows no Ray.

A row of a dataset costs Ray's driver some 10 ms, whatever it holds. For a unit with seconds of work that is nothing; of a corpus of
small files, it would be most of the time. So small units share a row: a parcel. Nothing else is shared: each unit is read, tried,
embedded and committed as if it came alone, and its shard has the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, TypeAlias

from embedding.corpus.plan import Unit

Parcel: TypeAlias = Sequence[Unit]

_PARCELS_PER_WORKER: Final = 32
"""At least, before units share any: so that none is left alone with a full one at the end, and progress can be seen."""
_MOST_UNITS: Final = 64
"""Of a parcel: Ray's part is small by then, and a process that dies begins its parcel again."""
_MOST_BYTES: Final = 2**23
"""Of the files of a parcel's units: few rows can hold long texts, and compressed ones that are many times as large."""


def parcels_of(units: Sequence[Unit], *, rows: int, workers: int) -> list[list[Unit]]:
    """The units in their order, neighbours together where they are small.

    Args:
        units: what is to be done.
        rows: that a parcel of several may have, as many as one unit may.
        workers: that they are for.
    """
    most = min(_MOST_UNITS, max(1, len(units) // (_PARCELS_PER_WORKER * workers)))
    found: list[list[Unit]] = []
    rows_left = bytes_left = 0
    for unit in units:
        if not found or len(found[-1]) == most or unit.num_rows > rows_left or unit.source.size > bytes_left:
            found.append([])
            rows_left, bytes_left = rows, _MOST_BYTES
        found[-1].append(unit)
        rows_left, bytes_left = rows_left - unit.num_rows, bytes_left - unit.source.size
    return found


def dealt(parcels: Sequence[Parcel], tasks: int) -> list[Parcel]:
    """The parcels dealt out to read tasks, each of which begins with its largest: at the end no process is left alone with a large one.

    Ray cuts the list into runs of equal length, the first ones a parcel longer where that does not work out.
    """
    ordered = sorted(parcels, key=lambda parcel: -sum(unit.num_rows for unit in parcel))
    return [parcel for task in range(tasks) for parcel in ordered[task::tasks]]
