"""What is left, who is at work and how busy the devices are, from literal records."""

from __future__ import annotations

import pytest

from embedding.corpus.ledger import CommitRecord
from embedding.corpus.plan import Unit, make_unit
from embedding.corpus.sources import Source
from embedding.run.outlook import Outlook


def units(name: str, size: int, rows: tuple[int, ...]) -> list[Unit]:
    """The units of a source file of `size` bytes."""
    source = Source(name, f"file:///{name}", size, "v")
    return [make_unit(source, sum(rows[:number]), count, "f") for number, count in enumerate(rows)]


def ended(unit: Unit, tokens: int, start: float = 0.0, seconds: float = 1.0, worker: str = "a") -> CommitRecord:
    return CommitRecord.of(unit, tokens=tokens, encode_started=1000 + start, encode_seconds=seconds, worker=worker)


SHORT = units("short.parquet", 4_000, (10, 10, 10, 10))
LONG = units("long.parquet", 8_000, (10, 10))
"""100 bytes a row, and 400."""


def test_a_source_that_was_not_seen_yet_is_judged_by_its_bytes() -> None:
    outlook = Outlook([*SHORT, *LONG], [*SHORT, *LONG])
    assert outlook.pending_tokens is None
    outlook.add(ended(SHORT[0], tokens=500), 1.0)  # 50 tokens a row, half a token a byte
    assert outlook.pending_tokens == 30 * 50 + 20 * 200


def test_a_source_that_was_seen_is_judged_by_its_own_rows() -> None:
    outlook = Outlook([*SHORT, *LONG], [*SHORT, *LONG])
    outlook.add(ended(SHORT[0], tokens=500), 1.0)
    outlook.add(ended(LONG[0], tokens=900), 2.0)
    assert outlook.pending_tokens == 30 * 50 + 10 * 90
    outlook.add(CommitRecord.of(LONG[1], error="damaged"), 3.0)  # its tokens are not to be waited for
    assert outlook.pending_tokens == 30 * 50
    for unit in SHORT[1:]:
        outlook.add(ended(unit, tokens=100), 4.0)
    assert outlook.pending_tokens == pytest.approx(0)
    assert outlook.seconds_left(4.0) == pytest.approx(0)


def test_a_failed_unit_says_nothing_about_the_others() -> None:
    outlook = Outlook(SHORT, SHORT)
    outlook.add(CommitRecord.of(SHORT[0], error="damaged"), 1.0)
    assert outlook.pending_tokens is None
    outlook.add(ended(SHORT[1], tokens=500), 2.0)
    assert outlook.pending_tokens == 20 * 50


def test_what_earlier_runs_did_counts_for_the_size_of_rows_only() -> None:
    outlook = Outlook([*SHORT, *LONG], [*SHORT[2:], LONG[1]])
    outlook.add(ended(SHORT[2], tokens=500), 1.0)
    assert outlook.pending_tokens == 10 * 50 + 10 * 200


def test_the_time_left_counts_down_between_units_and_grows_when_one_is_overdue() -> None:
    outlook = Outlook(SHORT, SHORT)
    assert outlook.seconds_left(0.0) is None
    outlook.add(ended(SHORT[0], tokens=100, seconds=10), 10.0)  # began at 0: 10 tokens a second
    assert outlook.tokens_per_second(10.0) == 10
    assert outlook.seconds_left(10.0) == 30
    assert outlook.seconds_left(18.0) == 22
    assert outlook.tokens_per_second(30.0) == 5  # nothing for 20 s where it never took longer than 10
    assert outlook.seconds_left(30.0) == 40


def test_the_pace_is_that_of_the_last_minutes() -> None:
    many = units("many.parquet", 10_000, (10,) * 100)
    outlook = Outlook(many, many)
    for number in range(50):
        outlook.add(ended(many[number], tokens=100), 1.0 + number)
    for number in range(50, 90):  # from here on at a tenth of the pace
        outlook.add(ended(many[number], tokens=100), 50.0 + 10 * (number - 49))
    assert outlook.tokens_per_second(450.0) == 10
    assert outlook.seconds_left(450.0) == 100


def test_one_unit_tells_nothing_about_how_busy_a_device_is() -> None:
    outlook = Outlook(SHORT, SHORT)
    outlook.add(ended(SHORT[0], 100, start=0, seconds=10), 10.0)
    assert outlook.busy_share(10.0) is None


def test_the_busy_share_is_over_the_last_half_minute_of_each_worker() -> None:
    outlook = Outlook(SHORT, SHORT)
    outlook.add(ended(SHORT[0], 100, start=0, seconds=6, worker="a"), 6.0)
    outlook.add(ended(SHORT[1], 100, start=8, seconds=2, worker="a"), 10.0)  # 8 of 10 s
    outlook.add(ended(SHORT[2], 100, start=500, seconds=1, worker="b"), 10.0)  # another clock
    assert outlook.busy_share(10.0) == 0.8
    outlook.add(ended(SHORT[3], 100, start=509, seconds=1, worker="b"), 10.0)  # 2 of 10 s
    assert outlook.busy_share(10.0) == 0.5
    assert outlook.busy_share(16.0) == 0.5  # the longest unit took 6 s: nothing is overdue
    assert outlook.busy_share(26.0) == 0.25


def test_what_a_device_did_before_the_last_half_minute_is_forgotten() -> None:
    many = units("many.parquet", 10_000, (10,) * 100)
    outlook = Outlook(many, many)
    for number in range(60):
        outlook.add(ended(many[number], 10, start=number, seconds=1), 1.0 + number)
    assert outlook.busy_share(60.0) == 1.0
    for number in range(60, 90):
        outlook.add(ended(many[number], 10, start=number, seconds=0.25), 1.0 + number)
    assert outlook.busy_share(90.0) == pytest.approx(0.25, abs=0.03)


def test_workers_that_went_are_not_seen_any_more() -> None:
    outlook = Outlook(SHORT, SHORT)
    outlook.add(ended(SHORT[0], 100, seconds=2, worker="a"), 2.0)
    outlook.add(ended(SHORT[1], 100, seconds=2, worker="b"), 20.0)
    assert outlook.workers_seen(31.0) == 2
    assert outlook.workers_seen(33.0) == 1
    outlook.add(ended(SHORT[2], 100, start=30, seconds=40, worker="a"), 70.0)
    assert outlook.workers_seen(135.0) == 2  # units may take 40 s, so b may yet be at work on one
