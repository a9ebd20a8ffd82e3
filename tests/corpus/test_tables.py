"""Delta Lake tables are read as deltalake reads them; what a list of files cannot say of their rows is refused, and so are other tables."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake

from embedding.corpus.sources import list_inputs
from embedding.corpus.storage import open_storage
from embedding.errors import ConfigError, CorpusError
from tests.corpus.table_rows import NEEDED, forget_library, ids_read, rows


def upload(folder: Path, url: str) -> str:
    """A copy of a table in a store."""
    storage = open_storage(url)
    for file in folder.rglob("*"):
        if file.is_file():
            storage.put(file.relative_to(folder).as_posix(), file.read_bytes())
    return url


@pytest.fixture
def delta(tmp_path: Path) -> Path:
    """Written four times, of which a deletion, a compaction and an overwrite leave little; its log begins with a checkpoint."""
    folder = tmp_path / "delta"
    for number in range(4):
        write_deltalake(folder, rows(10 * number, 10 * number + 10), mode="append")
    DeltaTable(folder).delete("id = 13")
    DeltaTable(folder).optimize.compact()
    write_deltalake(folder, rows(100, 110), mode="overwrite", predicate="id >= 30")
    DeltaTable(folder).create_checkpoint()
    write_deltalake(folder, rows(200, 205), mode="append")
    return folder


def test_a_delta_table_is_what_deltalake_reads(delta: Path, storage_root: str, caplog: pytest.LogCaptureFixture) -> None:
    url = upload(delta, f"{storage_root}/table")
    table = DeltaTable(delta)
    expected = sorted(pa.table(table.to_pyarrow_table())["id"].to_pylist())
    assert len(list(delta.glob("*.parquet"))) > len(table.file_uris())
    with caplog.at_level(logging.INFO, logger="embedding"):
        listing = list_inputs([url], needed=NEEDED)
    assert ids_read(url) == ids_read(f"{url}/") == expected
    assert listing.versions == {url: f"Delta Lake version {table.version()}"}
    assert f"reading {url} at Delta Lake version {table.version()}, which has 2 files" in caplog.text


def test_a_delta_log_that_was_cleaned_up_is_enough(delta: Path) -> None:
    expected = ids_read(str(delta))
    log = delta / "_delta_log"
    checkpoint = json.loads((log / "_last_checkpoint").read_text())["version"]
    for file in log.glob("*.json"):
        if int(file.stem) < checkpoint:
            file.unlink()
    assert ids_read(str(delta)) == expected
    (log / "_last_checkpoint").write_text("{")
    assert ids_read(str(delta)) == expected


def test_partitions_of_a_delta_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(tmp_path / "delta")
    (tmp_path / "a b%c").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "a b%c"))
    values = ["a b", "c/d%e", None, "=", "f"]
    for number in range(2):
        write_deltalake(folder, rows(5 * number, 5 * number + 5, part=pa.array(values)), partition_by=["part"], mode="append")
    DeltaTable(folder).delete("part = 'f'")
    assert ids_read(folder) == [0, 1, 2, 3, 5, 6, 7, 8]
    with pytest.raises(CorpusError, match=r"is partitioned by 'part', which its files do not contain; leave that column out"):
        list_inputs([folder], needed=("text", "part"))
    for inside in (f"{folder}/part=f", f"{folder}/part=*", f"{folder}/*/*.parquet", f"{folder}/**/*.parquet"):
        with pytest.raises(CorpusError, match=rf"lies in the Delta Lake table {folder}, .*; name the table itself: --input {folder}$"):
            list_inputs([inside])


def edit_first(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Change every action of the first commit."""
    file = folder / "_delta_log" / f"{0:020}.json"
    actions = [json.loads(line) for line in file.read_text().splitlines()]
    for action in actions:
        edit(action)
    file.write_text("\n".join(json.dumps(action) for action in actions))


def with_deletion_vector(action: dict[str, Any]) -> None:
    if "add" in action:
        vector = {"storageType": "u", "pathOrInlineDv": "ab^-aqEH.-t@S}K{vb[*k^", "offset": 1, "sizeInBytes": 36, "cardinality": 2}
        action["add"]["deletionVector"] = vector


def with_a_feature(action: dict[str, Any]) -> None:
    if "protocol" in action:
        features = {key: ["typeWidening"] for key in ("readerFeatures", "writerFeatures")}
        action["protocol"] |= {"minReaderVersion": 3, "minWriterVersion": 7, **features}


def with_file(path: str) -> Callable[[dict[str, Any]], None]:
    def edit(action: dict[str, Any]) -> None:
        if "add" in action:
            action["add"]["path"] = path

    return edit


UNREAD = "which this job cannot read;"


