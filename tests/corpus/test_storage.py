"""The laws of a store, the same on a disk and on S3: whole values, one winner, complete listings."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from embedding.corpus.storage import Storage, filesystem_of, open_storage
from tests.support.processes import running
from tests.support.waiting import wait_until

RACERS = {"local": 8, "s3": 3}
ROUNDS = {"local": 20, "s3": 3}
"""The S3 server makes those who come second wait for a second."""


@pytest.fixture
def storage(storage_root: str) -> Storage:
    return open_storage(storage_root, temporary_folder="_control/tmp")


def test_put_read_exists_delete(storage: Storage) -> None:
    assert storage.read("data/a") is None
    assert not storage.exists("data/a")
    storage.put("data/a", b"one")
    storage.put("data/a", b"two")
    assert storage.read("data/a") == b"two"
    assert storage.exists("data/a")
    with storage.open("data/a") as file:
        file.seek(1)
        assert file.read(1) == b"w"
    storage.delete(["data/a"])
    assert storage.read("data/a") is None
    assert not storage.exists("data/a")


def test_values_of_any_size(storage: Storage) -> None:
    for size in (0, 1, 2**20 + 1):
        storage.put("value", os.urandom(size) if size else b"")
        data = storage.read("value")
        assert data is not None
        assert len(data) == size
        assert storage.list("") == {} or list(storage.list("").values()) == [size]


def test_deleting_is_idempotent(storage: Storage) -> None:
    storage.put("a", b"")
    storage.put("b", b"")
    storage.delete([])
    storage.delete(["a", "never/there"])
    storage.delete(["a", "never/there"])
    assert storage.exists("b")


def test_a_listing_is_sorted_recursive_and_of_one_folder(storage: Storage) -> None:
    names = ["data/b", "data/a/z", "data/a-b", "data/a.c", "data/a/b/c", "data/é"]
    for name in [*names, "database/x", "other"]:
        storage.put(name, name.encode())
    assert list(storage.list("data").items()) == [(name, len(name.encode())) for name in sorted(names)]
    assert storage.list("data/a") == {"data/a/b/c": 10, "data/a/z": 8}
    assert storage.list("nothing") == storage.list("dat") == {}


def test_an_emptied_folder_lists_as_empty(storage: Storage) -> None:
    storage.put("data/a", b"")
    storage.delete(["data/a"])
    assert storage.list("data") == {}


def test_long_listings_and_deletions_are_paged(storage: Storage) -> None:
    names = [f"data/{number:05d}" for number in range(1050)]  # a page of S3 has 1,000
    filesystem, root = filesystem_of(storage.url)
    filesystem.makedirs(f"{root}/data", exist_ok=True)
    filesystem.pipe({f"{root}/{name}": b"x" for name in names})
    assert list(storage.list("data")) == names
    storage.delete(names)
    assert storage.list("data") == {}


def test_put_if_absent(storage: Storage) -> None:
    assert storage.put_if_absent("lock", b"first")
    assert not storage.put_if_absent("lock", b"second")
    assert storage.put_if_absent("lock", b"first")  # as after a lost reply: our bytes stand there
    assert storage.read("lock") == b"first"
    storage.delete(["lock"])
    assert storage.put_if_absent("lock", b"second")


def test_put_if_version(storage: Storage) -> None:
    assert storage.read_version("lease") is None
    storage.put("lease", b"one")
    first = version_of(storage, "lease")
    assert storage.read_version("lease") == (b"one", first)
    assert storage.put_if_version("lease", b"two", first)
    second = version_of(storage, "lease")
    assert second != first
    assert not storage.put_if_version("lease", b"three", first)
    assert storage.put_if_version("lease", b"two", first)  # as after a lost reply
    assert storage.read("lease") == b"two"
    storage.delete(["lease"])
    assert not storage.put_if_version("lease", b"three", second)
    assert storage.read("lease") is None


def version_of(storage: Storage, name: str) -> str:
    seen = storage.read_version(name)
    assert seen is not None
    return seen[1]


def test_conditional_puts_are_honoured(storage: Storage) -> None:
    assert storage.honours_conditional_puts("_control/tmp/probe")
    assert storage.list("_control") == {}


def test_one_of_many_puts_if_absent_wins(storage: Storage) -> None:
    for turn in range(ROUNDS[kind_of(storage)]):
        name = f"lock-{turn}"
        winners = race(storage, partial(storage.put_if_absent, name))
        assert len(winners) == 1
        assert storage.read(name) == winners[0]


def test_one_of_many_puts_if_version_wins(storage: Storage) -> None:
    storage.put("lease", b"nobody")
    for _ in range(ROUNDS[kind_of(storage)]):
        version = version_of(storage, "lease")
        winners = race(storage, partial(storage.put_if_version, "lease", version=version))
        assert len(winners) == 1
        assert storage.read("lease") == winners[0]


def kind_of(storage: Storage) -> str:
    return "s3" if storage.url.startswith("s3://") else "local"


def race(storage: Storage, attempt: Callable[[bytes], bool]) -> list[bytes]:
    """The racers that were told to have won."""
    racers = [os.urandom(8) for _ in range(RACERS[kind_of(storage)])]
    start = threading.Barrier(len(racers))

    def run(me: bytes) -> bool:
        start.wait()
        return attempt(me)

    with ThreadPoolExecutor(len(racers)) as pool:
        return [me for me, won in zip(racers, pool.map(run, racers), strict=True) if won]


def test_counting_by_put_if_version_loses_nothing(storage: Storage) -> None:
    storage.put("count", b"0")

    def count_to_five() -> None:
        done = 0
        while done < 5:
            seen = storage.read_version("count")
            assert seen is not None
            mine = b"%d by %d" % (int(seen[0].split()[0]) + 1, threading.get_ident())
            done += storage.put_if_version("count", mine, seen[1])

    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(count_to_five) for _ in range(4)]:
            future.result()
    data = storage.read("count")
    assert data is not None
    assert data.split()[0] == b"20"


@contextmanager
def overwriting(storage: Storage, name: str, values: list[bytes]) -> Iterator[None]:
    """A thread that puts one value after the other, for as long as the block runs."""
    stop = threading.Event()

    def overwrite() -> None:
        while not stop.is_set():
            for value in values:
                storage.put(name, value)

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(overwrite)
        try:
            yield
        finally:
            stop.set()
            future.result()


def test_a_reader_sees_whole_values_only(storage: Storage) -> None:
    values = [bytes([letter]) * (2_000_000 + letter) for letter in b"abc"]
    sizes = {len(value) for value in values}
    storage.put("data/shard", values[0])
    with overwriting(storage, "data/shard", values):
        for _ in range(30):
            data = storage.read("data/shard")
            assert data is not None
            assert data == data[:1] * (2_000_000 + data[0])
            assert storage.list("data").keys() == {"data/shard"}
            assert set(storage.list("data").values()) <= sizes


def test_listing_while_others_put_and_delete(storage: Storage) -> None:
    storage.put("data/stays", b"x")
    stop = threading.Event()

    def put_and_delete(number: int) -> None:
        while not stop.is_set():
            storage.put(f"data/folder-{number}/comes-and-goes", b"x")
            storage.delete([f"data/folder-{number}/comes-and-goes"])

    with ThreadPoolExecutor(3) as pool:
        futures = [pool.submit(put_and_delete, number) for number in (0, 0, 1)]
        try:
            for _ in range(100 if kind_of(storage) == "local" else 20):
                assert "data/stays" in storage.list("data")
        finally:
            stop.set()
        for future in futures:
            future.result()


def test_unfinished_files_are_in_the_temporary_folder_and_go(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path), temporary_folder="_control/tmp")
    finished = {"data/shard", "data/once", "control"}
    seen: set[str] = set()

    def unfinished() -> set[str]:
        seen.update(storage.list(""))
        return seen - finished

    with overwriting(storage, "data/shard", [b"x" * 5_000_000]):
        storage.put_if_absent("data/once", b"first")
        storage.put_if_absent("data/once", b"second")
        storage.put("control", b"one")
        storage.put_if_version("control", b"two", version_of(storage, "control"))
        storage.put_if_version("control", b"three", "wrong")
        wait_until(unfinished, what="an unfinished file")
    assert all(name.startswith("_control/tmp/.") and name.endswith(".tmp") for name in seen - finished)
    assert storage.list("").keys() == finished


def test_unfinished_files_are_beside_the_final_one_where_no_folder_is_named(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    storage.put("summary.json", b"{}")
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


PUT_FOR_EVER = """
import sys
from embedding.corpus.storage import filesystem_of, open_storage
storage = open_storage(sys.argv[1], temporary_folder="_control/tmp")
while True:
    for letter in b"abc":
        storage.put("data/shard", bytes([letter]) * (2_000_000 + letter))
        print(flush=True)
