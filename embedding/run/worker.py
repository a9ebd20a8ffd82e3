"""What one worker does with the units of a parcel: tokenize, encode, build the shard, commit it. Knows no Ray.

Some parcels are in hand at once, in a thread each: while a unit is on the device, others are tokenized, queued behind it, written or put.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pyarrow as pa

from embedding.corpus.faults import id_text, row_faults
from embedding.corpus.ledger import CommitRecord, parquet_bytes, records_to_table
from embedding.corpus.numbers import LARGEST_HALF
from embedding.corpus.output import Output, rejected_name
from embedding.corpus.plan import Unit
from embedding.corpus.reader import Columns, UnitRows
from embedding.corpus.shard import EMBEDDING, NOT_FINITE, identified, shard_table, too_long
from embedding.corpus.shards.form import ShardForm
from embedding.corpus.shards.parquet import PARQUET
from embedding.corpus.vectors import Calibration, VectorColumns
from embedding.errors import AccessError, BadRowsError, EmbeddingJobError, StorageFullError, count
from embedding.model.spec import TRUNCATE, LongTexts, ModelSpec
from embedding.names import OutputDtype
from embedding.run.attempts import Attempts
from embedding.run.exchange import ReadUnit, decode_read, decode_rows, one_row
from embedding.run.models import model_folder
from embedding.run.pieces import shard_rows, submit_pieces
from embedding.run.reading import reason_of

if TYPE_CHECKING:
    from embedding.model.embedder import Embedder

log = logging.getLogger(__name__)

UNITS_IN_HAND: Final = {"cpu": 2, "cuda": 3}
"""One on the device, the others being tokenized, written or put. A small model on a fast GPU is done with a unit sooner than its shard is
compressed and uploaded.
"""


@dataclass(frozen=True, kw_only=True)
class WorkerJob:
    """What every worker of a run needs to know."""

    model: ModelSpec
    output: str
    batch_tokens: int
    columns: Columns
    has_id: bool
    """Whether the copied columns identify a row; else source and row_index are added."""
    token_columns: bool
    provenance: dict[str, Any]
    """Goes into every shard's footer."""
    max_unit_attempts: int
    device: str
    threads: int | None
    """CPU threads of the encoder, None for a GPU worker."""
    fails_on_bad_rows: bool = False
    """Fail a unit that has rows which cannot be embedded, instead of rejecting them."""
    long_text: LongTexts = TRUNCATE
    output_dtype: OutputDtype = "float32"
    calibration: Calibration = field(default_factory=dict)
    """Of int8, the ranges that the output is begun with."""
    shards: ShardForm = PARQUET


class _Turns:
    """Which threads may work at once: several that share, or one alone."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._working = 0
        self._alone = False

    @contextmanager
    def take(self, *, alone: bool) -> Iterator[None]:
        """Wait for a turn, and hold it while the block runs."""
        with self._changed:
            self._changed.wait_for(lambda: not self._alone and not (alone and self._working))
            self._working += 1
            self._alone = alone
        try:
            yield
        finally:
            with self._changed:
                self._working -= 1
                self._alone = False
                self._changed.notify_all()


class _DeviceTime:
    """Whose the device's time was: units follow one another on it without a gap."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free = 0.0

    def use(self, ready: float, done: float) -> float:
        """When the device began with a unit that was queued at `ready` and is done at `done`: not before it was done with another."""
        with self._lock:
            began, self._free = min(max(ready, self._free), done), max(done, self._free)
            return began


