"""What the records so far say about the rest of a run: how long it will take, which workers are active, how busy the devices are.

Times named `now` are the driver's monotonic clock. Times of a worker are only compared with others of the same worker.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from embedding.corpus.ledger import CommitRecord
from embedding.corpus.plan import Unit

_PACE_SECONDS = 120.0
_PACE_RECORDS = 8
"""The pace is that of the last two minutes, and of eight records at least: a worker's units end in one instant each."""
_BUSY_SECONDS = 30.0
_PATIENCE = 3
"""A worker without a record for so many times the longest unit, and for half a minute, does not count as seen."""


@dataclass(slots=True)
class _Source:
    """The rows of a source file that a run has to embed."""

    bytes_per_row: float
    pending_rows: int = 0
    rows: int = 0
    tokens: int = 0


@dataclass(slots=True)
class _Worker:
    seen: float
    """When its last record came."""
    encoded: deque[tuple[float, float]] = field(default_factory=deque)
    """When the device was at work lately: start and end on the worker's clock, not sorted."""


class Outlook:
    """Fed with every record; may be asked from any thread.

    What is left is estimated in tokens, not in rows or files: a source that some unit was read of is taken to go on with as many tokens a
    row; one that was not, with as many tokens a byte of its file as the others had. So neither the order of the units nor sources
    with longer texts mislead it for longer than it takes to see one unit of each.
    """

    def __init__(self, units: Sequence[Unit], pending: Sequence[Unit]) -> None:
        rows_of_file: dict[str, int] = {}
        for unit in units:
            rows_of_file[unit.source.uri] = rows_of_file.get(unit.source.uri, 0) + unit.num_rows
        self._sources: dict[str, _Source] = {}
        for unit in pending:
            uri = unit.source.uri
            source = self._sources.setdefault(uri, _Source(unit.source.size / max(1, rows_of_file[uri])))
            source.pending_rows += unit.num_rows
        self._unmeasured_bytes = sum(source.pending_rows * source.bytes_per_row for source in self._sources.values())
        self._measured_tokens = 0.0
        self._bytes = 0.0
        self._tokens = 0
        self._arrivals: deque[tuple[float, int]] = deque()
        self._workers: dict[str, _Worker] = {}
        self._longest_unit = 0.0
        self._lock = threading.Lock()

    def add(self, record: CommitRecord, now: float) -> None:
        """A unit ended."""
        with self._lock:
            self._count(self._sources[record.source], record)
            if record.error:
                return
            seconds = record.read_seconds + record.tokenize_seconds + record.wait_seconds + record.encode_seconds + record.write_seconds
            self._longest_unit = max(self._longest_unit, seconds)
            if not self._arrivals:
                self._arrivals.append((now - record.encode_seconds - record.write_seconds, 0))
            self._arrivals.append((now, self._tokens))
            while len(self._arrivals) > _PACE_RECORDS and self._arrivals[1][0] <= now - _PACE_SECONDS:
                self._arrivals.popleft()
            if record.encode_started:  # a record read from a footer has no times
                self._see(record, now)

    @property
    def pending_tokens(self) -> float | None:
        """Tokens that are still to be embedded, estimated; None before the first unit."""
        with self._lock:
            return self._pending_tokens()

    def tokens_per_second(self, now: float) -> float | None:
        """The pace of the last minutes, None before the first unit. It falls when units are overdue."""
        with self._lock:
            return self._pace(now)

    def seconds_left(self, now: float) -> float | None:
        """Until the last unit is committed, None before the first unit or where nothing moves; counts down between the units."""
        with self._lock:
            tokens, pace = self._pending_tokens(), self._pace(now)
            if tokens is None or not pace:
                return None
            return max(0.0, tokens / pace - (now - self._arrivals[-1][0])) if tokens else 0.0

    def workers_seen(self, now: float) -> int:
        """Workers that had something to tell lately."""
        with self._lock:
            return len(self._seen(now))

    def busy_share(self, now: float) -> float | None:
        """Share of the last half minute that the devices of the workers spent encoding; None before any worker ended two units.

        What a worker is doing since its last record is not known; as long as it is not overdue, nothing is assumed about it.
        """
        with self._lock:
            covered, lasted = 0.0, 0.0
            for worker in self._seen(now):
                if len(worker.encoded) < 2:
                    continue
                intervals = sorted(worker.encoded)
                end = intervals[-1][1]
                since = max(intervals[0][0], min(end - _BUSY_SECONDS, intervals[-2][0]))
                covered += sum(max(0.0, stop - max(start, since)) for start, stop in intervals)
                lasted += end - since + max(0.0, now - worker.seen - self._longest_unit)
            return min(1.0, covered / lasted) if lasted else None

    def _count(self, source: _Source, record: CommitRecord) -> None:
        """Move the record's rows from what is pending to what is known."""
        if source.rows:
            self._measured_tokens -= source.pending_rows * source.tokens / source.rows
        else:
            self._unmeasured_bytes -= source.pending_rows * source.bytes_per_row
        source.pending_rows -= record.rows
        if not record.error:
            source.rows += record.rows
            source.tokens += record.tokens
            self._tokens += record.tokens
            self._bytes += record.rows * source.bytes_per_row
        if source.rows:
            self._measured_tokens += source.pending_rows * source.tokens / source.rows
        else:
            self._unmeasured_bytes += source.pending_rows * source.bytes_per_row

    def _pending_tokens(self) -> float | None:
        if not self._bytes:
            return None
        return max(0.0, self._measured_tokens) + max(0.0, self._unmeasured_bytes) * self._tokens / self._bytes

    def _pace(self, now: float) -> float | None:
        if not self._arrivals:
            return None
        (began, before), (last, tokens) = self._arrivals[0], self._arrivals[-1]
        overdue = now - last - max(later[0] - earlier[0] for earlier, later in pairwise(self._arrivals))
        seconds = last - began + max(0.0, overdue)
        return (tokens - before) / seconds if seconds else None

    def _see(self, record: CommitRecord, now: float) -> None:
        worker = self._workers.setdefault(record.worker, _Worker(now))
        worker.seen = now
        worker.encoded.append((record.encode_started, record.encode_started + record.encode_seconds))
        while len(worker.encoded) > 2 and worker.encoded[1][1] < record.encode_started - _BUSY_SECONDS:
            worker.encoded.popleft()

    def _seen(self, now: float) -> list[_Worker]:
        patience = max(_BUSY_SECONDS, _PATIENCE * self._longest_unit)
        return [worker for worker in self._workers.values() if now - worker.seen <= patience]
