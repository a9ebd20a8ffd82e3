"""What a report reads of an output: its ledger as one table, why rows were rejected, its runs, a sample of its vectors.

Every part is bounded, however large the output is: by a number of objects or rows, and by a moment on the monotonic clock after which
no further object is opened.
"""

# Shape suffixes: R rows, D dimensions.
# ruff: noqa: N815

from __future__ import annotations

import json
import logging
import random
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from embedding.corpus.ledger import RECORD_SCHEMA, RECORDS, is_last, read_segment, segment_name
from embedding.corpus.numbers import Floats, loaded, rounding
from embedding.corpus.output import MANIFEST, rejected_name
from embedding.corpus.shard import EMBEDDING
from embedding.corpus.shards.form import ShardForm
from embedding.corpus.shards.parquet import PARQUET
from embedding.corpus.storage import Storage
from embedding.errors import EmbeddingJobError

log = logging.getLogger(__name__)

REJECTED_FILES = 100
RUNS = 20
SAMPLE_SHARDS = 16
_SCANNED_BYTES = 8 * 2**20
"""Raw vector bytes that are read of a shard, of which the sampled rows are taken."""
_SCANNED_ROWS = 2048
_COLUMNS = RECORD_SCHEMA.set(RECORD_SCHEMA.get_field_index("lengths"), pa.field("lengths", pa.list_(pa.int32()), nullable=False))
_SHOWN_CHARS = 300
_PLAIN_TYPES = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_temporal, pa.types.is_decimal)
_TEXT_TYPES = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)


@dataclass(frozen=True)
class Totals:
    """Of all committed units."""

    rows: int
    """Those with a vector plus those rejected."""
    rejected: int
    tokens: int


@dataclass(frozen=True)
class Records:
    """The last record of each unit, as columns: a million of them are no burden."""

    table: pa.Table
    """RECORD_SCHEMA without shard and error, and `run`; committed units only."""
    unread: int
    """Ledger segments that there was no time for, or that are damaged or of another version."""

    def of_run(self, run: str) -> pa.Table:
        """What that run committed."""
        return self.table.filter(pc.equal(self.table["run"], run))

    def totals(self) -> Totals:
        """Of the units whose records these are."""
        return _totals(self.table.select(["rows", "rejected", "tokens"]))


@dataclass(frozen=True)
class Rejections:
    """Rejected rows by reason, in as many of their lists as were read."""

    reasons: dict[str, int]
    examples: dict[str, dict[str, Any]]
    """The first row of each reason: source, row_index, id."""
    rows: int
    """Rows in the lists that were read."""


@dataclass(frozen=True)
class Sample:
    """R rows of a few shards."""

    vectors_RD: NDArray[np.float32]
    columns: dict[str, list[str | None]]
    """Copied columns that can be shown, as short texts, and `source`."""
    shards: int
    scanned: int
    """Rows that were read, of which these were taken."""
    repeats: int
    """Scanned rows with the very vector of another row of their shard, beyond those that have another row's tokens."""
    unread: list[str] = field(default_factory=list)
    """Shards that could not be read, each with the reason."""
    rounding: float = 0.0
    """How far int8 may have moved a vector."""


def read_records(storage: Storage, shards: Iterable[str], run: str, until: float) -> Records:
    """The records of committed shards, those of the segments of `run` first, then of ever older ones while there is time."""
    names = sorted(storage.list(RECORDS), key=lambda name: (segment_name(name).startswith(run), name), reverse=True)
    tables: dict[str, pa.Table] = {}
    for name in names:
        if tables and time.monotonic() > until:
            break
        if (data := storage.read(name)) is None:
            continue
        try:
            tables[name] = read_segment(data, _COLUMNS)
        except (pa.ArrowException, OSError, KeyError, ValueError) as error:
            log.debug("%s/%s is left out of the report: %s", storage.url, name, error)
    in_order = [tables[name].append_column("run", _run_of(name, tables[name])) for name in sorted(tables)]
    table = pa.concat_tables(in_order) if in_order else _COLUMNS.append(pa.field("run", pa.string())).empty_table()
    wanted = pc.and_(pc.equal(table["error"], ""), pc.is_in(table["shard"], pa.array(shards, pa.string())))
    kept = table.filter(pc.and_(wanted, is_last(table["unit"]))).drop_columns(["shard", "error"])
    return Records(kept, len(names) - len(tables))


def read_totals(storage: Storage) -> Totals | None:
    """What the manifest of a complete output adds up to, however many records were read; None where there is no manifest."""
    if (data := storage.read(MANIFEST)) is None:
        return None
    return _totals(pq.read_table(pa.BufferReader(data), columns=["source_rows", "rejected", "tokens"]))


