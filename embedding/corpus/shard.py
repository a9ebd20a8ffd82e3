"""Rows and vectors to the bytes of one shard: Parquet that every reader opens, the same bytes for the same input."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from embedding.corpus.plan import Unit
from embedding.errors import EmbeddingJobError

EMBEDDING = "embedding"
FOOTER_KEY = "embedding."
"""Prefix of the footer keys that say where a shard comes from."""
_SEAL = f"{FOOTER_KEY}seal"
NOT_FINITE = "the model gives a non-finite vector"
"""Why a row with a text can be rejected."""
_ROW_GROUP_BYTES = 64 * 2**20
"""Raw vector bytes per row group: a reader needs memory for one row group, not for a shard."""


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


def shard_bytes(table: pa.Table, footer: Mapping[str, object], *, byte_stream_split: bool = False) -> bytes:
    """The table as one complete Parquet file, with `footer` as JSON values under `embedding.*` keys.

    Vectors are PLAIN with zstd 1: no dictionary helps on floats, and PLAIN is what every reader knows. BYTE_STREAM_SPLIT on request.

    Raises:
        EmbeddingJobError: what was written does not read back as it went in.
    """
    metadata = {f"{FOOTER_KEY}{key}": json.dumps(value, sort_keys=True) for key, value in sorted(footer.items())}
    metadata[_SEAL] = _seal(metadata)
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), **metadata})
    vectors = vector_columns_in(table.schema)
    kinds = [table.schema.field(name).type for name in vectors]
    vector_bytes = sum(kind.list_size * kind.value_type.bit_width // 8 for kind in kinds)
    sink = pa.BufferOutputStream()
    plain = [field.name for field in table.schema if not pa.types.is_nested(field.type)]
    pq.write_table(
        table,
        sink,
        row_group_size=max(1, _ROW_GROUP_BYTES // vector_bytes),
        compression="zstd",
        compression_level=1,
        use_dictionary=plain,
        use_byte_stream_split=[f"{name}.list.element" for name in vectors] if byte_stream_split else False,
        write_statistics=plain,
        write_page_checksum=True,  # else a flipped bit of a vector is another number, and nothing shows it
    )
    data = sink.getvalue()
    written = pq.read_table(pa.BufferReader(data), columns=vectors, use_threads=False)
    if not all(np.array_equal(_bits(written.column(name)), _bits(table.column(name))) for name in vectors):
        raise EmbeddingJobError("the shard does not read back as it was written; this machine's memory or Parquet library is faulty")
    return bytes(data.to_pybytes())


def shard_footer(file: BinaryIO) -> dict[str, Any]:
    """What `shard_bytes` was given as footer; closes the file.

    Raises:
        ValueError: it is not what was written.
    """
    with file:
        return footer_facts(pq.read_metadata(file).metadata)


def footer_facts(metadata: Mapping[bytes, bytes] | None) -> dict[str, Any]:
    """What `shard_bytes` was given as footer, from the key-values of a Parquet file.

    Raises:
        ValueError: it is not what was written.
    """
    found = {key.decode(): value.decode() for key, value in (metadata or {}).items()}
    facts = {key: value for key, value in found.items() if key.startswith(FOOTER_KEY)}
    if facts.pop(_SEAL, None) not in (None, _seal(facts)):
        raise ValueError("the facts in the footer are damaged")
    return {key.removeprefix(FOOTER_KEY): json.loads(value) for key, value in facts.items()}


def _seal(facts: Mapping[str, str]) -> str:
    """Digest of the footer's facts, which have no checksum of Parquet's own."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _bits(vectors: pa.ChunkedArray) -> NDArray[np.uint8]:
    """The vectors' bit patterns: two NaNs can be the same, and two zeros differ."""
    chunks = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in vectors.chunks]
    return (np.concatenate(chunks) if len(chunks) > 1 else chunks[0] if chunks else np.empty(0, np.float32)).view(np.uint8)
