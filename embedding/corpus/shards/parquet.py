"""Shards as Parquet that every reader opens."""

from __future__ import annotations

import io
import json
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq

from embedding.corpus.columns import field_at, has_column
from embedding.corpus.plan import PARQUET_NAMES, ShardNames
from embedding.corpus.reader import Fits
from embedding.corpus.shard import require_same_vectors, vector_bytes, vector_columns_in
from embedding.corpus.shards.footer import require_seal, seal
from embedding.corpus.shards.form import Picked, Published, ReadShard, Rows
from embedding.corpus.storage import Storage

log = logging.getLogger(__name__)

_PREFIX = "embedding."
"""Prefix of the footer keys that say where a shard comes from."""
_SEAL = f"{_PREFIX}seal"
_ROW_GROUP_BYTES = 64 * 2**20
"""Raw vector bytes per row group: a reader needs memory for one row group, not for a shard."""
_BUFFER_BYTES = 2**20
"""A ranged read's size: pages are decoded as they come, so that a shard is not fetched whole."""


@dataclass(frozen=True)
class ParquetShards:
    """Vectors are PLAIN with zstd 1: no dictionary helps on floats, and PLAIN is what every reader knows. See `ShardForm`."""

    byte_stream_split: bool = False
    """Encode vectors as BYTE_STREAM_SPLIT instead."""
    names: ClassVar[ShardNames] = PARQUET_NAMES
    libraries: ClassVar[tuple[str, ...]] = ()

    def require(self) -> None:
        """See ShardForm; every installation has pyarrow."""

    def fits(self, columns: Sequence[str]) -> Fits:
        """See ShardForm; each shard has its own types, so files that differ are only told of."""
        return Alike(columns)

    def encode(self, table: pa.Table, footer: Mapping[str, object]) -> bytes:
        """See ShardForm; `footer` stands as JSON values under `embedding.*` keys."""
        metadata = {f"{_PREFIX}{key}": json.dumps(value, sort_keys=True) for key, value in sorted(footer.items())}
        metadata[_SEAL] = seal(metadata)
        table = table.replace_schema_metadata({**(table.schema.metadata or {}), **metadata})
        vectors = vector_columns_in(table.schema)
        sink = pa.BufferOutputStream()
        plain = [field.name for field in table.schema if not pa.types.is_nested(field.type)]
        pq.write_table(
            table,
            sink,
            row_group_size=max(1, _ROW_GROUP_BYTES // vector_bytes(table.schema)),
            compression="zstd",
            compression_level=1,
            use_dictionary=plain,
            use_byte_stream_split=[f"{name}.list.element" for name in vectors] if self.byte_stream_split else False,
            write_statistics=plain,
            write_page_checksum=True,  # else a flipped bit of a vector is another number, and nothing shows it
        )
        data = sink.getvalue()
        require_same_vectors(pq.read_table(pa.BufferReader(data), columns=vectors, use_threads=False), table, "Parquet")
        return bytes(data.to_pybytes())

    def facts(self, file: BinaryIO) -> dict[str, Any]:
        """See ShardForm."""
        with file:
            return _facts_in(pq.read_metadata(file).metadata)

    def read(self, data: bytes) -> ReadShard:
        """See ShardForm; each page's checksum is compared."""
        file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
        table = file.read(use_threads=False)
        table.validate(full=True)
        return ReadShard(table, self.facts(io.BytesIO(data)), file.metadata.created_by)

    def is_of_library(self, versions: Mapping[str, str], writer: str) -> bool:
        """See ShardForm; the file says it twice, so that damage to one of them is noticed as damage."""
        return bool(versions["pyarrow"] == pa.__version__ or writer == f"parquet-cpp-arrow version {pa.cpp_version}")

    def returned(self, column: pa.ChunkedArray) -> pa.ChunkedArray:
        """See ShardForm."""
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table({"column": column}), sink)
        return pq.read_table(pa.BufferReader(sink.getvalue()), use_threads=False).column("column")

    def scan(self, storage: Storage, name: str, columns: Picked, rows: Rows, rng: random.Random) -> tuple[pa.Table, dict[str, Any]]:
        """See ShardForm; the beginning of one row group."""
        with storage.open(name) as stream:
            file = pq.ParquetFile(stream, pre_buffer=False, buffer_size=_BUFFER_BYTES)
            facts, schema = _facts_in(file.metadata.metadata), file.schema_arrow
            groups = [group for group in range(file.num_row_groups) if file.metadata.row_group(group).num_rows]
            if not groups:
                return schema.empty_table(), facts
            batches = file.iter_batches(rows(schema), row_groups=[rng.choice(groups)], columns=columns(schema), use_threads=False)
            return pa.Table.from_batches([next(batches)]), facts

    def publish(self, storage: Storage, manifest: pa.Table, still_ours: Callable[[], None]) -> None:
        """See ShardForm; readers list the files."""

    def published(self, storage: Storage) -> Published | None:
        """See ShardForm."""
        del storage
        return None


def _facts_in(metadata: Mapping[bytes, bytes] | None) -> dict[str, Any]:
    found = {key.decode(): value.decode() for key, value in (metadata or {}).items()}
    facts = {key: value for key, value in found.items() if key.startswith(_PREFIX)}
    if (sealed := facts.pop(_SEAL, None)) is not None:
        require_seal(facts, sealed)
    return {key.removeprefix(_PREFIX): json.loads(value) for key, value in facts.items()}


PARQUET = ParquetShards()


class Alike:
    """Warns of columns that one source file has in another type than the first: each shard has the type of its file, and what reads
    all shards as one table fails on them. See `embedding.corpus.reader.Fits`; several threads may ask.
    """

    def __init__(self, columns: Sequence[str]) -> None:
        self._columns = columns
        self._first: dict[str, tuple[pa.DataType, str]] = {}
        """By column, the first type that was seen, and in which file."""
        self._told: set[str] = set()

    def __call__(self, schema: pa.Schema, uri: str) -> None:
        """Look at one."""
        for column in self._columns:
            if not has_column(schema, column):
                continue  # JSON Lines lack what is null
            kind = _read_type(field_at(schema, column).type)
            first, elsewhere = self._first.setdefault(column, (kind, uri))
            if kind != first and column not in self._told:
                self._told.add(column)
                differ = (
                    f"column {column!r} is {kind} in {uri} and {first} in {elsewhere}, so the output's shards cannot be read as one table"
                )
                log.warning("%s; cast it in the source, or leave it out", differ)


def _read_type(kind: pa.DataType) -> pa.DataType:
    """What readers make of it: Parquet stores the values of dictionaries, and has one kind of strings, bytes and lists."""
    if pa.types.is_dictionary(kind):
        return _read_type(kind.value_type)
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind):
        return pa.binary()
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return pa.list_(_read_type(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, _read_type(field.type)) for field in kind])
    return kind
