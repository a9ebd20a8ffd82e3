"""What a run did, in one line of JSON for pipelines."""

from __future__ import annotations

import json
import logging
import math
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal, TypeAlias

from embedding.corpus.ledger import CommitRecord
from embedding.corpus.plan import Unit, UnreadableSource
from embedding.corpus.sources import absolute
from embedding.corpus.storage import Storage, open_storage
from embedding.errors import EmbeddingJobError, ExitCode

log = logging.getLogger(__name__)

Status: TypeAlias = Literal["complete", "nothing to do", "failed units", "planned", "interrupted", "crashed"]


CLIPPED_SHARE = 0.01
"""Above this share of the stored numbers the user is warned; for rows like those of the sample it is a tenth of that."""


@dataclass
class Summary:
    """Counts of one run. rows_in = rows_out + rows_rejected always; rows_in + rows_skipped + rows_failed + rows_pending is the corpus,
    but for files that could not be read (files_failed), whose rows are unknown.
    """

    output: str
    run: str
    status: Status = "planned"
    rows_in: int = 0
    """Rows of the units that this run committed."""
    rows_out: int = 0
    rows_rejected: int = 0
    rows_skipped: int = 0
    """Rows of units that earlier runs had committed."""
    rows_failed: int = 0
    rows_pending: int = 0
    """Rows of units that this run did not get to."""
    units_done: int = 0
    units_skipped: int = 0
    units_failed: int = 0
    units_pending: int = 0
    files_failed: int = 0
    """Source files that could not be read when the run was planned."""
    tokens: int = 0
    truncated_rows: int = 0
    duplicate_rows: int = 0
    """Rows that share the vector of an equal row of their unit; chunks, where texts are cut."""
    chunks: int = 0
    """Rows of the shards that this run committed, where each chunk of a text is one."""
    clipped_numbers: int = 0
    """Numbers that this run stored as the first or the last step of int8 since the ranges do not hold them."""
    clipped_share: float = 0.0
    """Of the numbers that this run stored as int8."""
    seconds: float = 0.0
    """Wall time of the whole run, its start included."""
    tokens_per_second: float = 0.0
    """Tokens over the time from the first batch's start to the last one's end: without starting workers."""
    rows_per_second: float = 0.0
    """Rows over the same time."""
    failures: list[dict[str, object]] = field(default_factory=list)
    """Failed units: id, source, first row, rows, reason; and files that could not be read, without id and rows."""
    plan: dict[str, object] = field(default_factory=dict)
    """What a dry run found out."""
    _encoding: tuple[float, float] = (math.inf, 0.0)
    """Unix times of the first batch's start and the last one's end."""
    _row_numbers: int = 0
    """Numbers of a row that are stored as int8."""

    @classmethod
    def planned(
        cls,
        *,
        output: str,
        run: str,
        done: list[Unit],
        pending: list[Unit],
        unreadable: Sequence[UnreadableSource] = (),
        int8_numbers: int = 0,
    ) -> Summary:
        """The summary of a run that is about to begin; of a row it will store `int8_numbers` in steps of a range."""
        failures = [_failure(None, file.source.uri, None, None, file.reason) for file in unreadable]
        return cls(
            output=output,
            run=run,
            rows_skipped=sum(unit.num_rows for unit in done),
            units_skipped=len(done),
            rows_pending=sum(unit.num_rows for unit in pending),
            units_pending=len(pending),
            files_failed=len(unreadable),
            failures=failures,
            _row_numbers=int8_numbers,
        )

    def add(self, record: CommitRecord) -> None:
        """Count one unit's end."""
        self.units_pending -= 1
        self.rows_pending -= record.rows
        if record.error:
            self.units_failed += 1
            self.rows_failed += record.rows
            self.failures.append(_failure(record.unit, record.source, record.first_row, record.rows, record.error))
            return
        self.units_done += 1
        self.rows_in += record.rows
        self.rows_out += record.rows - record.rejected
        self.rows_rejected += record.rejected
        self.tokens += record.tokens
        self.truncated_rows += record.truncated
        self.duplicate_rows += record.duplicates
        self.chunks += record.chunks
        self.clipped_numbers += record.clipped
        self.clipped_share = round(self.clipped_numbers / max(1, self._row_numbers * (self.chunks or self.rows_out)), 6)
        if record.encode_started:  # a record read from a footer has no times
            self._encoding = (
                min(self._encoding[0], record.encode_started),
                max(self._encoding[1], record.encode_started + record.encode_seconds),
            )
        seconds = self._encoding[1] - self._encoding[0]
        if seconds <= 0:
            return
        self.tokens_per_second = round(self.tokens / seconds, 1)
        self.rows_per_second = round(self.rows_in / seconds, 1)

    @property
    def warning(self) -> str:
        """What the user should know about the vectors so far, else empty."""
        return clipped(f"over {CLIPPED_SHARE:.0%}") if self.clipped_share > CLIPPED_SHARE else ""

    @property
    def exit_code(self) -> ExitCode:
        """What the process answers."""
        return ExitCode.FAILED_UNITS if self.status == "failed units" else ExitCode.COMPLETE

    def line(self) -> str:
        """The one-line JSON, without the list of failures, which may be long."""
        facts = self._facts()
        del facts["failures"], facts["plan"]
        return json.dumps(facts)

    def document(self) -> bytes:
        """The whole summary as JSON."""
        return json.dumps(self._facts(), indent=1).encode()

    def _facts(self) -> dict[str, object]:
        return {key: value for key, value in asdict(self).items() if not key.startswith("_")}


def require_place(json_summary: str | None) -> None:
    """Check, as far as that can be seen beforehand, that `--json-summary` can be written.

    Raises:
        EmbeddingJobError: it cannot.
    """
    if json_summary:
        _place(json_summary)[0].require_writable(f"probe-{secrets.token_hex(8)}")


def publish_elsewhere(json_summary: str | None, document: bytes) -> None:
    """Write `--json-summary`, if there is one. What the run did stands whether or not this succeeds, so a failure is told only."""
    if json_summary:
        storage, name = _place(json_summary)
        try:
            storage.put(name, document)
        except EmbeddingJobError as error:
            log.warning("--json-summary is not there: %s", error)


def _place(json_summary: str) -> tuple[Storage, str]:
    folder, _, name = absolute(json_summary).rpartition("/")
    return open_storage(folder or "/"), name


def _failure(unit: str | None, source: str, first_row: int | None, rows: int | None, reason: str) -> dict[str, object]:
    return {"unit": unit, "source": source, "first_row": first_row, "rows": rows, "reason": reason}


def clipped(share: str) -> str:
    """What is said where that share of the numbers is clipped, and it is too much."""
    return (
        f"{share} of the numbers lie outside the int8 ranges and are clipped to them, so the vectors are less exact; "
        "start over (--restart, or another --output) with --calibration and ranges from more rows like these"
    )
