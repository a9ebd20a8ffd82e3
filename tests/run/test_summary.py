"""Counts and pace, from literal records."""

from __future__ import annotations

import json

from embedding.corpus.ledger import CommitRecord
from embedding.corpus.plan import Unit, UnreadableSource, make_unit
from embedding.corpus.sources import Source
from embedding.run.summary import Summary

SOURCE = Source("a.parquet", "file:///a.parquet", 1000, "v")
UNITS = [make_unit(SOURCE, first, 10, "f") for first in (0, 10, 20, 30)]


def record(unit: Unit, start: float, **facts: int | str) -> CommitRecord:
    return CommitRecord.of(unit, encode_started=start, encode_seconds=2.0, **facts)


def test_units_move_from_pending_to_done_or_failed() -> None:
    summary = Summary.planned(output="out", run="r", done=UNITS[:1], pending=UNITS[1:])
    assert (summary.rows_skipped, summary.rows_pending) == (10, 30)
    summary.add(record(UNITS[1], 100.0, tokens=60, rejected=3, truncated=1))
    summary.add(record(UNITS[2], 103.0, tokens=40))
    assert (summary.rows_in, summary.rows_out, summary.rows_rejected, summary.truncated_rows) == (20, 17, 3, 1)
    assert (summary.tokens_per_second, summary.rows_per_second) == (20.0, 4.0)
    summary.add(CommitRecord.of(UNITS[3], error="damaged"))
    assert (summary.rows_pending, summary.units_pending, summary.rows_failed, summary.units_failed) == (0, 0, 10, 1)
    assert summary.tokens_per_second == 20.0
    failure = {"unit": UNITS[3].id, "source": "file:///a.parquet", "first_row": 30, "rows": 10, "reason": "damaged"}
    assert summary.failures == [failure]


def test_a_file_that_cannot_be_read_is_a_failure_without_rows() -> None:
    summary = Summary.planned(output="out", run="r", done=[], pending=UNITS[:1], unreadable=[UnreadableSource(SOURCE, "damaged")])
    assert (summary.files_failed, summary.units_failed, summary.rows_failed) == (1, 0, 0)
    assert summary.failures == [{"unit": None, "source": "file:///a.parquet", "first_row": None, "rows": None, "reason": "damaged"}]


def test_clipped_numbers_are_a_share_of_those_stored() -> None:
    summary = Summary.planned(output="out", run="r", done=[], pending=UNITS[:3], int8_numbers=50)
    summary.add(record(UNITS[0], 100.0, rejected=8, clipped=1))
    assert (summary.clipped_numbers, summary.clipped_share, summary.warning) == (1, 0.01, "")
    summary.add(record(UNITS[1], 102.0, clipped=7))
    assert summary.clipped_share == round(8 / 600, 6)
    assert summary.warning.startswith("over 1% of the numbers lie outside the int8 ranges")
    summary.add(record(UNITS[2], 104.0, chunks=40))
    assert summary.clipped_share == 8 / 2000


def test_a_record_without_times_has_no_pace() -> None:
    summary = Summary.planned(output="out", run="r", done=[], pending=UNITS)
    summary.add(CommitRecord.of(UNITS[0], tokens=5))
    assert (summary.tokens_per_second, summary.rows_per_second) == (0.0, 0.0)


def test_the_line_leaves_out_what_may_be_long() -> None:
    summary = Summary.planned(output="out", run="r", done=[], pending=UNITS)
    assert "\n" not in summary.line()
    assert json.loads(summary.line()).keys() == json.loads(summary.document()).keys() - {"failures", "plan"}
    assert not any(key.startswith("_") for key in json.loads(summary.document()))