"""


def test_a_killed_writer_leaves_a_whole_value(storage_root: str, tmp_path: Path) -> None:
    storage = open_storage(storage_root, temporary_folder="_control/tmp")
    with running([sys.executable, "-c", PUT_FOR_EVER, storage_root], tmp_path) as process:
        wait_until(lambda: (tmp_path / "stdout").stat().st_size > 3, what="some puts")
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    data = storage.read("data/shard")
    assert data is not None
    assert data == data[:1] * (2_000_000 + data[0])
    left = storage.list("").keys() - {"data/shard"}
    assert all(name.startswith("_control/tmp/") for name in left)


NAMES = st.lists(st.sampled_from("abc"), min_size=1, max_size=3).map(lambda parts: "/".join(["data", *parts, "x"]))


@given(st.lists(st.tuples(st.sampled_from(["put", "delete", "create"]), NAMES, st.binary(max_size=3)), max_size=20))
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_folder_is_a_mapping(tmp_path: Path, steps: list[tuple[str, str, bytes]]) -> None:
    storage = open_storage(str(tmp_path / os.urandom(4).hex()), temporary_folder="_control/tmp")
    model: dict[str, bytes] = {}
    for action, name, data in steps:
        if action == "put":
            storage.put(name, data)
            model[name] = data
        elif action == "delete":
            storage.delete([name])
            model.pop(name, None)
        else:
            assert storage.put_if_absent(name, data) == (model.setdefault(name, data) == data)
        assert {name: storage.read(name) for name in storage.list("data")} == model
