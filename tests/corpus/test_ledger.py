"""The ledger holds every record once it is flushed, and the last one of a unit counts."""

from __future__ import annotations

import logging
from dataclasses import fields

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedding.corpus.ledger import RECORD_SCHEMA, CommitRecord, Ledger, parquet_bytes, read_ledger, records_from_table, records_to_table
from embedding.corpus.plan import Unit, make_unit
from embedding.corpus.sources import Source
from embedding.corpus.storage import Storage, open_storage

FOLDER = "_control/records"


@pytest.fixture
def storage(storage_root: str) -> Storage:
    return open_storage(storage_root)


def unit(number: int) -> Unit:
    return make_unit(Source("a.parquet", "s3://b/a.parquet", 7, "v1"), number, 1, "f")


def record(number: int, tokens: int = 0, error: str = "") -> CommitRecord:
    return CommitRecord.of(unit(number), tokens=tokens, error=error)


def records_in(storage: Storage) -> dict[str, CommitRecord]:
    return {found.unit: found for found in records_from_table(read_ledger(storage))}


def test_an_empty_ledger(storage: Storage) -> None:
    Ledger(storage, "run-1").flush()
    assert storage.list("") == {}
    assert records_in(storage) == {}


def test_records_are_written_in_segments(storage: Storage) -> None:
    ledger = Ledger(storage, "run-1", segment_records=2)
    for number in range(5):
        ledger.append(record(number))
    assert list(storage.list(FOLDER)) == [f"{FOLDER}/run-1-00000{segment}.parquet" for segment in (0, 1)]
    assert read_ledger(storage).num_rows == 4
    ledger.flush()
    ledger.flush()
    assert len(storage.list(FOLDER)) == 3
    assert records_in(storage) == {unit(number).id: record(number) for number in range(5)}


def test_a_segment_does_not_wait_for_long_to_fill(storage: Storage) -> None:
    ledger = Ledger(storage, "run-1", segment_seconds=0)
    ledger.append(record(0))
    assert records_in(storage) == {unit(0).id: record(0)}


def test_the_last_record_of_a_unit_counts(storage: Storage) -> None:
    for run, tokens in (("20250102T000000Z-ab", 2), ("20250103T000000Z-aa", 4), ("20250101T000000Z-ff", 1)):
        ledger = Ledger(storage, run, segment_records=1)
        ledger.append(record(0, error="failed"))
        ledger.append(record(0, tokens))
        ledger.append(record(1, tokens))
    assert {key: found.tokens for key, found in records_in(storage).items()} == {unit(0).id: 4, unit(1).id: 4}
    assert not any(found.error for found in records_in(storage).values())


def test_a_thousand_segments_keep_their_order(storage: Storage) -> None:
    for segment in (2, 10, 999_999, 1000):
        storage.put(f"{FOLDER}/run-1-{segment:06d}.parquet", parquet_bytes(records_to_table([record(0, segment)])))
    assert records_in(storage)[unit(0).id].tokens == 999_999


@pytest.mark.parametrize(
    "damage",
    [b"", b"no Parquet", parquet_bytes(pa.table({"unit": ["a"]})), parquet_bytes(pa.table({"unit": ["a"], "of_a_later_version": [1]}))],
)
def test_a_segment_that_can_not_be_read_is_left_out(storage: Storage, damage: bytes, caplog: pytest.LogCaptureFixture) -> None:
    Ledger(storage, "run-1", segment_records=1).append(record(0))
    storage.put(f"{FOLDER}/run-2-000000.parquet", damage)
    with caplog.at_level(logging.WARNING):
        assert records_in(storage) == {unit(0).id: record(0)}
    assert f"{FOLDER}/run-2-000000.parquet cannot be read and is left out of the ledger" in caplog.text


@pytest.mark.parametrize("later", [["clipped"], ["chunks", "clipped"]])
def test_a_segment_of_an_earlier_version_is_read(storage: Storage, later: list[str], caplog: pytest.LogCaptureFixture) -> None:
    storage.put(f"{FOLDER}/run-1-000000.parquet", parquet_bytes(records_to_table([record(0, 7)]).drop_columns(later)))
    assert records_in(storage) == {unit(0).id: record(0, 7)}
    assert read_ledger(storage, ["tokens"])["tokens"].to_pylist() == [7]
    assert caplog.text == ""


VALUES: dict[str, st.SearchStrategy[object]] = {
    "str": st.text(st.characters(exclude_categories=["Cs"])),
    "int": st.integers(0, 2**63 - 1),
    "float": st.floats(allow_nan=False),
    "list[int]": st.lists(st.integers(0, 2**63 - 1), max_size=3),
}
RECORDS = st.builds(CommitRecord, **{field.name: VALUES[str(field.type)] for field in fields(CommitRecord)})


@given(st.lists(RECORDS, max_size=3))
def test_records_survive_a_table(records: list[CommitRecord]) -> None:
    table = records_to_table(records)
    assert table.schema == RECORD_SCHEMA
    assert records_from_table(table) == records


def test_a_record_names_its_unit() -> None:
    made = CommitRecord.of(unit(3), tokens=5)
    assert (made.unit, made.shard, made.source, made.first_row, made.rows) == (unit(3).id, unit(3).shard, "s3://b/a.parquet", 3, 1)
    assert (made.tokens, made.bytes, made.encode_seconds, made.worker, made.error) == (5, 0, 0.0, "", "")
