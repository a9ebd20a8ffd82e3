"""A complete output of Lance shards is one version of a Lance dataset, which points at them; a crash on the way to it heals."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest

from embedding.corpus.output import JobSettings, Output, rejected_name
from embedding.corpus.plan import Unit, make_unit
from embedding.corpus.shard import shard_table
from embedding.corpus.shards.lance import LANCE
from embedding.corpus.sources import Source
from embedding.errors import StorageError
from tests.corpus.test_output import ours

SETTINGS = JobSettings({"output_format": "lance"}, {"unit_rows": 4}, ("s3://b/in",))
FIRST, SECOND = "_versions/18446744073709551614.manifest", "_versions/18446744073709551613.manifest"


@pytest.fixture
def output(storage_root: str) -> Output:
    return Output(storage_root, LANCE)


def unit(number: int, version: str = "v1") -> Unit:
    source = Source(f"p={number}/a.parquet", f"s3://b/in/p={number}/a.parquet", 7, version)
    return make_unit(source, 0, 4, SETTINGS.fingerprint, names=LANCE.names)


def commit(output: Output, *units: Unit, rows: int = 4) -> None:
    for each in units:
        number = int(each.source.path[2])
        names, origin = [f"{number}-{row}" for row in range(rows)], [each.source.version] * rows
        copied = pa.table({"id": pa.array(names, pa.string()), "version": pa.array(origin, pa.string())})
        vectors_RD = np.full((rows, 4), number, np.float32) + np.arange(rows, dtype=np.float32)[:, None] / 8
        record = {"rejected": 4 - rows, "tokens": 40, "truncated": 0}
        output.storage.put(each.shard, LANCE.encode(shard_table(copied, vectors_RD, {}), {"unit": each.identity(), "record": record}))


def complete(output: Output, units: Sequence[Unit], still_ours: Callable[[], None] = ours) -> None:
    output.mark_incomplete()
    output.complete(units, output.shards(), still_ours)


def opened(output: Output, tmp_path: Path, version: int | None = None) -> lance.LanceDataset:
    """What a reader finds, in a copy on the disk where the output is on S3."""
    folder = tmp_path / f"copy-{random.random()}"
    for name in output.storage.list(""):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        output.storage.download(name, file)
    return lance.dataset(str(folder), version=version)


def ids(dataset: lance.LanceDataset) -> list[str]:
    return [f"{row['id']} {row['version']}" for row in dataset.to_table(["id", "version"], scan_in_order=True).to_pylist()]


def rows_of(*units: Unit) -> list[str]:
    return [f"{each.source.path[2]}-{row} {each.source.version}" for each in units for row in range(4)]


def versions(output: Output) -> list[str]:
    return list(output.storage.list("_versions"))


def test_shards_lie_flat_where_lance_looks_for_them(output: Output) -> None:
    assert unit(3).shard == f"data/p=3-a-0000000000-{unit(3).id}.lance"
    commit(output, unit(3))
    assert output.shards().keys() == {unit(3).shard}


def test_a_complete_output_is_a_dataset(output: Output, tmp_path: Path) -> None:
    units = [unit(0), unit(1)]
    commit(output, *units)
    before = output.storage.list("data")
    complete(output, units)
    dataset = opened(output, tmp_path)
    assert (dataset.version, ids(dataset)) == (1, rows_of(*units))
    dataset.validate()  # type: ignore[no-untyped-call]
    assert dataset.to_table(filter="id = '1-2'")["embedding"].to_pylist() == [[1.25] * 4]
    nearest = {"column": "embedding", "q": np.full(4, 1.3, np.float32), "k": 2}
    assert dataset.to_table(columns=["id", "_distance"], nearest=nearest)["id"].to_pylist() == ["1-2", "1-3"]
    assert output.storage.list("data") == before
    assert versions(output) == [FIRST]
    assert output.is_complete()


def test_what_comes_is_appended_and_an_index_stays(output: Output, tmp_path: Path) -> None:
    commit(output, unit(1))
    complete(output, [unit(1)])
    dataset = opened(output, tmp_path)
    dataset.create_scalar_index("id", "BTREE")
    folder = Path(dataset.uri)
    for name in (file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()):
        output.storage.put(name, (folder / name).read_bytes())  # as if Lance had made it there
    commit(output, unit(0), unit(2), unit(3))
    complete(output, [unit(number) for number in range(4)])
    dataset = opened(output, tmp_path)
    assert (dataset.version, ids(dataset)) == (3, rows_of(unit(1), unit(0), unit(2), unit(3)))  # in the order in which they came
    assert [fragment.fragment_id for fragment in dataset.get_fragments()] == [0, 1, 2, 3]
    assert [index.name for index in dataset.describe_indices()] == ["id_idx"]
    assert dataset.to_table(filter="id = '0-3'")["version"].to_pylist() == ["v1"]
    assert ids(opened(output, tmp_path, version=1)) == rows_of(unit(1))


def test_what_changed_takes_its_versions_along(output: Output, tmp_path: Path) -> None:
    old, new, same = unit(0, "v1"), unit(0, "v2"), unit(1)
    commit(output, old, same)
    complete(output, [old, same])
    commit(output, new)
    complete(output, [new, same])
    dataset = opened(output, tmp_path)
    assert (dataset.version, ids(dataset)) == (2, rows_of(new, same))
    assert versions(output) == [SECOND]
    assert len(output.storage.list("_transactions")) == 1
    assert output.shards().keys() == {new.shard, same.shard}


def test_nothing_new_is_no_version(output: Output) -> None:
    commit(output, unit(0))
    complete(output, [unit(0)])
    before = output.storage.list("")
    complete(output, [unit(0)])
    assert output.storage.list("") == before


def test_shards_without_rows_are_in_no_version(output: Output, tmp_path: Path) -> None:
    commit(output, unit(0), rows=0)
    output.storage.put(rejected_name(unit(0).id), b"four of them")
    complete(output, [unit(0)])
    assert ids(opened(output, tmp_path)) == []
    commit(output, unit(1))
    complete(output, [unit(0), unit(1)])
    assert ids(opened(output, tmp_path)) == rows_of(unit(1))


def test_without_a_shard_there_is_no_dataset(output: Output) -> None:
    commit(output, unit(0))
    complete(output, [unit(0)])
    complete(output, [])
    assert output.storage.list("").keys() == {"_control/manifest.parquet", "_SUCCESS"}


def test_clearing_takes_the_versions_before_what_they_point_at(output: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    output.begin(SETTINGS)
    commit(output, unit(0))
    complete(output, [unit(0)])
    order: list[str] = []
    monkeypatch.setattr(output.storage, "delete", order.extend)
    output.clear(ours)
    assert order.index("_SUCCESS") < order.index(FIRST) < order.index(unit(0).shard) < order.index("_control/job.json")
    assert set(output.storage.list("")) == set(order)


class Killed(BaseException):
    """The process is gone."""


@pytest.mark.parametrize("moment", range(7))
def test_a_crash_at_any_moment_is_healed(moment: int, storage_root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Readers always find a version of which every file is there: the old one, until the new one is."""
    output = Output(storage_root, LANCE)
    old, new, same = unit(0, "v1"), unit(0, "v2"), unit(1)
    commit(output, old, same)
    complete(output, [old, same])
    commit(output, new)
    output.mark_incomplete()
    done: list[str] = []

    def dying(action: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            if len(done) == moment:
                raise Killed
            done.append(str(arguments[0]))
            return action(*arguments)

        return run

    with monkeypatch.context() as patch:
        for name in ("put", "put_if_absent", "delete"):
            patch.setattr(output.storage, name, dying(getattr(output.storage, name)))
        with suppress(Killed):
            output.complete([new, same], output.shards(), ours)
    found = ids(opened(output, tmp_path))
    assert found == (rows_of(old, same) if moment < 2 else rows_of(new, same))
    assert output.is_complete() == (moment == 6)
    complete(output, [new, same])
    dataset = opened(output, tmp_path)
    assert (dataset.version, ids(dataset), versions(output)) == (2, rows_of(new, same), [SECOND])
    assert output.shards().keys() == {new.shard, same.shard}
    assert output.is_complete()


def test_a_run_that_lost_the_output_puts_no_version(output: Output) -> None:
    commit(output, unit(0))

    def lost() -> None:
        raise Killed

    with pytest.raises(Killed):
        complete(output, [unit(0)], lost)
    assert output.storage.list("").keys() == {unit(0).shard}


def test_a_version_of_somebody_else_is_not_replaced(output: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    commit(output, unit(0))
    listing = output.storage.list
    output.storage.put(FIRST, b"somebody else's")
    monkeypatch.setattr(output.storage, "list", lambda prefix: {} if prefix == "_versions" else listing(prefix))
    remedy = "run the same command again to continue from that version"
    with pytest.raises(StorageError, match=rf"{FIRST} was written by another program in the meantime; {remedy}$"):
        complete(output, [unit(0)])
    assert output.storage.read(FIRST) == b"somebody else's"
    assert not output.is_complete()


def test_a_damaged_version_is_named(output: Output) -> None:
    commit(output, unit(0))
    output.storage.put(FIRST, b"no manifest")
    remedy = "delete it and run the same command"
    with pytest.raises(StorageError, match=rf"{FIRST} is not a readable version of a Lance dataset: .*; {remedy}"):
        complete(output, [unit(0)])


def test_a_dataset_that_somebody_changed_is_made_what_it_was(output: Output, tmp_path: Path) -> None:
    commit(output, unit(0), unit(1))
    complete(output, [unit(0), unit(1)])
    dataset = opened(output, tmp_path)
    dataset.delete("id = '0-0'")
    folder = Path(dataset.uri)
    for file in folder.rglob("*"):
        if file.is_file():
            output.storage.put(file.relative_to(folder).as_posix(), file.read_bytes())
    published = LANCE.published(output.storage)
    assert published is not None
    assert published.shards is None
    complete(output, [unit(0), unit(1)])
    assert ids(opened(output, tmp_path)) == rows_of(unit(0), unit(1))
