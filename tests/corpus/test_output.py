"""An output keeps its first settings, completes only what is whole, and its manifest is true to its shards."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedding.corpus.ledger import CommitRecord, Ledger, parquet_bytes, records_from_table
from embedding.corpus.output import MANIFEST, SUCCESS, JobSettings, Output, rejected_name
from embedding.corpus.plan import Unit, make_unit
from embedding.corpus.shard import shard_table
from embedding.corpus.shards.parquet import PARQUET
from embedding.corpus.sources import Source
from embedding.errors import ConfigError, LeaseLostError, SettingsChangedError, StorageError

SETTINGS = JobSettings(
    vectors={"model": "0123", "prompt": None, "max_tokens": 256, "keep_columns": ["lang"]},
    kept={"unit_rows": 4},
    input=("s3://b/in",),
    versions={"torch": "2.13"},
)
FOREIGN = ["data/README.md", "data/other.parquet", "data/date=1/_metadata", "data/a-0000000000-0123.parquet"]


def ours() -> None:
    """Nobody took the output over."""


@pytest.fixture
def output(storage_root: str) -> Output:
    return Output(storage_root)


def unit(number: int = 0, version: str = "v1") -> Unit:
    return make_unit(Source(f"p={number}/a.parquet", f"s3://b/in/p={number}/a.parquet", 7, version), 0, 4, SETTINGS.fingerprint)


def commit(output: Output, unit: Unit, *, rejected: int = 0, tokens: int = 40) -> CommitRecord:
    """Put the shard of a unit, and the list of its rejected rows, as a worker does; the record is not in the ledger yet."""
    facts = {"rejected": rejected, "tokens": tokens, "truncated": 1}
    rows = unit.num_rows - rejected
    table = shard_table(pa.table({"id": range(rows)}), np.full((rows, 2), tokens, np.float32), {})
    data = PARQUET.encode(table, {"unit": unit.identity(), "record": facts})
    if rejected:
        output.storage.put(rejected_name(unit.id), parquet_bytes(pa.table({"row_index": range(rejected)})))
    output.storage.put(unit.shard, data)
    return CommitRecord.of(unit, **facts, bytes=len(data), worker="host:1")


def ledger(output: Output, *records: CommitRecord, run: str = "run-1") -> None:
    book = Ledger(output.storage, run)
    for record in records:
        book.append(record)
    book.flush()


def manifest(output: Output) -> list[dict[str, Any]]:
    data = output.storage.read(MANIFEST)
    assert data is not None
    rows: list[dict[str, Any]] = pq.read_table(io.BytesIO(data)).to_pylist()
    return rows


def test_a_new_output_takes_the_settings_given(output: Output) -> None:
    assert output.settings() is None
    assert output.begin(SETTINGS) == SETTINGS
    assert output.settings() == SETTINGS
    assert output.begin(SETTINGS) == SETTINGS


def test_what_does_not_shape_vectors_stays_as_it_was_begun(output: Output) -> None:
    output.begin(SETTINGS)
    later = replace(SETTINGS, kept={"unit_rows": 9}, input=("s3://b/elsewhere",), versions={"torch": "3"})
    assert output.begin(later) == SETTINGS
    assert later.fingerprint == SETTINGS.fingerprint


def test_what_the_last_run_was_asked_is_remembered(output: Output) -> None:
    output.begin(SETTINGS)
    output.remember(SETTINGS, ("s3://b/elsewhere",), {"model": "m"})
    assert output.settings() == replace(SETTINGS, input=("s3://b/elsewhere",), asked={"model": "m"})


def test_settings_that_shape_vectors_are_refused_naming_each_old_and_new(output: Output) -> None:
    output.begin(SETTINGS)
    other = replace(SETTINGS, vectors={"model": "0123", "prompt": "query: ", "max_tokens": 128, "keep_columns": ["lang"], "dims": 64})
    assert other.fingerprint != SETTINGS.fingerprint
    with pytest.raises(SettingsChangedError) as refused:
        output.begin(other)
    assert str(refused.value) == (
        f"{output.url} was started with other settings (dims: null -> 64; max_tokens: 256 -> 128; "
        'prompt: null -> "query: "); use those, choose another --output, or start over with --restart'
    )
    assert output.settings() == SETTINGS


def test_a_long_setting_is_shortened(output: Output) -> None:
    output.begin(SETTINGS)
    with pytest.raises(SettingsChangedError) as refused:
        output.begin(replace(SETTINGS, vectors=SETTINGS.vectors | {"prompt": "x" * 5000}))
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize(
    "damage", [b"", b"{", b"\xff\xfe", b"[]", b"null", b"{}", b'{"vectors": {}, "kept": {}, "input": null, "versions": {}}']
)
def test_damaged_settings_are_named(output: Output, damage: bytes) -> None:
    output.storage.put("_control/job.json", damage)
    for call in (output.settings, lambda: output.begin(SETTINGS)):
        with pytest.raises(ConfigError, match=r"/_control/job\.json is damaged \(.*\); start over with --restart$"):
            call()


def test_the_settings_say_their_fingerprint(output: Output) -> None:
    output.begin(SETTINGS)
    data = output.storage.read("_control/job.json")
    assert data is not None
    assert json.loads(data)["fingerprint"] == SETTINGS.fingerprint
    assert replace(SETTINGS, vectors=dict(reversed(SETTINGS.vectors.items()))).fingerprint == SETTINGS.fingerprint


def test_shards_are_what_units_are_named(output: Output) -> None:
    units = [unit(number) for number in range(3)]
    for each in units:
        commit(output, each)
    for name in FOREIGN:
        output.storage.put(name, b"not ours")
    assert output.shards().keys() == {each.shard for each in units}


def test_completing_removes_what_no_unit_claims_and_nothing_else(output: Output) -> None:
    old, new, same = unit(0, "v1"), unit(0, "v2"), unit(1)
    ledger(output, commit(output, old, rejected=1), commit(output, same, rejected=2))
    ledger(output, commit(output, new), run="run-2")
    for name in [*FOREIGN, "_control/tmp/.a.parquet.0123.tmp", "_control/runs/1/summary.json"]:
        output.storage.put(name, b"not a shard")
    before = output.storage.list("")
    output.complete([new, same], output.shards(), ours)
    after = output.storage.list("")
    assert before.keys() - after.keys() == {old.shard, rejected_name(old.id), "_control/tmp/.a.parquet.0123.tmp"}
    assert after.keys() - before.keys() == {MANIFEST, SUCCESS}
    assert output.is_complete()


def test_completing_puts_success_last(output: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    put, delete = output.storage.put, output.storage.delete

    def put_and_note(name: str, data: bytes) -> None:
        put(name, data)
        done.append(f"put {name}")

    def delete_and_note(names: list[str]) -> None:
        delete(names)
        done.extend(f"delete {name}" for name in names)

    commit(output, unit(0, "v1"))
    commit(output, unit(0, "v2"))
    monkeypatch.setattr(output.storage, "put", put_and_note)
    monkeypatch.setattr(output.storage, "delete", delete_and_note)
    output.complete([unit(0, "v2")], output.shards(), ours)
    assert done == [f"delete {unit(0, 'v1').shard}", f"put {MANIFEST}", f"put {SUCCESS}"]


@pytest.mark.parametrize(("asked_before", "changed"), [(0, set()), (1, {"stale"}), (2, {"stale", MANIFEST})])
def test_a_run_that_lost_the_output_changes_nothing_more(output: Output, asked_before: int, changed: set[str]) -> None:
    stale = unit(0, "v1")
    commit(output, stale)
    commit(output, unit(0, "v2"))
    answers = iter([None] * asked_before)

    def still_ours() -> None:
        next(answers)

    before = output.storage.list("").keys()
    with pytest.raises(StopIteration):
        output.complete([unit(0, "v2")], output.shards(), still_ours)
    after = output.storage.list("").keys()
    assert {"stale" if name == stale.shard else name for name in before ^ after} == changed


def test_the_manifest_is_true_to_the_shards(output: Output) -> None:
    units = [unit(number) for number in (2, 0, 1)]
    ledger(output, *(commit(output, each, rejected=number, tokens=10 * number) for number, each in enumerate(units)))
    output.complete(units, output.shards(), ours)
    rows = manifest(output)
    assert [row["unit"] for row in rows] == [each.id for each in units]
    for row, each in zip(rows, units, strict=True):
        with output.storage.open(row["shard"]) as file:
            shard = pq.read_table(file)
        footer = json.loads(shard.schema.metadata[b"embedding.record"])
        assert (row["rows"], row["bytes"]) == (shard.num_rows, output.shards()[each.shard])
        assert row["rows"] + row["rejected"] == row["source_rows"] == each.num_rows
        assert {name: row[name] for name in footer} == footer
        assert (row["source"], row["source_version"], row["first_row"]) == (each.source.uri, "v1", 0)


def test_an_output_without_rows_completes(output: Output) -> None:
    output.complete([], output.shards(), ours)
    assert manifest(output) == []
    assert output.is_complete()


def test_a_lost_shard_keeps_the_output_incomplete(output: Output) -> None:
    stale = unit(5)
    ledger(output, commit(output, unit(0)), commit(output, unit(1)), commit(output, stale))
    output.storage.delete([unit(1).shard])
    with pytest.raises(StorageError, match=rf"lost 1 shard, first {unit(1).shard}; run the same command again to write them again$"):
        output.complete([unit(0), unit(1)], output.shards(), ours)
    assert not output.is_complete()
    assert stale.shard in output.shards()  # nothing goes before its replacement is there


def test_records_that_a_dead_driver_never_appended_come_from_the_footers(output: Output) -> None:
    known, lost = commit(output, unit(0)), commit(output, unit(1), rejected=1, tokens=7)
    ledger(output, known)
    records = records_from_table(output.records([unit(0), unit(1)], output.shards()))
    assert records == [known, replace(lost, bytes=0, worker="")]


def test_a_failure_that_was_made_good_does_not_hide_the_shard(output: Output) -> None:
    record = commit(output, unit(0), tokens=7)
    ledger(output, record)
    ledger(output, CommitRecord.of(unit(0), error="out of memory"), run="run-2")  # by a machine whose clock is ahead
    assert output.records([unit(0)], output.shards(), ["tokens"]).to_pylist() == [{"tokens": 7}]


def test_a_record_of_an_earlier_shard_of_the_unit_is_not_believed(output: Output) -> None:
    ledger(output, commit(output, unit(0), rejected=2))
    commit(output, unit(0))  # made anew by a driver that died before it appended the record
    assert output.records([unit(0)], output.shards(), ["rejected"]).to_pylist() == [{"rejected": 0}]
    output.complete([unit(0)], output.shards(), ours)
    assert output.storage.list("_control/rejected") == {}
    assert [(row["rows"], row["rejected"]) for row in manifest(output)] == [(4, 0)]


def test_a_renamed_shard_keeps_its_rejected_rows(output: Output) -> None:
    moved = replace(unit(0), shard=unit(0).shard.replace("/a-", "/elsewhere-"))  # as when --input names the folder above
    commit(output, unit(0), rejected=1)
    ledger(output, commit(output, moved, rejected=1))
    output.complete([moved], output.shards(), ours)
    assert output.shards().keys() == {moved.shard}
    assert output.storage.list("_control/rejected").keys() == {rejected_name(moved.id)}


def test_whether_a_unit_is_committed(output: Output) -> None:
    assert output.committed_record(unit(0)) is None
    record = commit(output, unit(0), rejected=1)
    assert output.committed_record(unit(0)) == replace(record, bytes=0, worker="")


@pytest.mark.parametrize("damage", [b"", b"garbage that is no Parquet", parquet_bytes(pa.table({"id": [1]}))])
def test_a_damaged_shard_is_named(output: Output, damage: bytes) -> None:
    output.storage.put(unit(0).shard, damage)
    with pytest.raises(StorageError, match=rf"{unit(0).shard} is not a complete shard; delete it and run the same command again$"):
        output.complete([unit(0)], output.shards(), ours)
    assert not output.is_complete()


def test_beginning_anything_withdraws_success(output: Output) -> None:
    output.mark_incomplete()
    output.complete([], {}, ours)
    output.mark_incomplete()
    assert not output.is_complete()


def test_clearing_leaves_the_lease_and_what_is_not_ours(output: Output) -> None:
    output.begin(SETTINGS)
    ledger(output, commit(output, unit(0), rejected=1))
    output.complete([unit(0)], output.shards(), ours)
    for name in [*FOREIGN, "_control/lease.json", "_control/tmp/x", "notes.txt"]:
        output.storage.put(name, b"x")
    output.clear(ours)
    assert output.storage.list("").keys() == {*FOREIGN, "_control/lease.json", "notes.txt"}
    assert output.settings() is None


def test_clearing_stops_where_another_run_took_the_output_over(output: Output) -> None:
    output.begin(SETTINGS)
    commit(output, unit(0))
    output.complete([unit(0)], output.shards(), ours)
    before = output.storage.list("")

    def lost() -> None:
        raise LeaseLostError("taken over")

    with pytest.raises(LeaseLostError):
        output.clear(lost)
    assert output.storage.list("") == before


def test_clearing_takes_the_settings_last(output: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    output.begin(SETTINGS)
    commit(output, unit(0))
    deleted: list[list[str]] = []
    monkeypatch.setattr(output.storage, "delete", lambda names: deleted.append(list(names)))
    output.clear(ours)
    assert deleted == [[SUCCESS], [unit(0).shard], ["_control/job.json"]]
