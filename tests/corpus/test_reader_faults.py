"""A damaged, replaced or removed file is told as what it is, and never gives a wrong row."""

from __future__ import annotations

import random
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pytest

from embedding.corpus.formats import parquet
from embedding.corpus.plan import UnreadableSource
from embedding.corpus.reader import Columns, read_layout, read_layouts, read_unit
from embedding.corpus.sources import list_sources
from embedding.corpus.storage import open_storage
from embedding.errors import ConfigError, CorpusError, SourceChangedError, SourceError
from tests.corpus.reading import put_source, table_bytes, whole
from tests.support.corpora import plain
from tests.support.waiting import wait_until

TEXT = Columns("text")
GOOD = plain(rows=20, files=1).files["part-0.parquet"]
FOOTER_BYTES = struct.unpack("<I", GOOD[-8:-4])[0]
DAMAGED = {
    "empty": b"",
    "one_byte": b"P",
    "magic_only": b"PAR1PAR1",
    "garbage": random.Random(0).randbytes(5000),
    "text": b"id,text\n1,hello\n",
    "first_half": GOOD[: len(GOOD) // 2],
    "without_its_end": GOOD[:-1],
    "without_its_footer": GOOD[: -FOOTER_BYTES - 8] + GOOD[-8:],
    "footer_length_too_large": GOOD[:-8] + struct.pack("<I", 2**31 - 1) + b"PAR1",
    "footer_length_zero": GOOD[:-8] + struct.pack("<I", 0) + b"PAR1",
    "encrypted": GOOD[:-4] + b"PARE",
}


def same_size_other_rows() -> bytes:
    """A file like GOOD that holds other rows in as many bytes."""
    return table_bytes(pa.table({"id": range(20), "text": [f"other {number}" for number in range(20)]})).ljust(len(GOOD), b"\0")


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_file_is_named_while_planning(damage: str, storage_root: str) -> None:
    source = put_source(storage_root, DAMAGED[damage])
    with pytest.raises(SourceError) as refused:
        read_layout(source, TEXT)
    assert str(refused.value).startswith(f"{source.uri} is not a readable Parquet file: ")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_file_fails_its_units_only(damage: str, tmp_path: Path) -> None:
    source = put_source(str(tmp_path), DAMAGED[damage])
    with pytest.raises(SourceError, match="is not a readable Parquet file: "):
        read_unit(whole(source, 20), TEXT)


def test_damaged_pages_are_told(tmp_path: Path) -> None:
    data = bytearray(GOOD)
    data[4 : len(GOOD) - FOOTER_BYTES - 8] = random.Random(1).randbytes(len(GOOD) - FOOTER_BYTES - 12)
    source = put_source(str(tmp_path), bytes(data))
    assert sum(read_layout(source, TEXT).row_groups) == 20
    with pytest.raises(SourceError, match="is not a readable Parquet file: "):
        read_unit(whole(source, 20), TEXT)


def test_a_file_with_fewer_rows_than_planned_is_refused(tmp_path: Path) -> None:
    source = put_source(str(tmp_path), GOOD)
    with pytest.raises(SourceError, match=r"only 20 of the 21 rows from row 0 on exist$"):
        read_unit(whole(source, 21), TEXT)


@pytest.mark.parametrize("seed", range(150))
def test_flipped_bits_in_the_footer_give_an_error_or_as_many_rows(seed: int, tmp_path: Path) -> None:
    chosen = random.Random(seed)
    data = bytearray(GOOD)
    for _ in range(chosen.randint(1, 4)):
        data[chosen.randrange(len(data) - FOOTER_BYTES - 8, len(data))] ^= 1 << chosen.randrange(8)
    source = put_source(str(tmp_path), bytes(data))
    rows, texts = 0, []
    with suppress(SourceError, CorpusError):  # and no other
        rows = read_layout(source, TEXT).num_rows
        texts = read_unit(whole(source, rows), TEXT).text.to_pylist()
    assert len(texts) in (0, rows)


def rewritten_in_place(folder: str) -> None:
    with Path(folder, "a.parquet").open("r+b") as file:
        file.write(same_size_other_rows())


def cut_in_place(folder: str) -> None:
    with Path(folder, "a.parquet").open("r+b") as file:
        file.truncate(10)


def replaced(folder: str) -> None:
    open_storage(folder).put("a.parquet", table_bytes(pa.table({"id": range(20), "text": ["new"] * 20})))


def removed(folder: str) -> None:
    open_storage(folder).delete(["a.parquet"])


WHOLE = {change.__name__: change for change in (replaced, removed)}
IN_PLACE = {change.__name__: change for change in (rewritten_in_place, cut_in_place)}
"""Only on a disk: an object is always replaced whole."""
WAS_CHANGED = (
    r"^(file|s3)://.*a\.parquet was (replaced|removed) (after it was listed|while it was being read); "
    r"run again to (read the new version|continue without it)$"
)


@pytest.mark.parametrize("change", WHOLE)
def test_a_file_that_changed_after_it_was_listed(change: str, storage_root: str) -> None:
    expect_changed_after_listing(storage_root, WHOLE[change])


@pytest.mark.parametrize("change", IN_PLACE)
def test_a_file_that_was_written_to_after_it_was_listed(change: str, tmp_path: Path) -> None:
    expect_changed_after_listing(str(tmp_path), IN_PLACE[change])


def expect_changed_after_listing(folder: str, change: Callable[[str], None]) -> None:
    source = put_source(folder, GOOD)
    change(folder)
    with pytest.raises(SourceChangedError, match=WAS_CHANGED):
        read_unit(whole(source, 20), TEXT)
    with pytest.raises(SourceChangedError, match=WAS_CHANGED):
        read_layout(source, TEXT)


@pytest.mark.parametrize("moment", ["after the footer", "after the rows"])
@pytest.mark.parametrize("change", WHOLE)
def test_a_file_that_changes_while_it_is_read(change: str, moment: str, storage_root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expect_changed_in_mid_read(storage_root, WHOLE[change], moment, monkeypatch)


@pytest.mark.parametrize("moment", ["after the footer", "after the rows"])
@pytest.mark.parametrize("change", IN_PLACE)
def test_a_file_that_is_written_to_while_it_is_read(change: str, moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expect_changed_in_mid_read(str(tmp_path), IN_PLACE[change], moment, monkeypatch)


def expect_changed_in_mid_read(folder: str, change: Callable[[str], None], moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = put_source(folder, GOOD)
    read_rows = parquet._read_rows

    def read_rows_and_change(*args: Any) -> pa.Table:
        if moment == "after the footer":
            change(folder)
        rows = read_rows(*args)
        if moment == "after the rows":
            change(folder)
        return rows

    monkeypatch.setattr(parquet, "_read_rows", read_rows_and_change)
    with pytest.raises(SourceChangedError, match=WAS_CHANGED):
        read_unit(whole(source, 20), TEXT)


def test_old_and_new_bytes_never_mix(storage_root: str) -> None:
    versions = [
        table_bytes(pa.table({"text": [word] * 3000, "more": [word * 50] * 3000}), row_group_size=100, compression="none")
        for word in ("old", "new")
    ]
    put_source(storage_root, versions[0])
    storage, stop = open_storage(storage_root), threading.Event()

    def overwrite() -> None:
        pauses = random.Random(0)
        while not stop.is_set():
            for data in versions:
                storage.put("a.parquet", data)
                stop.wait(pauses.expovariate(10))  # often shorter than a read, at times longer

    def words() -> frozenset[str]:
        return frozenset(read_unit(whole(list_sources([storage_root])[0], 3000), TEXT).text.to_pylist())

    found = set[frozenset[str]]()

    def read() -> bool:
        with suppress(SourceChangedError):
            found.add(words())
        return bool(found)

    thread = threading.Thread(target=overwrite)
    thread.start()
    try:
        for _ in range(40):
            read()
        wait_until(read, what="a version that stays for as long as a read takes")
    finally:
        stop.set()
        thread.join()
    assert found <= {frozenset({"old"}), frozenset({"new"})}
    assert words() == {"new"}


def test_one_unreadable_footer_stops_the_planning(tmp_path: Path) -> None:
    sources = [put_source(str(tmp_path), data, f"{number}.parquet") for number, data in enumerate([GOOD, GOOD, b"", GOOD])]
    layouts = read_layouts(sources, TEXT)
    assert [next(layouts).source for _ in range(2)] == sources[:2]
    with pytest.raises(CorpusError, match=r"2\.parquet is not a readable"):
        next(layouts)


def test_unreadable_footers_are_set_aside_where_there_is_a_list_for_them(tmp_path: Path) -> None:
    sources = [put_source(str(tmp_path), data, f"{number}.parquet") for number, data in enumerate([b"", GOOD, GOOD[:-1], GOOD])]
    set_aside: list[UnreadableSource] = []
    assert [layout.source for layout in read_layouts(sources, TEXT, set_aside)] == [sources[1], sources[3]]
    assert [file.source for file in set_aside] == [sources[0], sources[2]]
    assert all(f"{file.source.uri} is not a readable Parquet file: " in file.reason for file in set_aside)
    other = put_source(str(tmp_path), table_bytes(pa.table({"words": ["a"]})), "other.parquet")
    with pytest.raises(CorpusError, match="has no column 'text'"):  # an option to mend, no damage
        list(read_layouts([*sources, other], TEXT, set_aside))


@pytest.mark.usefixtures("unprivileged")
def test_a_file_that_may_not_be_read_is_no_damaged_file() -> None:
    with TemporaryDirectory() as folder:  # tmp_path is root's own
        source = put_source(folder, GOOD)
        Path(folder, "a.parquet").chmod(0)
        for read in (lambda: read_layout(source, TEXT), lambda: read_unit(whole(source, 20), TEXT)):
            with pytest.raises(ConfigError, match=r"^opening .*a\.parquet is not allowed: .*; check the credentials and permissions"):
                read()
