"""The columns of a shard that hold a row's vector: `embedding`, and one for each further, smaller number of dimensions."""

# Shape suffixes: R rows, D dimensions of one column, W numbers of all columns side by side, S as they are stored.

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from embedding.corpus.numbers import Floats, is_flat, outside, ranges_of, stored, stored_type
from embedding.names import OutputDtype, vector_columns

Calibration: TypeAlias = dict[str, list[list[float]]]
"""By column, the least and the greatest number of each dimension; empty but for int8. As JSON has it, in job.json and in footers."""
TO_BE_MEASURED = "to be measured"
"""Stands for the digest of a calibration in a plan for an output that is not begun yet."""


@dataclass(frozen=True)
class VectorColumns:
    """What the vector columns are called, and what is in them."""

    dimensions: tuple[int, ...]
    """Of each, falling."""
    dtype: OutputDtype = "float32"
    calibration: Calibration = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the columns, in their order."""
        return vector_columns(self.dimensions)

    @property
    def types(self) -> dict[str, pa.DataType]:
        """By name."""
        return {name: stored_type(self.dtype, number) for name, number in zip(self.names, self.dimensions, strict=True)}

    @property
    def row_bytes(self) -> int:
        """Of a row, before compression."""
        return sum(kind.list_size * kind.value_type.bit_width // 8 for kind in self.types.values())

    @cached_property
    def ranges(self) -> dict[str, Floats]:
        """[2, D] of the columns that have some."""
        return {name: np.array(each, np.float32) for name, each in self.calibration.items()}

    def parts(self, vectors_RW: Floats) -> dict[str, Floats]:
        """Views of the vectors that lie side by side, by column."""
        return {name: vectors_RW[:, part] for name, part in zip(self.names, side_by_side(self.dimensions), strict=True)}

    def stored(self, vectors_RW: Floats) -> dict[str, NDArray[Any]]:
        """[R, S] of each column, as it is stored."""
        return {name: stored(part, self.dtype, self.ranges.get(name)) for name, part in self.parts(vectors_RW).items()}

    def clipped(self, vectors_RW: Floats) -> int:
        """How many of the numbers their ranges do not hold."""
        return sum(outside(part, self.ranges[name]) for name, part in self.parts(vectors_RW).items() if name in self.ranges)

    def calibrated(self, vectors_RW: Floats) -> Calibration:
        """The ranges of these vectors, R >= 1."""
        return {name: as_json(ranges_of(part)) for name, part in self.parts(vectors_RW).items()}

    def fault(self, calibration: Mapping[str, Any]) -> str | None:
        """Why these columns cannot be stored with a calibration, if they cannot."""
        if list(calibration) != list(self.names):
            return f"it has ranges for {', '.join(calibration) or 'no column'}, not for {', '.join(self.names)}"
        for (name, each), number in zip(calibration.items(), self.dimensions, strict=True):
            ranges_2D = np.array(each, np.float32)
            if ranges_2D.shape != (2, number):
                return f"its ranges for {name} have the shape {ranges_2D.shape}, not (2, {number})"
            with np.errstate(over="ignore", invalid="ignore"):
                if not np.isfinite([*ranges_2D, ranges_2D[1] - ranges_2D[0]]).all():
                    return f"its ranges for {name} contain a number that is not finite or too large"
            if (flat_D := is_flat(ranges_2D)).any():
                dimension = int(np.argmax(flat_D))
                low, high = ranges_2D[:, dimension].tolist()
                return f"the range of dimension {dimension} of {name} is {low:g} to {high:g}, too narrow for 255 steps"
        return None


def side_by_side(dimensions: Sequence[int]) -> list[slice]:
    """Where each column's numbers are in a row that has those of all columns."""
    return [slice(start, end) for start, end in pairwise(accumulate(dimensions, initial=0))]


def as_json(ranges_2D: Floats) -> list[list[float]]:
    """The ranges as few digits that are read as the same float32."""
    return [[float(str(number)) for number in row] for row in ranges_2D]


def digest(calibration: Calibration) -> str:
    """Stands for the calibration in the settings of an output, and so in its fingerprint."""
    return hashlib.sha256(json.dumps(calibration, sort_keys=True).encode()).hexdigest()[:16] if calibration else TO_BE_MEASURED
