"""How the numbers of a vector are stored: whole, in half precision, or a bit each."""

# Shape suffixes: R rows, D dimensions.

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from embedding.config import OutputDtype

LARGEST_HALF = 65504.0
"""What float16 can hold."""
_STORED: dict[OutputDtype, Any] = {"float32": np.float32, "float16": np.float16, "binary": np.int8, "ubinary": np.uint8}


def stored_type(dtype: OutputDtype, dimensions: int) -> pa.DataType:
    """The type of the embedding column."""
    width = -(-dimensions // 8) if is_packed(dtype) else dimensions
    return pa.list_(pa.field("element", pa.from_numpy_dtype(_STORED[dtype]), nullable=False), width)


def is_packed(dtype: OutputDtype) -> bool:
    """Whether eight numbers share a byte."""
    return dtype in ("binary", "ubinary")


def stored(vectors_RD: NDArray[np.float32], dtype: OutputDtype) -> NDArray[Any]:
    """The vectors as they are stored; bits say which numbers are above 0, the first of eight being the byte's highest.

    As `quantize_embeddings` of sentence-transformers 6 does it, which takes 128 from the bytes of "binary".
    """
    if not is_packed(dtype):
        return vectors_RD.astype(_STORED[dtype], copy=False)
    bytes_ = np.packbits(vectors_RD > 0, axis=-1)
    return (bytes_ ^ 0x80).view(np.int8) if dtype == "binary" else bytes_


def loaded(values_RW: NDArray[Any]) -> NDArray[np.float32]:
    """What was stored as numbers to compute with: a bit becomes 1 or -1, those that fill up the last byte too."""
    if values_RW.dtype.itemsize > 1:
        return values_RW.astype(np.float32, copy=False)
    offset = np.uint8(0x80 if values_RW.dtype == np.int8 else 0)
    return np.unpackbits(np.bitwise_xor(values_RW.view(np.uint8), offset), axis=-1).astype(np.float32) * 2 - 1
