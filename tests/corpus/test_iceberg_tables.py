"""Iceberg tables are read as pyiceberg reads them, whoever is its catalog; what a list of files cannot say of their rows is refused."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from pyiceberg.catalog.sql import SqlCatalog
from pyiceberg.manifest import DataFileContent
from pyiceberg.table import StaticTable
from pyiceberg.table import Table as IcebergTable
from pyiceberg.types import LongType

from embedding.corpus.sources import list_inputs
from embedding.errors import ConfigError, CorpusError
from tests.corpus.table_rows import NEEDED, forget_library, ids_read, rows
from tests.support.iceberg_catalog import iceberg_catalog
from tests.support.iceberg_deletes import delete_first_row
from tests.support.s3_server import S3Server


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[SqlCatalog]:
    with iceberg_catalog(f"file://{tmp_path}/warehouse") as made:
        yield made


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
    assert f"reading {place} at Iceberg snapshot" in caplog.text


def test_an_iceberg_table_on_s3(s3: S3Server) -> None:
    root = s3.folder()
    own = {"s3.endpoint": s3.endpoint, "s3.access-key-id": s3.key, "s3.secret-access-key": s3.secret, "s3.region": "us-east-1"}
    with iceberg_catalog(root, **own) as catalog:
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
    with pytest.raises(CorpusError, match=r"two newest versions \(.*beside-it.*\), and only its catalog .*; name the right metadata file"):
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
        with pytest.raises(CorpusError, match=rf"with renamed or retyped columns, such as '{name}', which this job cannot read"):
            list_inputs([place_of(table)], needed=needed)
    remedy = "name only its columns in --text-column and the like: id, older, other, text$"
    with pytest.raises(CorpusError, match=f"has no column 'nothing'; {remedy}"):
        list_inputs([place_of(table)], needed=("nothing",))
    list_inputs([place_of(table)], needed=("id",))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (DataFileContent.POSITION_DELETES, "is an Iceberg table with delete files, which this job cannot read; compact it"),
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
    with pytest.raises(CorpusError, match=rf"--input {moved} lists {place_of(table)}/\S+, which lies outside its folder"):
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
        with pytest.raises(CorpusError, match=rf"^--input {place_of(table)} is not a readable Iceberg table: .+") as refused:
            list_inputs([place_of(table)])
        assert "\n" not in str(refused.value)


def test_the_library_that_is_missing_is_named(catalog: SqlCatalog, monkeypatch: pytest.MonkeyPatch) -> None:
    table = place_of(iceberg_of(catalog))
    forget_library("pyiceberg", monkeypatch)
    with pytest.raises(ConfigError, match=r"but pyiceberg, which reads it, is not installed; run pip install 'embed-corpus\[iceberg\]'$"):
        list_inputs([table])