@pytest.mark.parametrize(
    ("configuration", "edit", "said"),
    [
        (
            {"delta.enableDeletionVectors": "true"},
            with_deletion_vector,
            f"is a Delta Lake table with deletion vectors, {UNREAD} purge them",
        ),
        ({"delta.columnMapping.mode": "name"}, None, f"with mapped columns, whose names are different in its files, {UNREAD}"),
        ({}, with_a_feature, f"with the features typeWidening, {UNREAD} write its rows to plain Parquet files and name those"),
        (
            {},
            with_file("s3://bucket/shared.parquet"),
            "lists .*/shared.parquet, which does not exist, perhaps because it belongs to another table",
        ),
        ({}, with_file("/etc/passwd"), "lists .*/delta/etc/passwd, which does not exist"),
        ({}, with_file("../secret.parquet"), "lists .*secret.parquet, which does not exist"),
        ({}, with_file("gone.parquet"), r"gone\.parquet, which does not exist"),
        ({}, dict.clear, "is not a readable Delta Lake table: "),
    ],
)
def test_a_delta_table_that_is_more_than_its_files_is_refused(
    configuration: dict[str, str], edit: Callable[[dict[str, Any]], None] | None, said: str, tmp_path: Path
) -> None:
    folder = tmp_path / "delta"
    write_deltalake(folder, rows(0, 10), configuration=configuration)
    (tmp_path / "secret.parquet").write_bytes(b"")
    if edit is not None:
        edit_first(folder, edit)
    with pytest.raises(CorpusError, match=said) as refused:
        list_inputs([str(folder)], needed=NEEDED)
    assert str(refused.value).startswith(f"--input {folder} ")
    assert "\n" not in str(refused.value)


def test_a_delta_table_may_have_deletion_vectors_switched_on(tmp_path: Path) -> None:
    write_deltalake(tmp_path / "delta", rows(0, 10), configuration={"delta.enableDeletionVectors": "true"})
    assert ids_read(str(tmp_path / "delta")) == list(range(10))


@pytest.mark.parametrize(
    ("mark", "kind"), [(".hoodie/hoodie.properties", "Hudi"), ("_versions/1.manifest", "Lance"), ("_versions/18446744.manifest", "Lance")]
)
def test_other_tables_are_refused(mark: str, kind: str, storage_root: str) -> None:
    storage = open_storage(f"{storage_root}/table")
    for name in (mark, "part-0.parquet", "date=1/part-0.parquet", "data/x.lance"):
        storage.put(name, b"content")
    with pytest.raises(CorpusError, match=rf"/table is a {kind} table, which this job cannot read; write its rows to plain "):
        list_inputs([f"{storage_root}/table"])
    for inside in ("table/*.parquet", "table/date=1", "table/data/*", "table/*/*.parquet"):
        with pytest.raises(CorpusError, match=rf"lies in the {kind} table {storage_root}/table, whose files alone do not tell"):
            list_inputs([f"{storage_root}/{inside}"])
    for above in ("", "/*"):
        with pytest.raises(CorpusError, match=rf"{storage_root}\S* (contains the {kind} table|is a {kind} table)"):
            list_inputs([f"{storage_root}{above}"])
    [named] = list_inputs([f"{storage_root}/table/part-0.parquet"]).sources  # who names one wants it
    assert named.path == "part-0.parquet"


def test_tables_are_named_by_themselves_or_by_a_glob(delta: Path, tmp_path: Path) -> None:
    write_deltalake(tmp_path / "delta2", rows(300, 303))
    assert ids_read(f"{tmp_path}/delta*") == sorted(ids_read(str(delta)) + ids_read(str(tmp_path / "delta2")))
    with pytest.raises(CorpusError, match=rf"--input {tmp_path} contains the Delta Lake table {delta}, .*: --input {delta}$"):
        list_inputs([str(tmp_path)])


def test_the_library_that_is_missing_is_named(delta: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forget_library("deltalake", monkeypatch)
    with pytest.raises(ConfigError, match=r"but deltalake, which reads it, is not installed; run pip install 'embed-corpus\[delta\]'$"):
        list_inputs([str(delta)])


def test_what_only_looks_like_a_table_is_a_folder(storage_root: str) -> None:
    storage = open_storage(f"{storage_root}/in")
    names = [
        *("_old/table/_delta_log/0.json", ".trash/.hoodie/x", "_old/b.parquet"),
        "metadata/people.metadata.json",
        "metadata/x.parquet",
        "_versions/readme.txt",
        "data/a.parquet",
        "delta_log/b.parquet",
    ]
    for name in names:
        storage.put(name, b"content")
    found = [source.path for source in list_inputs([f"{storage_root}/in"]).sources]
    assert found == ["data/a.parquet", "delta_log/b.parquet", "metadata/x.parquet"]
    assert [source.path for source in list_inputs([f"{storage_root}/in/data"]).sources] == ["a.parquet"]
