"""What a report reads: the last record of each committed unit, and a bounded part of everything else."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from embedding.corpus import review
from embedding.corpus.ledger import CommitRecord, Ledger, parquet_bytes
from embedding.corpus.plan import Unit, make_unit
from embedding.corpus.review import read_records, read_rejections, read_runs, sample_shards
from embedding.corpus.sources import Source
from embedding.corpus.storage import Storage, open_storage
from tests.support.faulty_proxy import FaultyProxy
from tests.support.made_output import RUN, empty_output, made_output
from tests.support.s3_server import S3Server

SOON = math.inf
LATE = 0.0
"""Moments on the monotonic clock: never, and long ago."""


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage(str(tmp_path / "out"))


def unit(number: int) -> Unit:
    return make_unit(Source("a.parquet", "s3://b/a.parquet", 7, "v1"), number, 1, "f")


def append(storage: Storage, run: str, *records: CommitRecord) -> None:
    ledger = Ledger(storage, run, segment_records=1)
    for record in records:
        ledger.append(record)


def test_the_last_record_of_each_committed_unit_counts(storage: Storage) -> None:
    append(storage, "2-b", CommitRecord.of(unit(0), error="failed"), CommitRecord.of(unit(0), tokens=2), CommitRecord.of(unit(1), tokens=3))
    append(storage, "1-a", CommitRecord.of(unit(0), tokens=7), CommitRecord.of(unit(2), tokens=8), CommitRecord.of(unit(3), tokens=9))
    append(storage, "3-c", CommitRecord.of(unit(3), error="failed"))
    found = read_records(storage, [unit(number).shard for number in (0, 1, 3)], "3-c", SOON)  # the shard of unit 2 is nobody's by now
    assert found.table.select(["unit", "tokens", "run"]).to_pylist() == [
        {"unit": unit(0).id, "tokens": 2, "run": "2-b"},
        {"unit": unit(1).id, "tokens": 3, "run": "2-b"},
    ]
    assert found.unread == 0
    assert found.of_run("2-b").num_rows == 2
    assert found.of_run("3-c").num_rows == 0


def test_this_runs_records_are_read_first_and_others_while_there_is_time(storage: Storage) -> None:
    for run in ("1-a", "2-b", "3-c"):
        append(storage, run, CommitRecord.of(unit(int(run[0]))))
    found = read_records(storage, [unit(number).shard for number in range(4)], "2-b", LATE)
    assert (found.table["run"].to_pylist(), found.unread) == (["2-b"], 2)


def test_segments_of_other_versions_are_left_out(storage: Storage) -> None:
    append(storage, "1-a", CommitRecord.of(unit(0)))
    for number, data in enumerate([b"damaged", parquet_bytes(pa.table({"unit": ["of an earlier version"]}))]):
        storage.put(f"_control/records/2-b-00000{number}.parquet", data)
    found = read_records(storage, [unit(0).shard], "2-b", SOON)
    assert (found.table.num_rows, found.unread) == (1, 2)
    assert read_records(storage, [], "2-b", SOON).table.num_rows == 0


def test_an_output_without_records(storage: Storage) -> None:
    found = read_records(storage, ["data/a.parquet"], "1-a", SOON)
    assert (found.table.num_rows, found.unread) == (0, 0)
    assert read_rejections(storage, found, SOON).rows == 0
    assert read_runs(storage, SOON) == []
    assert sample_shards(storage, [], rows=10, seed="s", until=SOON).vectors_RD.size == 0


def test_rejected_rows_are_counted_by_reason_in_a_part_of_their_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = made_output(str(tmp_path / "out"), shards=5, rows=4)
    records = read_records(made.output.storage, made.shards, RUN, SOON)
    found = read_rejections(made.output.storage, records, SOON)
    assert (found.reasons, found.rows) == ({"text is null": 5}, 5)
    assert found.examples["text is null"]["row_index"] == 4
    monkeypatch.setattr(review, "REJECTED_FILES", 3)
    assert read_rejections(made.output.storage, records, SOON).rows == 3
    assert read_rejections(made.output.storage, records, LATE).rows == 0


def test_a_sample_is_of_the_right_rows_and_the_same_each_time(tmp_path: Path) -> None:
    made = made_output(str(tmp_path / "out"), shards=30, rows=50)
    storage = made.output.storage
    found = sample_shards(storage, made.shards, rows=200, seed="s", until=SOON)
    assert (len(found.vectors_RD), found.shards, found.scanned, found.unread) == (200, 16, 16 * 50, [])
    names = found.columns["id"]
    assert len(set(names)) == 200
    whole = sample_shards(storage, made.shards[3:4], rows=1000, seed="s", until=SOON)
    assert whole.columns["id"] == [f"id-3-{row}" for row in range(50)]
    assert set(whole.columns) == {"id", "topic", "text", "source"}
    again = sample_shards(storage, made.shards, rows=200, seed="s", until=SOON)
    assert (again.columns, again.vectors_RD.tobytes()) == (found.columns, found.vectors_RD.tobytes())
    assert sample_shards(storage, made.shards, rows=200, seed="t", until=SOON).columns != found.columns


def test_shards_that_can_not_be_read_are_named(tmp_path: Path) -> None:
    made = made_output(str(tmp_path / "out"), shards=3, rows=5)
    made.output.storage.put(made.shards[0], b"no Parquet")
    made.output.storage.delete([made.shards[1]])
    found = sample_shards(made.output.storage, made.shards, rows=6, seed="s", until=SOON)
    assert [reason.partition(":")[0] for reason in found.unread] == made.shards[:2]
    assert set(found.columns["source"]) == {"file:///corpus/part-2.parquet"}
    late = sample_shards(made.output.storage, [made.shards[2]] * 2, rows=6, seed="s", until=LATE)
    assert (late.shards, late.unread) == (1, [f"{made.shards[2]}: there was no time left to read it"])


def test_repeated_vectors_count_beyond_repeated_tokens(tmp_path: Path) -> None:
    made = empty_output(str(tmp_path / "out"))
    vectors = np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32)
    vectors[10:] = vectors[0]
    columns = {"id": range(20)}
    made.add(vectors, columns, duplicates=4)
    made.add(vectors, columns, duplicates=10)
    found = sample_shards(made.output.storage, made.shards, rows=4, seed="s", until=SOON)
    assert (found.scanned, found.repeats) == (40, 6)


def test_columns_that_can_not_be_shown_and_long_texts(tmp_path: Path) -> None:
    made = empty_output(str(tmp_path / "out"))
    columns = {"id": [1, None], "tags": [["a"], []], "raw": [b"\xff", b""], "text": ["x" * 10**6, "short"], "no": pa.nulls(2)}
    made.add(np.eye(2, 4, dtype=np.float32), columns)
    made.add(np.empty((0, 4), np.float32), {"id": pa.array([], pa.int64())})
    found = sample_shards(made.output.storage, made.shards, rows=10, seed="s", until=SOON)
    assert {name: len(values[0] or "") for name, values in found.columns.items()} == {"id": 1, "text": 300, "source": 29}
    assert found.columns["id"] == ["1", None]


def test_a_large_shard_is_not_fetched_whole(proxy: FaultyProxy, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    made = empty_output(s3.folder())
    rows = 20_000
    made.add(np.random.default_rng(0).normal(size=(rows, 256)).astype(np.float32), {"id": range(rows)})
    monkeypatch.setattr(review, "_SCANNED_BYTES", 2**20)
    before = proxy.answered_bytes
    found = sample_shards(made.output.storage, made.shards, rows=100, seed="s", until=SOON)
    assert (len(found.vectors_RD), found.scanned) == (100, 1024)
    assert 2**20 / 2 < proxy.answered_bytes - before < made.records[0].bytes / 4
