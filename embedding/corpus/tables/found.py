"""Which folders are tables.

The files of a table that were dropped from it stay in its folder, for readers of its earlier versions. A run that took them for a
corpus would embed rows that are not there any more, so whatever looks like a table is read as one or refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress

import fsspec

from embedding.corpus.tables.table import Kind
from embedding.errors import CorpusError

_MARK = re.compile(
    r"/(?:(?P<delta>_delta_log/)|(?P<hudi>\.hoodie/)|(?P<lance>_versions/[^/]+\.manifest$)"
    r"|(?P<iceberg>metadata/(?:v\d+|\d+-[^/]+)(?:\.gz)?\.metadata\.json(?:\.gz)?$))"
)
_FOLDERS_OF_MARKS = ("_delta_log", ".hoodie", "metadata", "_versions")


def is_metadata(path: str) -> bool:
    """Whether a file is the metadata of an Iceberg table."""
    found = _MARK.search(f"/{path}")
    return found is not None and found["iceberg"] is not None


def tables_in(files: Iterable[str]) -> dict[str, Kind]:
    """Folder and kind of each table that the files belong to, as far as the files themselves show it."""
    order = list(Kind)
    found: dict[str, Kind] = {}
    for file in files:
        for mark in _MARK.finditer(file):
            kind, folder = Kind[str(mark.lastgroup).upper()], file[: mark.start()]
            found[folder] = min(kind, found.get(folder, kind), key=order.index)
            break
    return found


def up_to_a_table(folder: str) -> Iterator[str]:
    """The folder and those above it that could be the table whose data or partition it is."""
    yield folder
    while folder:
        folder, _, name = folder.rpartition("/")
        if name != "data" and "=" not in name:
            return
        yield folder


def refuse_inside(given: str, fs: fsspec.AbstractFileSystem, folders: Iterable[str]) -> None:
    """Check that none of the folders is a table: files in or below them are to be read as such.

    Raises:
        CorpusError: one is.
    """
    for folder in folders:
        for mark in _FOLDERS_OF_MARKS:
            with suppress(FileNotFoundError, NotADirectoryError, PermissionError):
                for table, kind in tables_in(fs.ls(f"{folder}/{mark}", detail=False)).items():
                    url = url_of(fs, table)
                    said = f"lies in the {kind} table {url}, whose files alone do not tell which rows are still in it"
                    raise CorpusError(f"--input {given} {said}; name the table itself: --input {url}")


def refuse_below(given: str, fs: fsspec.AbstractFileSystem, tables: Mapping[str, Kind]) -> None:
    """Check that a folder of files has no tables in it.

    Raises:
        CorpusError: it has.
    """
    for folder, kind in sorted(tables.items()):
        url = url_of(fs, folder)
        said = f"contains the {kind} table {url}, whose files alone do not tell which rows are still in it"
        raise CorpusError(f"--input {given} {said}; name each table by itself: --input {url}")


def url_of(fs: fsspec.AbstractFileSystem, path: str) -> str:
    """The URL of a path on a file system, a plain path for a local one."""
    return str(fs.unstrip_protocol(path)).removeprefix("file://")