class EmbeddingWorker:
    """Holds one copy of the model; called with one parcel of units at a time by each of some threads."""

    def __init__(self, job: WorkerJob, attempts: Attempts) -> None:
        self._job = job
        self._attempts = attempts
        job.shards.require()
        self._output = Output(job.output, job.shards)
        self._columns = VectorColumns(job.model.columns, job.output_dtype, job.calibration)
        self._embedder = self.load(job)
        self._order = threading.Lock()
        self._device_time = _DeviceTime()
        self._windows = self._embedder.windows(job.long_text)
        self._turns = _Turns()
        self._name = f"{socket.gethostname()}:{os.getpid()}"

    def load(self, job: WorkerJob) -> Embedder:
        """The model on its device."""
        from embedding.model.embedder import Embedder  # half of the driver's start-up time, which only workers need to spend

        return Embedder(job.model, device=job.device, threads=job.threads, folder=model_folder(job.model))

    def __call__(self, batch: pa.Table) -> pa.Table:
        """What the read stage hands on of a parcel in, a commit record for each of its units out; never raises for a fault of a unit.

        Raises:
            AccessError: the output cannot be written any more.
            StorageFullError: it has no room left.
        """
        return one_row(records_to_table([self._record(read) for read in decode_read(batch)]))

    def _record(self, read: ReadUnit) -> CommitRecord:
        if read.rows is None:
            return self._failed(read.unit, read.error or "")
        record = self._commit_or_fail(read.unit, decode_rows(read.rows))
        return replace(record, read_started=read.started, read_seconds=read.seconds)

    def _commit_or_fail(self, unit: Unit, rows: UnitRows) -> CommitRecord:
        """Try the unit until it is committed or its attempts, those of dead processes included, are spent.

        Its first try has other units beside it; one that died or failed is tried alone, so that it takes no other with it again.
        Ends the process if its GPU is lost.
        """
        for _ in range(self._job.max_unit_attempts + 1):
            with self._turns.take(alone=self._attempts.begun(unit.id) > 0):
                attempt = self._attempts.begin(unit.id)
                try:
                    if attempt > 1 and (record := self._output.committed_record(unit)) is not None:
                        return record  # an earlier process died between the put and its answer
                    if attempt > self._job.max_unit_attempts:
                        break
                    return self._commit(unit, rows)
                except BadRowsError as caught:
                    self._attempts.fail(unit.id, str(caught))  # as below
                    return self._failed(unit, str(caught))
                except (AccessError, StorageFullError):  # no unit can be committed: better stop than set all of them aside
                    raise
                except Exception as caught:  # whatever a unit does, the run goes on without it
                    log.warning("unit %s failed on attempt %d", unit.id, attempt, exc_info=not isinstance(caught, EmbeddingJobError))
                    self._attempts.fail(unit.id, reason_of(caught))  # kept there: a neighbour may end this process yet
                    if self._embedder.has_lost_its_device():
                        log.warning("the GPU of %s answers no more; ending this process, whose place another takes", self._name)
                        os._exit(1)  # here, every unit would fail from now on
        error = self._attempts.reason(unit.id) or "its worker process died each time"
        return self._failed(unit, f"{error} (set aside after {count(self._job.max_unit_attempts, 'attempt')})")

    def _note(self, batch_tokens: int, copied: pa.Table) -> str:
        manner = self._embedder.description["batches"]
        notes = [] if manner == "packed" else [f"the model runs {manner}"]
        if batch_tokens < self._job.batch_tokens:
            notes.append(f"batches of {self._job.batch_tokens} tokens do not fit in the memory of {self._name}; it uses {batch_tokens}")
        if self._job.has_id and copied.column(0).null_count:
            notes.append(f"rows whose {copied.column_names[0]!r} is null have vectors without an id")
        return "; ".join(notes)

    def _failed(self, unit: Unit, error: str) -> CommitRecord:
        return CommitRecord.of(unit, worker=self._name, error=error)

    def _require_none(self, unit: Unit, faults: dict[int, str]) -> None:
        """Raises BadRowsError: there are rows without a vector, and the job shall not go on without them."""
        if faults and self._job.fails_on_bad_rows:
            row = min(faults)
            what = f"{count(len(faults), 'row')} cannot be embedded, the first being row {unit.first_row + row}: {faults[row]}"
            raise BadRowsError(f"{what}; correct the source, or set --bad-rows reject to list such rows and continue")

    def _commit(self, unit: Unit, rows: UnitRows) -> CommitRecord:
        """read rows -> texts -> pieces -> vectors -> rows of the shard -> put; the put is the commit."""
        started = time.perf_counter()
        faults = row_faults(rows)
        self._require_none(unit, faults)
        good = np.delete(np.arange(unit.num_rows), list(faults))
        pieces = self._windows((rows.text.take(good) if faults else rows.text).to_pylist())
        faults |= dict.fromkeys(good[pieces.too_long].tolist(), too_long(self._job.model.max_tokens))
        self._require_none(unit, faults)
        tokenized = time.perf_counter()
        with self._order:  # the whole unit before the next one: were they to take turns, both would be done at the end of the second
            finish = submit_pieces(self._embedder, pieces, self._job.batch_tokens)
        embedded = finish()
        encoded = time.perf_counter()
        began = self._device_time.use(tokenized, encoded)
        encode_started = time.time() - (time.perf_counter() - began)
        if self._job.output_dtype == "float16":
            embedded = replace(embedded, finite_R=embedded.finite_R & (np.abs(embedded.vectors_RD) <= LARGEST_HALF).all(axis=1))
        made = shard_rows(pieces, embedded, self._job.long_text, self._job.model)
        faults |= dict.fromkeys(good[made.not_finite].tolist(), NOT_FINITE)
        self._require_none(unit, faults)
        facts = {"rejected": len(faults), **made.facts()}
        token_columns = made.token_columns() if self._job.token_columns else {}
        copied = identified(unit, rows.copied, has_id=self._job.has_id)
        vectors = self._columns.stored(made.vectors_SD)
        table = shard_table(made.identified(copied, good), vectors.pop(EMBEDDING), vectors | token_columns)
        footer = {"unit": unit.identity(), "record": facts, "provenance": self._job.provenance}
        if self._job.calibration:
            facts["clipped"] = self._columns.clipped(made.vectors_SD)
            footer["calibration"] = self._job.calibration
        data = self._job.shards.encode(table, footer)
        if faults:  # before the shard, so that one commit covers both
            ids = rows.copied.column(0) if self._job.has_id else None
            self._output.storage.put(rejected_name(unit.id), parquet_bytes(rejected_table(unit, ids, faults)))
        self._output.storage.put(unit.shard, data)
        return CommitRecord.of(
            unit,
            **facts,
            padding=embedded.padding_tokens,
            bytes=len(data),
            encode_started=encode_started,
            wait_seconds=began - tokenized,
            tokenize_seconds=tokenized - started,
            encode_seconds=encoded - began,
            write_seconds=time.perf_counter() - encoded,
            worker=self._name,
            note=self._note(embedded.batch_tokens, rows.copied),
        )


def rejected_table(unit: Unit, ids: pa.ChunkedArray | None, faults: dict[int, str]) -> pa.Table:
    """The rows of a unit that have no vector: where they are, their id as text where there is an id column, and why."""
    rows = np.array(sorted(faults), np.int64)
    return pa.table(
        {
            "source": pa.repeat(unit.source.uri, len(rows)),
            "row_index": rows + unit.first_row,
            "id": pa.array([id_text(ids, row) for row in rows.tolist()], pa.string()),
            "reason": [faults[row] for row in rows.tolist()],
        }
    )
