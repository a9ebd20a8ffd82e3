"""Which folders are tables, and which of their files a run reads.

The files of a table that were dropped from it stay in its folder, for readers of its earlier versions. A run that took them for a
corpus would embed rows that are not there any more, so whatever looks like a table is read as one or refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeAlias

import fsspec

from embedding.errors import ConfigError, CorpusError, first_line

Details: TypeAlias = dict[str, dict[str, Any]]
"""Files by their path on the file system, with what it says of each."""


class Kind(StrEnum):
    """What tables there are; a folder that is of two kinds counts as the first."""

    DELTA = "Delta Lake"
    ICEBERG = "Iceberg"
    HUDI = "Hudi"
    LANCE = "Lance"


@dataclass(frozen=True, slots=True)
class Table:
    """A folder that is a table."""

    given: str
    """What the user called it, for sentences."""
    kind: Kind
    folder: str
    """Path on the file system."""
    metadata: str | None = None
    """Of Iceberg, the metadata file that was named instead of the folder."""


@dataclass(frozen=True, slots=True)
class Live:
    """The table at one version."""

    version: str
    files: tuple[str, ...]
    """Paths on the file system."""


_MARK = re.compile(
    r"/(?:(?P<delta>_delta_log/)|(?P<hudi>\.hoodie/)|(?P<lance>_versions/[^/]+\.manifest$)"
    r"|(?P<iceberg>metadata/(?:v\d+|\d+-[^/]+)(?:\.gz)?\.metadata\.json(?:\.gz)?$))"
)
REWRITE = "write its rows as plain Parquet and name that"
"""What is left to do with a table that is not read."""
_FOLDERS_OF_MARKS = ("_delta_log", ".hoodie", "metadata", "_versions")
_PACKAGES = {Kind.DELTA: ("deltalake", "delta"), Kind.ICEBERG: ("pyiceberg", "iceberg")}


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
                    said = f"lies in the {kind} table {url}, and files alone do not say which rows are still in it"
                    raise CorpusError(f"--input {given} {said}; name the table: --input {url}")


def refuse_below(given: str, fs: fsspec.AbstractFileSystem, tables: Mapping[str, Kind]) -> None:
    """Check that a folder of files has no tables in it.

    Raises:
        CorpusError: it has.
    """
    for folder, kind in sorted(tables.items()):
        url = url_of(fs, folder)
        said = f"holds the {kind} table {url}, and files alone do not say which rows are still in it"
        raise CorpusError(f"--input {given} {said}; name tables by themselves: --input {url}")


def url_of(fs: fsspec.AbstractFileSystem, path: str) -> str:
    """The URL of a path on a file system, a plain path for a local one."""
    return str(fs.unstrip_protocol(path)).removeprefix("file://")


def read_table(table: Table, fs: fsspec.AbstractFileSystem, files: Details, needed: Collection[str]) -> Live:
    """The newest version of the table whose folder holds `files`; `needed` are the columns that the run reads, all of them where empty.

    Raises:
        ConfigError: the library that reads such tables is not installed.
        CorpusError: the table is damaged, or a list of its files does not say which rows it has.
    """
    if table.kind not in _PACKAGES:
        raise CorpusError(f"--input {table.given} is a table of {table.kind}, which is not read; {REWRITE}")
    live = _reader_of(table)(table, fs, files, needed)
    for file in live.files:
        require_inside(table, file)
    return live


def require_inside(table: Table, path: str) -> None:
    """Check that a file that the table names lies in its folder: a corpus names nothing else to be read.

    Raises:
        CorpusError: it does not.
    """
    if not path.startswith(f"{table.folder}/") or ".." in path.split("/"):
        said = f"names {path}, which lies outside its folder, as where a table was moved or shares files with another"
        raise CorpusError(f"--input {table.given} {said}; {REWRITE}")


def _reader_of(table: Table) -> Callable[[Table, fsspec.AbstractFileSystem, Details, Collection[str]], Live]:
    """What reads tables of that kind; their libraries are heavy, and most installations have none of them."""
    package, extra = _PACKAGES[table.kind]
    try:
        if table.kind is Kind.DELTA:
            from embedding.corpus.tables.delta import read
        else:
            from embedding.corpus.tables.iceberg import read
    except ImportError as error:
        if not (error.name or "").startswith(package):
            raise
        raise ConfigError(
            f"--input {table.given} is a table of {table.kind}, and {package}, which reads it, is not installed; "
            f"pip install 'embed-corpus[{extra}]'"
        ) from error
    return read


def refusal(table: Table, has: str, remedy: str) -> CorpusError:
    """The error for a table of which the list of its files does not tell the rows."""
    return CorpusError(f"--input {table.given} is a table of {table.kind} that has {has}, which are not read; {remedy}")


def damaged(table: Table, error: Exception) -> CorpusError:
    """The error for a table that its library can not read."""
    return CorpusError(f"--input {table.given} is no readable table of {table.kind}: {first_line(error)}")
