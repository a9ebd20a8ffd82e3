"""How the numbers of a vector are stored: whole, in half precision, in 255 steps of a range, or a bit each."""

# Shape suffixes: R rows, D dimensions, W numbers as they are stored.

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from embedding.names import OutputDtype

Floats: TypeAlias = NDArray[np.float32]

LARGEST_HALF = 65504.0
"""What float16 can hold."""
_STEPS = 255
_OFFSET = 128
_STORED: dict[OutputDtype, Any] = {
    "float32": np.float32,
    "float16": np.float16,
    "int8": np.int8,
    "binary": np.int8,
    "ubinary": np.uint8,
}


def stored_type(dtype: OutputDtype, dimensions: int) -> pa.DataType:
    """The type of an embedding column."""
    width = -(-dimensions // 8) if is_packed(dtype) else dimensions
    return pa.list_(pa.field("element", pa.from_numpy_dtype(_STORED[dtype]), nullable=False), width)


def is_packed(dtype: OutputDtype) -> bool:
    """Whether eight numbers share a byte."""
    return dtype in ("binary", "ubinary")


def stored(vectors_RD: Floats, dtype: OutputDtype, ranges_2D: Floats | None = None) -> NDArray[Any]:
    """The vectors as they are stored, as `quantize_embeddings` of sentence-transformers 6 does it.

    int8: the step of `ranges_2D`, each dimension's least and greatest number, that a number lies in, from -128; one outside of the
    range is in the first step or the last, which earlier versions of sentence-transformers let wrap round.
    Bits say which numbers are above 0, the first of eight being the byte's highest; "binary" takes 128 from the bytes.
    """
    if dtype == "int8":
        assert ranges_2D is not None
        with np.errstate(over="ignore"):  # far outside of a narrow range, which is the last step as well
            steps_RD = np.floor((vectors_RD - ranges_2D[0]) / _steps(ranges_2D))
        return np.asarray(np.clip(steps_RD, 0, _STEPS) - _OFFSET, np.int8)
    if not is_packed(dtype):
        return vectors_RD.astype(_STORED[dtype], copy=False)
    bytes_ = np.packbits(vectors_RD > 0, axis=-1)
    return (bytes_ ^ 0x80).view(np.int8) if dtype == "binary" else bytes_


def loaded(values_RW: NDArray[Any], ranges_2D: Floats | None = None) -> Floats:
    """What was stored as numbers to compute with.

    With ranges, the middle of each step, no further than half a step from what was inside of the range. Without, a bit becomes 1 or -1,
    those that fill up the last byte too.
    """
    if ranges_2D is not None:
        return np.asarray(ranges_2D[0] + (values_RW.astype(np.float32) + np.float32(_OFFSET + 0.5)) * _steps(ranges_2D))
    if values_RW.dtype.itemsize > 1:
        return values_RW.astype(np.float32, copy=False)
    offset = np.uint8(0x80 if values_RW.dtype == np.int8 else 0)
    return np.unpackbits(np.bitwise_xor(values_RW.view(np.uint8), offset), axis=-1).astype(np.float32) * 2 - 1


def bounds(values_RD: NDArray[np.int8], ranges_2D: Floats) -> tuple[Floats, Floats]:
    """Between which numbers lies what was stored; the first and the last step have no end."""
    steps_D = _steps(ranges_2D)
    lows_RD = ranges_2D[0] + (values_RD.astype(np.float32) + _OFFSET) * steps_D
    highs_RD = lows_RD + steps_D
    lows_RD[values_RD == -_OFFSET] = -np.inf
    highs_RD[values_RD == _STEPS - _OFFSET] = np.inf
    return lows_RD, highs_RD


def lengths(values_RW: NDArray[Any], ranges_2D: Floats | None = None) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The least and the greatest length of what was stored as these rows: one and the same, but for int8."""
    if ranges_2D is None:
        vectors_RD = loaded(values_RW)
        norms_R = np.sqrt(np.einsum("rd,rd->r", vectors_RD, vectors_RD, dtype=np.float64))
        return norms_R, norms_R
    lows_RD, highs_RD = (bound.astype(np.float64) for bound in bounds(values_RW, ranges_2D))
    least_RD = np.clip(0.0, lows_RD, highs_RD)
    return np.linalg.norm(least_RD, axis=1), np.linalg.norm(np.maximum(np.abs(lows_RD), np.abs(highs_RD)), axis=1)


def outside(vectors_RD: Floats, ranges_2D: Floats) -> int:
    """How many numbers are outside of the ranges, and so are clipped to the first step or the last.

    Not those outside by less than a hundredth of a step: the same text rounds otherwise in another batch than that of the sample.
    """
    margin_D = _steps(ranges_2D) / 100
    return int(np.count_nonzero((vectors_RD < ranges_2D[0] - margin_D) | (vectors_RD > ranges_2D[1] + margin_D)))


def rounding(ranges_2D: Floats) -> float:
    """How far int8 may move a vector whose numbers are inside of the ranges."""
    return float(np.linalg.norm(_steps(ranges_2D).astype(np.float64))) / 2


def ranges_of(vectors_RD: Floats) -> Floats:
    """[2, D] the least and the greatest number of each dimension, of R >= 1 vectors, as int8 needs them.

    A dimension that is the same in all of them gets a range round its number, as wide as those of the others are in the middle: what it
    was comes back, and another number is told from it.
    """
    ranges_2D = np.stack([vectors_RD.min(axis=0), vectors_RD.max(axis=0)]).astype(np.float32)
    flat_D = is_flat(ranges_2D)
    if flat_D.any():
        widths_D = (ranges_2D[1] - ranges_2D[0])[~flat_D]
        centres_D = ranges_2D[:, flat_D].mean(axis=0)
        width = np.maximum(np.median(widths_D) if len(widths_D) else 1.0, np.abs(centres_D) / 64)
        ranges_2D[:, flat_D] = centres_D - width / 2, centres_D + width / 2
    return ranges_2D


def is_flat(ranges_2D: Floats) -> NDArray[np.bool_]:
    """[D] which ranges do not have a number of float32 for each step, those that end before they begin among them."""
    wide_2D = ranges_2D.astype(np.float64)
    return np.asarray(wide_2D[1] - wide_2D[0] <= _STEPS * np.spacing(np.abs(ranges_2D).max(axis=0)))


def _steps(ranges_2D: Floats) -> Floats:
    steps_D: Floats = (ranges_2D[1] - ranges_2D[0]) / np.float32(_STEPS)
    return steps_D
