"""Tables are read as their own libraries read them; what a list of files cannot say of their rows is refused."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake
from pyiceberg.catalog.sql import SqlCatalog
from pyiceberg.manifest import DataFileContent
from pyiceberg.table import StaticTable
from pyiceberg.table import Table as IcebergTable
from pyiceberg.types import LongType

from embedding.corpus.columns import Columns
from embedding.corpus.plan import plan_units
from embedding.corpus.reader import read_layouts, read_unit
from embedding.corpus.sources import list_inputs
from embedding.corpus.storage import open_storage
from embedding.errors import ConfigError, CorpusError
from tests.support.iceberg_deletes import delete_first_row
from tests.support.s3_server import S3Server

NEEDED = ("id", "text")


def rows(first: int, stop: int, **more: list[Any]) -> pa.Table:
    ids = list(range(first, stop))
    return pa.table({"id": pa.array(ids, pa.int64()), "text": [f"text {number}" for number in ids], **more})


def ids_read(url: str, needed: tuple[str, ...] = NEEDED) -> list[int]:
    """What a run would embed, sorted."""
    sources = list_inputs([url], needed=needed).sources
    columns = Columns("text", ("id",))
    units = plan_units(read_layouts(sources, columns), unit_rows=10, fingerprint="f")
    return sorted(number for unit in units for number in read_unit(unit, columns).copied["id"].to_pylist())


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
    assert f"{url} is read at Delta Lake version {table.version()}, which has 2 files" in caplog.text


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
    with pytest.raises(CorpusError, match=r"is partitioned by 'part', which its files do not hold; leave the column out"):
        list_inputs([folder], needed=("text", "part"))
    for inside in (f"{folder}/part=f", f"{folder}/part=*", f"{folder}/*/*.parquet", f"{folder}/**/*.parquet"):
        with pytest.raises(CorpusError, match=rf"lies in the Delta Lake table {folder}, .*; name the table: --input {folder}$"):
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


@pytest.mark.parametrize(
    ("configuration", "edit", "said"),
    [
        ({"delta.enableDeletionVectors": "true"}, with_deletion_vector, "that has deletion vectors, which are not read; purge them"),
        ({"delta.columnMapping.mode": "name"}, None, "that has mapped columns, whose names in its files are others, which are not read"),
        ({}, with_a_feature, "that has the features typeWidening, which are not read; write its rows as plain Parquet and name that"),
        ({}, with_file("s3://bucket/shared.parquet"), "names .*/shared.parquet, which is missing, as where it is another table's"),
        ({}, with_file("/etc/passwd"), "names .*/delta/etc/passwd, which is missing"),
        ({}, with_file("../secret.parquet"), "names .*secret.parquet, which is missing"),
        ({}, with_file("gone.parquet"), r"gone\.parquet, which is missing"),
        ({}, dict.clear, "is no readable table of Delta Lake: "),
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


@pytest.fixture
def catalog(tmp_path: Path) -> SqlCatalog:
    made = SqlCatalog("tests", uri=f"sqlite:///{tmp_path}/catalog.db", warehouse=f"file://{tmp_path}/warehouse")
    made.create_namespace("n")
    return made


def iceberg_of(catalog: SqlCatalog) -> IcebergTable:
    """Appended to, deleted from and overwritten: what is left is a part of what lies there."""
    table = catalog.create_table("n.t", schema=rows(0, 1).schema)
    for number in range(4):
        table.append(rows(10 * number, 10 * number + 10))
    table.delete("id = 13")
    table.overwrite(rows(100, 110), overwrite_filter="id >= 30")
    return table


def place_of(table: IcebergTable) -> str:
    return table.location().removeprefix("file://")


def test_an_iceberg_table_is_what_pyiceberg_reads(catalog: SqlCatalog, caplog: pytest.LogCaptureFixture) -> None:
    table = iceberg_of(catalog)
    expected, place = sorted(table.scan().to_arrow()["id"].to_pylist()), place_of(table)
    assert len(list(Path(place, "data").iterdir())) > len(list(table.scan().plan_files()))
    with caplog.at_level(logging.INFO, logger="embedding"):
        listing = list_inputs([place], needed=NEEDED)
    assert ids_read(place) == ids_read(f"{place}/") == ids_read(place, ()) == expected
    metadata = table.metadata_location.rpartition("/")[2]
    assert listing.versions == {place: f"Iceberg snapshot {table.metadata.current_snapshot_id} of metadata/{metadata}"}
    assert f"{place} is read at Iceberg snapshot" in caplog.text


def test_an_iceberg_table_on_s3(s3: S3Server) -> None:
    root = s3.folder()
    own = {"s3.endpoint": s3.endpoint, "s3.access-key-id": s3.key, "s3.secret-access-key": s3.secret, "s3.region": "us-east-1"}
    catalog = SqlCatalog("tests", uri="sqlite:///:memory:", warehouse=root, **own)
    catalog.create_namespace("n")
    table = iceberg_of(catalog)
    assert ids_read(table.location()) == sorted(table.scan().to_arrow()["id"].to_pylist())
    assert ids_read(table.metadata_location) == ids_read(table.location())


def test_an_earlier_version_of_an_iceberg_table_is_named_by_its_metadata(catalog: SqlCatalog) -> None:
    table = catalog.create_table("n.t", schema=rows(0, 1).schema)
    table.append(rows(0, 10))
    first = table.metadata_location
    table.overwrite(rows(10, 20))
    assert (ids_read(first), ids_read(place_of(table))) == ([*range(10)], [*range(10, 20)])
    orphan = Path(place_of(table), "metadata", table.metadata_location.rpartition("/")[2][:6] + "beside-it.metadata.json")
    shutil.copy(first.removeprefix("file://"), orphan)  # as a writer leaves it that lost a race
    with pytest.raises(CorpusError, match=r"two newest versions \(.*beside-it.*\), of which only its catalog .*; name that metadata file"):
        list_inputs([place_of(table)])
    assert ids_read(table.metadata_location) == [*range(10, 20)]


def test_a_catalog_without_a_server_says_which_version_counts(catalog: SqlCatalog) -> None:
    table = catalog.create_table("n.t", schema=rows(0, 1).schema)
    table.append(rows(0, 10))
    first = Path(table.metadata_location.removeprefix("file://"))
    table.append(rows(10, 20))
    first.rename(first.with_name("v1.metadata.json"))
    (first.parent / "version-hint.text").write_text("1\n")
    assert ids_read(place_of(table)) == [*range(10)]


def test_columns_of_an_iceberg_table_keep_their_names(catalog: SqlCatalog) -> None:
    table = catalog.create_table("n.t", schema=rows(0, 1, other=pa.array([1], pa.int32())).schema)
    table.append(rows(0, 2, other=pa.array([1, 2], pa.int32())))
    with table.update_schema() as update:
        update.update_column("other", LongType())
    assert ids_read(place_of(table)) == [0, 1]  # of whose columns none has changed
    with table.update_schema() as update:
        update.rename_column("text", "older")
    with table.update_schema() as update:
        update.add_column("text", LongType())
    for needed, name in (((), "older"), (("text",), "text"), (("older",), "older"), (("other",), "other")):
        with pytest.raises(CorpusError, match=rf"columns that were renamed or retyped \('{name}' is one\), which are not read"):
            list_inputs([place_of(table)], needed=needed)
    with pytest.raises(CorpusError, match="has no column 'nothing'; columns are id, older, other, text"):
        list_inputs([place_of(table)], needed=("nothing",))
    list_inputs([place_of(table)], needed=("id",))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (DataFileContent.POSITION_DELETES, "that has delete files, which are not read; compact it"),
        (DataFileContent.EQUALITY_DELETES, "equality deletes"),
    ],
)
def test_an_iceberg_table_with_delete_files_is_refused(content: DataFileContent, said: str, catalog: SqlCatalog) -> None:
    table = iceberg_of(catalog)
    before = ids_read(place_of(table))
    metadata = delete_first_row(table, content)
    if content is DataFileContent.POSITION_DELETES:
        assert len(StaticTable.from_metadata(metadata).scan().to_arrow()) == len(before) - 1
    with pytest.raises(CorpusError, match=said) as refused:
        ids_read(place_of(table))
    assert "\n" not in str(refused.value)


def test_an_iceberg_table_that_was_moved_is_refused(catalog: SqlCatalog, tmp_path: Path) -> None:
    table = iceberg_of(catalog)
    moved = shutil.copytree(place_of(table), tmp_path / "moved")
    with pytest.raises(CorpusError, match=rf"--input {moved} names {place_of(table)}/\S+, which lies outside its folder"):
        list_inputs([str(moved)])


def test_what_an_iceberg_table_says_of_its_readers_is_not_heeded(
    catalog: SqlCatalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = iceberg_of(catalog)
    (tmp_path / "planted.py").write_text(f"open({str(tmp_path / 'trace')!r}, 'w').close()")
    monkeypatch.syspath_prepend(tmp_path)
    newest = Path(table.metadata_location.removeprefix("file://"))
    newest.write_text(json.dumps(json.loads(newest.read_text()) | {"properties": {"py-io-impl": "planted.IO"}}))
    assert len(ids_read(place_of(table))) == 39
    assert not (tmp_path / "trace").exists()
    with pytest.raises(AttributeError):  # which pyiceberg by itself does
        StaticTable.from_metadata(table.metadata_location)
    assert (tmp_path / "trace").exists()


def test_a_damaged_iceberg_table_is_one_sentence(catalog: SqlCatalog) -> None:
    table = iceberg_of(catalog)
    newest = Path(table.metadata_location.removeprefix("file://"))
    whole = newest.read_bytes()
    for data in (b"", b"{}", b"[]", whole[:-100], whole.replace(b'"current-snapshot-id":', b'"current-snapshot-id":"x')):
        newest.write_bytes(data)
        with pytest.raises(CorpusError, match=rf"^--input {place_of(table)} is no readable table of Iceberg: .+") as refused:
            list_inputs([place_of(table)])
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("mark", "kind"), [(".hoodie/hoodie.properties", "Hudi"), ("_versions/1.manifest", "Lance"), ("_versions/18446744.manifest", "Lance")]
)
def test_other_tables_are_refused(mark: str, kind: str, storage_root: str) -> None:
    storage = open_storage(f"{storage_root}/table")
    for name in (mark, "part-0.parquet", "date=1/part-0.parquet", "data/x.lance"):
        storage.put(name, b"content")
    with pytest.raises(CorpusError, match=rf"/table is a table of {kind}, which is not read; write its rows as plain "):
        list_inputs([f"{storage_root}/table"])
    for inside in ("table/*.parquet", "table/date=1", "table/data/*", "table/*/*.parquet"):
        with pytest.raises(CorpusError, match=rf"lies in the {kind} table {storage_root}/table, and files alone do not say"):
            list_inputs([f"{storage_root}/{inside}"])
    for above in ("", "/*"):
        with pytest.raises(CorpusError, match=rf"{storage_root}\S* (holds the {kind} table|is a table of {kind})"):
            list_inputs([f"{storage_root}{above}"])
    [named] = list_inputs([f"{storage_root}/table/part-0.parquet"]).sources  # who names one wants it
    assert named.path == "part-0.parquet"


def test_tables_are_named_by_themselves_or_by_a_glob(delta: Path, tmp_path: Path) -> None:
    write_deltalake(tmp_path / "delta2", rows(300, 303))
    assert ids_read(f"{tmp_path}/delta*") == sorted(ids_read(str(delta)) + ids_read(str(tmp_path / "delta2")))
    with pytest.raises(CorpusError, match=rf"--input {tmp_path} holds the Delta Lake table {delta}, .*: --input {delta}$"):
        list_inputs([str(tmp_path)])


@pytest.mark.parametrize(("package", "extra"), [("deltalake", "delta"), ("pyiceberg", "iceberg")])
def test_a_library_that_is_missing_is_named(
    package: str, extra: str, delta: Path, catalog: SqlCatalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = str(delta) if extra == "delta" else place_of(iceberg_of(catalog))
    for name in [name for name in sys.modules if name.partition(".")[0] == package] + [f"embedding.corpus.tables.{extra}"]:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"and {package}, which reads it, is not installed; pip install 'embed-corpus\[{extra}\]'$"):
        list_inputs([table])


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
