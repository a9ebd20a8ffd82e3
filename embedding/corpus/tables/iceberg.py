"""Iceberg: the Parquet files of a table's current snapshot.

pyiceberg reads the metadata through the store of the corpus, and nothing outside the table's folder: what a table's properties say of
credentials, endpoints or classes is not heeded.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from io import SEEK_END, BytesIO

import fsspec
from pyiceberg.catalog.noop import NoopCatalog
from pyiceberg.exceptions import ValidationError
from pyiceberg.io import FileIO, InputFile, InputStream, OutputFile
from pyiceberg.manifest import FileFormat
from pyiceberg.schema import Schema
from pyiceberg.serializers import FromInputFile
from pyiceberg.table import FileScanTask, StaticTable
from pyiceberg.table.metadata import TableMetadata

from embedding.corpus.listing import Details
from embedding.corpus.storage import Storage, filesystem_of
from embedding.corpus.tables.found import is_metadata
from embedding.corpus.tables.table import REWRITE, Live, Table, damaged, refusal, require_inside
from embedding.errors import CorpusError

_METADATA = "metadata"
_HINT = "version-hint.text"


def read(table: Table, fs: fsspec.AbstractFileSystem, files: Details, needed: Collection[str]) -> Live:
    """The current snapshot, as the metadata file that was named says, else the newest one there is.

    Raises:
        CorpusError: the metadata is damaged, or the files that it lists are not all that its rows depend on.
    """
    storage = Storage(fs, table.folder)
    io = _InFolder(table, storage)
    name = (table.metadata or _newest(table, storage, files)).removeprefix(f"{table.folder}/")
    try:
        metadata = FromInputFile.table_metadata(io.named(name))
        static = StaticTable(("static-table", name), metadata, name, io, NoopCatalog("static-table"))
        _require_same_columns(table, metadata, static.schema(), needed)
        tasks = list(static.scan().plan_files())
    except (ValidationError, ValueError, TypeError, KeyError, IndexError, AttributeError, EOFError, NotImplementedError) as error:
        raise damaged(table, error) from error
    for task in tasks:
        _require_plain(table, task)
    return Live(f"snapshot {metadata.current_snapshot_id} of {name}", tuple(_path(task.file.file_path) for task in tasks))


def _newest(table: Table, storage: Storage, files: Details) -> str:
    """The metadata file that counts where no catalog is asked: the one that the hint of a catalog without a server names, else the last.

    Raises:
        CorpusError: there are two that could be the last.
    """
    folder = f"{table.folder}/{_METADATA}"
    found: dict[int, list[str]] = {}
    for file in files:
        if file.startswith(f"{folder}/") and is_metadata(file):
            found.setdefault(int(re.findall(r"\d+", file.removeprefix(folder))[0]), []).append(file)
    hint = (storage.read(f"{_METADATA}/{_HINT}") or b"").strip() if f"{folder}/{_HINT}" in files else b""
    number = int(hint) if hint.isdigit() and int(hint) in found else max(found)
    if len(found[number]) > 1:
        first, second = sorted(found[number])[:2]
        said = f"is {table.kind.described} with two newest versions ({first}, {second}), and only its catalog knows which is right"
        raise CorpusError(f"--input {table.given} {said}; name the right metadata file instead of the folder")
    return found[number][0]


def _require_same_columns(table: Table, metadata: TableMetadata, current: Schema, needed: Collection[str]) -> None:
    """Check that the names of the columns mean the same in files of all ages, which are read by name.

    Raises:
        CorpusError: one was renamed, retyped, or dropped and added again.
    """
    for name in needed or current.column_names:
        try:
            field = current.find_field(name)
        except ValueError:
            remedy = f"name only its columns in --text-column and the like: {', '.join(current.column_names)}"
            raise CorpusError(f"--input {table.given} has no column {name!r}; {remedy}") from None
        for schema in metadata.schemas:
            there, here = schema.find_column_name(field.field_id), {schema.find_column_name(each) for each in schema.field_ids}
            same = there == name and schema.find_type(field.field_id) == field.field_type if there else name not in here
            if not same:
                raise refusal(table, f"renamed or retyped columns, such as {name!r}", REWRITE)


def _require_plain(table: Table, task: FileScanTask) -> None:
    """Check that the rows of a file are in the table, all of them.

    Raises:
        CorpusError: they are not, or the file is no Parquet.
    """
    if task.delete_files:
        raise refusal(table, "delete files", f"compact it (rewrite_data_files), or {REWRITE}")
    if task.file.file_format is not FileFormat.PARQUET:
        raise refusal(table, f"{task.file.file_format} files", REWRITE)


def _path(location: str) -> str:
    """The path of what a table's metadata names by a URL; s3a and s3n are names that Hadoop has for s3."""
    return filesystem_of(re.sub(r"^s3[an]://", "s3://", location))[1]


class _InFolder(FileIO):
    """Reads what lies in the table's folder."""

    def __init__(self, table: Table, storage: Storage) -> None:
        super().__init__()
        self._table = table
        self._storage = storage

    def named(self, name: str) -> InputFile:
        """The file of that name in the folder."""
        return _File(name, self._storage, name)

    def new_input(self, location: str) -> InputFile:
        """See pyiceberg."""
        path = _path(location)
        require_inside(self._table, path)
        return _File(location, self._storage, path.removeprefix(f"{self._table.folder}/"))

    def new_output(self, location: str) -> OutputFile:
        """See pyiceberg; a corpus is only read."""
        raise NotImplementedError(location)

    def delete(self, location: str | InputFile | OutputFile) -> None:
        """See pyiceberg; a corpus is only read."""
        raise NotImplementedError(location)


class _File(InputFile):
    def __init__(self, location: str, storage: Storage, name: str) -> None:
        super().__init__(location)
        self._storage = storage
        self._name = name

    def __len__(self) -> int:
        return self.open().seek(0, SEEK_END)

    def exists(self) -> bool:
        return self._storage.exists(self._name)

    def open(self, seekable: bool = True) -> InputStream:
        del seekable
        data = self._storage.read(self._name)
        if data is None:
            raise ValueError(f"its {self._name} is missing")
        return BytesIO(data)
