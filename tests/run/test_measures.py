"""Pace, workers' time and slow units from literal records."""

from __future__ import annotations

import numpy as np
import pytest

from embedding.corpus.ledger import CommitRecord, records_to_table
from embedding.corpus.plan import make_unit
from embedding.corpus.sources import Source
from embedding.run.report import measures


def record(number: int, worker: str, start: float, seconds: float, **facts: object) -> CommitRecord:
    unit = make_unit(Source("a", "file:///a", 1, "v"), 10 * number, 10, "f")
    return CommitRecord.of(unit, worker=worker, encode_started=start, encode_seconds=seconds, **facts)


def test_the_pace_spreads_a_units_tokens_over_its_time() -> None:
    pace = measures.pace(records_to_table([record(0, "a", 100, 4, tokens=400), record(1, "b", 102, 8, tokens=80)]))
    assert (pace.began, pace.seconds) == (100, 10)
    rates = {float(second): float(rate) for second, rate in zip(pace.edges[:-1], pace.tokens_per_second, strict=True)}
    assert [rates[second] for second in (0.0, 1.0, 2.0, 3.0, 5.0, 9.0)] == pytest.approx([100, 100, 110, 110, 10, 10])
    assert (pace.tokens_per_second * np.diff(pace.edges)).sum() == pytest.approx(480)


def test_a_workers_time_is_divided_without_rest() -> None:
    records = [
        record(0, "a", 100, 10, tokens=5),
        record(1, "a", 110, 10, tokens=5),
        record(2, "a", 123, 5, tokens=5, tokenize_seconds=1.0),  # after a gap of 3 s, of which the tokenizer took 1
        record(3, "b", 104, 6, tokens=20, tokenize_seconds=9.0),
        record(4, "b", 112, 4, tokens=0, tokenize_seconds=9.0),  # tokenized while the other was encoded
    ]
    busiest, other = measures.worker_times(records_to_table(records[::-1]))
    assert (busiest.name, busiest.units, busiest.tokens) == ("b", 2, 20)
    assert (busiest.encoding, busiest.tokenizing, busiest.waiting, busiest.outside) == (10, 2, 0, 16)
    assert (other.encoding, other.tokenizing, other.waiting, other.outside) == (25, 1, 2, 0)
    assert busiest.seconds == other.seconds == 28


def test_the_slowest_units_come_first_and_waiting_is_not_their_fault() -> None:
    records = [record(number, "a", 100, float(number), read_seconds=1.0) for number in range(20)]
    records.append(record(20, "a", 100, 0.0, wait_seconds=99.0))
    found = measures.slowest(records_to_table(records))
    assert [unit["seconds"] for unit in found] == [20, 19, 18, 17, 16, 15, 14, 13]
    assert found[0]["first_row"] == 190


def test_lengths_add_up_over_records() -> None:
    table = records_to_table([record(0, "a", 1, 1, lengths=[0, 2]), record(1, "a", 1, 1), record(2, "a", 1, 1, lengths=[1, 1, 5])])
    assert measures.lengths(table)[:4].tolist() == [1, 3, 5, 0]
    assert measures.lengths(table.slice(0, 0)).sum() == 0
    assert measures.lengths(table.slice(1, 2))[:4].tolist() == [1, 1, 5, 0]