def read_rejections(storage: Storage, records: Records, until: float) -> Rejections:
    """Why rows were rejected, from the lists of at most REJECTED_FILES units."""
    units = records.table.filter(pc.greater(records.table["rejected"], 0))["unit"].slice(0, REJECTED_FILES).to_pylist()
    reasons: Counter[str] = Counter()
    examples: dict[str, dict[str, Any]] = {}
    for unit in units:
        if time.monotonic() > until:
            break
        data = storage.read(rejected_name(unit))
        for row in pq.read_table(pa.BufferReader(data)).to_pylist() if data else []:
            reason = str(row["reason"])[:_SHOWN_CHARS]
            reasons[reason] += 1
            examples.setdefault(reason, row)
    return Rejections(dict(reasons.most_common()), examples, reasons.total())


def read_runs(storage: Storage, until: float) -> list[dict[str, Any]]:
    """The summaries of the last RUNS runs, the newest first."""
    names = [name for name in storage.list("_control/runs") if name.endswith("/summary.json")]
    found = []
    for name in sorted(names, reverse=True)[:RUNS]:
        if (data := storage.read(name)) and time.monotonic() <= until:
            found.append(json.loads(data))
    return found


def sample_shards(storage: Storage, shards: Sequence[str], *, rows: int, seed: str, until: float, form: ShardForm = PARQUET) -> Sample:
    """At most `rows` rows out of SAMPLE_SHARDS shards, the same for the same seed as long as there is time.

    Of each shard some rows one after another are read, and rows are taken at random there.
    """
    rng = random.Random(seed)
    chosen = sorted(rng.sample(shards, min(SAMPLE_SHARDS, len(shards))))
    parts: list[_Part] = []
    unread: list[str] = []
    for shard in chosen:
        if parts and time.monotonic() > until:
            unread.append(f"{shard}: there was no time left to read it")
            continue
        try:
            parts.append(_sample_shard(storage, shard, -(-rows // len(chosen)), rng, form))
        except (EmbeddingJobError, pa.ArrowException, OSError, ValueError) as error:
            unread.append(f"{shard}: {error}")
    full = [part for part in parts if len(part.vectors_RD)]
    if not full:
        return Sample(np.empty((0, 0), np.float32), {}, 0, 0, 0, unread)
    table = pa.concat_tables([part.shown for part in full], promote_options="default").slice(0, rows)
    return Sample(
        np.concatenate([part.vectors_RD for part in full])[:rows],
        {name: table[name].to_pylist() for name in table.column_names},
        len(full),
        sum(part.scanned for part in parts),
        sum(part.repeats for part in parts),
        unread,
        full[0].rounding,
    )


def _totals(counts: pa.Table) -> Totals:
    return Totals(*(pc.sum(column).as_py() or 0 for column in counts.columns))


@dataclass(frozen=True)
class _Part:
    """What was taken of one shard, as in `Sample`."""

    vectors_RD: Floats
    shown: pa.Table
    scanned: int
    repeats: int
    rounding: float


def _sample_shard(storage: Storage, shard: str, rows: int, rng: random.Random, form: ShardForm) -> _Part:
    def scanned(schema: pa.Schema) -> int:
        width: int = schema.field(EMBEDDING).type.list_size
        return max(rows, min(_SCANNED_ROWS, _SCANNED_BYTES // (4 * width)))

    table, footer = form.scan(storage, shard, _shown_columns, scanned, rng)
    if not table.num_rows:
        return _Part(np.empty((0, 0), np.float32), pa.table({}), 0, 0, 0.0)
    ranges = footer.get("calibration", {}).get(EMBEDDING)
    ranges_2D = None if ranges is None else np.array(ranges, np.float32)
    vectors_RD = loaded(_matrix(table), ranges_2D)
    repeats = table.num_rows - len(np.unique(vectors_RD.view(np.uint32), axis=0))
    chosen = sorted(rng.sample(range(table.num_rows), min(rows, table.num_rows)))
    taken = table.take(chosen)
    shown = {name: pa.array(list(_shown(taken[name])), pa.string()) for name in table.column_names if name != EMBEDDING}
    shown["source"] = pa.array([footer["unit"]["source"]["uri"]] * taken.num_rows, pa.string())
    # Rows with the tokens of an earlier one are given its vector on purpose, and are counted in the record.
    repeats -= footer["record"]["duplicates"]
    moved = 0.0 if ranges_2D is None else rounding(ranges_2D)
    return _Part(vectors_RD[chosen], pa.table(shown), table.num_rows, max(0, repeats), moved)


def _shown_columns(schema: pa.Schema) -> list[str]:
    return [item.name for item in schema if item.name == EMBEDDING or _is_shown(item.type)]


def _is_shown(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return any(is_kind(kind) for is_kind in (*_PLAIN_TYPES, *_TEXT_TYPES))


def _shown(column: pa.ChunkedArray) -> Iterator[str | None]:
    for value in column.to_pylist():
        yield None if value is None else str(value)[:_SHOWN_CHARS]


def _matrix(table: pa.Table) -> NDArray[Any]:
    """The vectors as they are stored."""
    column = table[EMBEDDING].combine_chunks()
    array = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
    return np.asarray(array.flatten().to_numpy(zero_copy_only=False)).reshape(len(array), array.type.list_size)


def _run_of(name: str, table: pa.Table) -> pa.Array:
    return pa.repeat(segment_name(name).rpartition("-")[0], table.num_rows)
