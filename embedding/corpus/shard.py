"""Rows and vectors to the table of one shard; `shards` makes a file of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from embedding.corpus.plan import Unit
from embedding.errors import EmbeddingJobError

EMBEDDING = "embedding"
NOT_FINITE = "the model gives a non-finite vector"
"""Why a row with a text can be rejected."""


def too_long(max_tokens: int) -> str:
    """Why a row is rejected under --long-text reject; the same sentence for all, so that a report can count them."""
    return f"the text has more than max_tokens={max_tokens} tokens"


def identified(unit: Unit, copied: pa.Table, *, has_id: bool) -> pa.Table:
    """The copied columns of a unit's rows; where the corpus has no id column, the source's uri and the row's number in it before them."""
    if has_id:
        return copied
    rows = np.arange(unit.first_row, unit.first_row + unit.num_rows, dtype=np.int64)
    table = pa.table({"source": pa.repeat(unit.source.uri, unit.num_rows), "row_index": rows})
    for field in copied.schema:
        table = table.append_column(field, copied.column(field.name))
    return table


def take_rows(table: pa.Table, rows: NDArray[np.int64]) -> pa.Table:
    """The rows with these ascending numbers, by slices: Arrow's own `take` knows no string_view, and copies."""
    runs = np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1)
    return pa.concat_tables([table.slice(run[0] if len(run) else 0, len(run)) for run in runs])


def shard_table(copied: pa.Table, values_RW: NDArray[Any], more: Mapping[str, pa.Array | NDArray[Any]]) -> pa.Table:
    """The copied columns, the vectors as they are stored, and further columns and vectors, R rows each; vectors as fixed-size lists."""
    table = copied
    for name, column in {EMBEDDING: values_RW, **more}.items():
        array = _fixed_size_lists(column) if isinstance(column, np.ndarray) else column
        table = table.append_column(pa.field(name, array.type, nullable=False), array)
    assert table.num_rows == len(values_RW)
    return table


def _fixed_size_lists(values_RW: NDArray[Any]) -> pa.FixedSizeListArray:
    kind = pa.list_(pa.field("element", pa.from_numpy_dtype(values_RW.dtype), nullable=False), values_RW.shape[1])
    return pa.FixedSizeListArray.from_arrays(pa.array(values_RW.reshape(-1)), type=kind)


def vector_columns_in(schema: pa.Schema) -> list[str]:
    """The columns of a shard that hold vectors: of the corpus' own columns, some of which may look alike, none stands behind the first."""
    behind = [schema.field(place) for place in range(schema.get_field_index(EMBEDDING), len(schema))]
    return [field.name for field in behind if pa.types.is_fixed_size_list(field.type)]


def vector_bytes(schema: pa.Schema) -> int:
    """Of the vectors in a row, before compression."""
    kinds = [schema.field(name).type for name in vector_columns_in(schema)]
    return int(sum(kind.list_size * kind.value_type.bit_width // 8 for kind in kinds))


def require_same_vectors(written: pa.Table, table: pa.Table, library: str) -> None:
    """Check that the vectors that were read back have the bits of those that were written.

    Raises:
        EmbeddingJobError: they have not.
    """
    if not all(np.array_equal(_bits(written.column(name)), _bits(table.column(name))) for name in vector_columns_in(table.schema)):
        raise EmbeddingJobError(f"the shard does not read back as it was written; this machine's memory or {library} library is faulty")


def _bits(vectors: pa.ChunkedArray) -> NDArray[np.uint8]:
    """The vectors' bit patterns: two NaNs can be the same, and two zeros differ."""
    chunks = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in vectors.chunks]
    return (np.concatenate(chunks) if len(chunks) > 1 else chunks[0] if chunks else np.empty(0, np.float32)).view(np.uint8)
