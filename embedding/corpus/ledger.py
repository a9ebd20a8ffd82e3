"""Commit records and their ledger: what became of each unit. Speeds up reports; correctness never needs it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from embedding.corpus.plan import Unit
from embedding.corpus.storage import Storage

log = logging.getLogger(__name__)

RECORDS = "_control/records"
"""Folder of the ledger's segments."""


@dataclass(frozen=True, slots=True)
class CommitRecord:
    """Facts about one unit that was committed, or why it failed."""

    unit: str
    shard: str
    source: str
    first_row: int
    rows: int
    """Rows of the unit: those with a vector plus those rejected."""
    rejected: int
    tokens: int
    """Tokens of the rows in the shard, special tokens included."""
    truncated: int
    """Rows whose text was longer than max_tokens."""
    duplicates: int
    """Rows with the same tokens as an earlier row of the unit: encoded once, the vector shared. Chunks, where texts are cut."""
    chunks: int
    """Rows of the shard where each chunk of a text is one, else 0."""
    clipped: int
    """Numbers of the shard's vectors that the ranges of int8 do not hold, stored as the first step or the last; else 0."""
    padding: int
    """Padding tokens that were computed; 0 where the encoder runs packed."""
    bytes: int
    """Size of the shard."""
    read_started: float
    """Unix time."""
    read_seconds: float
    encode_started: float
    """Unix time."""
    wait_seconds: float
    """Waiting for the device while other units of this worker were encoded."""
    tokenize_seconds: float
    encode_seconds: float
    write_seconds: float
    worker: str
    """Host and process that did it."""
    lengths: list[int]
    """Rows in the shard by tokens, in the bins of `embedding.corpus.lengths`, up to the last bin that has one."""
    note: str
    """What the user should know about how the worker computes, such as that it pads or that batches were halved; else empty."""
    error: str
    """Empty for a committed unit, else the reason why it failed."""

    @classmethod
    def of(cls, unit: Unit, **facts: Any) -> CommitRecord:
        """The record of a unit with these facts; the others are zero or empty."""
        none: dict[str, Any] = {field.name: _PYTHON_TYPES[str(field.type)]() for field in fields(cls)}
        identity = {"unit": unit.id, "shard": unit.shard, "source": unit.source.uri, "first_row": unit.first_row, "rows": unit.num_rows}
        return cls(**{**none, **identity, **facts})


_PYTHON_TYPES: dict[str, Callable[[], object]] = {"str": str, "int": int, "float": float, "list[int]": list}
_ARROW_TYPES = {"str": pa.string(), "int": pa.int64(), "float": pa.float64(), "list[int]": pa.list_(pa.int64())}
_LATER = ("chunks", "clipped")
"""Counts that ledgers of earlier versions of this package do not have, where they are 0."""
RECORD_SCHEMA = pa.schema([pa.field(field.name, _ARROW_TYPES[str(field.type)], nullable=False) for field in fields(CommitRecord)])


def records_to_table(records: Iterable[CommitRecord]) -> pa.Table:
    """One row a record."""
    return pa.Table.from_pylist([asdict(record) for record in records], schema=RECORD_SCHEMA)


def records_from_table(table: pa.Table) -> list[CommitRecord]:
    """The inverse of `records_to_table`."""
    return [CommitRecord(**row) for row in table.to_pylist()]


class Ledger:
    """Appends a run's records to the output in segments: few objects, however many units."""

    def __init__(self, storage: Storage, run_id: str, *, segment_records: int = 10_000, segment_seconds: float = 60.0) -> None:
        self._storage = storage
        self._run_id = run_id
        self._segment_records = segment_records
        self._segment_seconds = segment_seconds
        self._flushed_at = time.monotonic()
        self._pending: list[CommitRecord] = []
        self._segments = 0

    def append(self, record: CommitRecord) -> None:
        """Add a record; a segment is written when it is full or a minute old."""
        self._pending.append(record)
        if len(self._pending) >= self._segment_records or time.monotonic() - self._flushed_at > self._segment_seconds:
            self.flush()

    def flush(self) -> None:
        """Write what is pending as one segment."""
        self._flushed_at = time.monotonic()
        if not self._pending:
            return
        self._storage.put(f"{RECORDS}/{self._run_id}-{self._segments:06d}.parquet", parquet_bytes(records_to_table(self._pending)))
        self._segments += 1
        self._pending.clear()


def read_ledger(storage: Storage, columns: Sequence[str] = RECORD_SCHEMA.names) -> pa.Table:
    """The last record of every unit over all runs of the output (segment names sort by time), `unit` and these columns of it.

    A table, since a million records as objects would take gigabytes.
    """
    schema = pa.schema([RECORD_SCHEMA.field(name) for name in dict.fromkeys(("unit", *columns))])
    segments = [schema.empty_table()]
    for name in storage.list(RECORDS):
        if (data := storage.read(name)) is None:
            continue
        try:
            segments.append(read_segment(data, schema))
        except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:  # damaged, or of another version of this package
            log.warning(
                "%s/%s cannot be read and is left out of the ledger; the footers of the shards are read instead: %s",
                storage.url,
                name,
                error,
            )
    table = pa.concat_tables(segments)
    return table.filter(is_last(table["unit"]))


def read_segment(data: bytes, schema: pa.Schema) -> pa.Table:
    """The columns of `schema` of one segment.

    Raises:
        pa.ArrowException, OSError, KeyError, TypeError, ValueError: it is damaged, or of another version of this package.
    """
    file = pq.ParquetFile(pa.BufferReader(data))
    there = file.schema_arrow.names
    table = file.read([name for name in schema.names if name in there])
    for name in _LATER:
        if name in schema.names and name not in there:
            table = table.append_column(name, pa.array(np.zeros(len(table), np.int64)))
    return table.select(schema.names).cast(schema)


def is_last(keys: pa.ChunkedArray) -> pa.Array:
    """Whether a row is the last one with its key."""
    encoded = keys.combine_chunks().dictionary_encode()
    encoded = encoded.combine_chunks() if isinstance(encoded, pa.ChunkedArray) else encoded
    codes, places = encoded.indices.to_numpy(), np.arange(len(encoded))
    last = np.zeros(len(encoded.dictionary), np.int64)
    np.maximum.at(last, codes, places)
    return pa.array(last[codes] == places)


def segment_name(path: str) -> str:
    """`<run>-<number>` of a segment's path."""
    return path.removeprefix(f"{RECORDS}/").removesuffix(".parquet")


def parquet_bytes(table: pa.Table) -> bytes:
    """A small control table as one complete Parquet file."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return bytes(sink.getvalue().to_pybytes())
