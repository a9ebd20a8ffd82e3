"""A run's counts as Ray metrics, which Prometheus finds at the metrics endpoint of the driver's node.

All of them come from the driver, as records arrive: a series a run, however many workers there are, and the same numbers as the summary.
Ray puts `ray_` before each name.
"""

from __future__ import annotations

from typing import TypeVar
from urllib.parse import quote

from ray.util.metrics import Counter, Gauge, Histogram, Metric

from embedding.corpus.ledger import CommitRecord
from embedding.run.outlook import Outlook
from embedding.run.summary import Summary

_LABELS = ("output", "run")
_UNIT_SECONDS = [0.1, 0.3, 1.0, 3.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 1800.0]
"""Few: each is a series that the node keeps for every run."""
_STAGES = ("read", "tokenize", "wait", "encode", "write")
_PRINTABLE = "".join(chr(code) for code in range(0x20, 0x7F) if chr(code) != "%")
Labelled = TypeVar("Labelled", bound=Metric)


class Metrics:
    """The metrics of one run; needs a connected Ray.

    A counter appears with its first increment. What was counted last leaves the process when Ray is shut down, which a run does at its end.
    """

    def __init__(self, output: str, run: str) -> None:
        self._labels = {"output": quote(output, safe=_PRINTABLE), "run": run}  # Ray's labels hold nothing but ASCII
        self._rows = self._counter("embed_rows_total", "Rows embedded and committed in shards.")
        self._tokens = self._counter("embed_tokens_total", "Tokens of these rows, special tokens included.")
        self._padding = self._counter("embed_padding_tokens_total", "Padding tokens computed, which no row needs.")
        self._truncated = self._counter("embed_truncated_rows_total", "Rows whose text was longer than max_tokens.")
        self._rejected = self._counter("embed_rejected_rows_total", "Rows that cannot be embedded.")
        self._duplicates = self._counter("embed_duplicate_rows_total", "Rows that share the vector of an equal row of their unit.")
        self._bytes = self._counter("embed_shard_bytes_total", "Bytes of the shards.")
        self._units = self._counter("embed_units_total", "Units that ended, by outcome.", "outcome")
        self._stages = self._counter("embed_stage_seconds_total", "Seconds that units spent in a stage, summed over units.", "stage")
        self._seconds = self._with_labels(
            Histogram(
                "embed_unit_seconds", "From reading a unit to writing its shard, without waiting for the device.", _UNIT_SECONDS, _LABELS
            )
        )
        self._pending_rows = self._gauge("embed_pending_rows", "Rows of units that have not ended.")
        self._pending_units = self._gauge("embed_pending_units", "Units that have not ended.")
        self._pending_tokens = self._gauge("embed_pending_tokens", "Tokens of units that have not ended, estimated.")
        self._workers = self._gauge("embed_workers", "Workers that committed a unit recently.")

    def update(self, record: CommitRecord, summary: Summary, outlook: Outlook, now: float) -> None:
        """Count a unit's end; `summary` and `outlook` have counted it already."""
        self._units.inc(tags={"outcome": "failed" if record.error else "committed"})
        if not record.error:
            self._count(record)
        self._pending_rows.set(summary.rows_pending)
        self._pending_units.set(summary.units_pending)
        self._pending_tokens.set(outlook.pending_tokens)
        self._workers.set(outlook.workers_seen(now))

    def _count(self, record: CommitRecord) -> None:
        counts = {
            self._rows: record.rows - record.rejected,
            self._tokens: record.tokens,
            self._padding: record.padding,
            self._truncated: record.truncated,
            self._rejected: record.rejected,
            self._duplicates: record.duplicates,
            self._bytes: record.bytes,
        }
        for counter, count in counts.items():
            if count:  # a counter refuses 0
                counter.inc(count)
        seconds = {stage: float(getattr(record, f"{stage}_seconds")) for stage in _STAGES}
        for stage, spent in seconds.items():
            if spent > 0:
                self._stages.inc(spent, tags={"stage": stage})
        if record.encode_started:  # a record read from a footer has no times
            self._seconds.observe(sum(seconds.values()) - seconds["wait"])

    def _counter(self, name: str, meaning: str, *labels: str) -> Counter:
        return self._with_labels(Counter(name, meaning, (*_LABELS, *labels)))

    def _gauge(self, name: str, meaning: str) -> Gauge:
        return self._with_labels(Gauge(name, meaning, _LABELS))

    def _with_labels(self, metric: Labelled) -> Labelled:
        metric.set_default_tags(self._labels)
        return metric
