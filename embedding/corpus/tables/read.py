"""A table to the files that its rows are in, by the library that owns its format."""

from __future__ import annotations

from collections.abc import Callable, Collection

import fsspec

from embedding.corpus.listing import Details
from embedding.corpus.tables.table import REWRITE, Kind, Live, Table, require_inside
from embedding.errors import ConfigError, CorpusError

_PACKAGES = {Kind.DELTA: ("deltalake", "delta"), Kind.ICEBERG: ("pyiceberg", "iceberg")}


def read_table(table: Table, fs: fsspec.AbstractFileSystem, files: Details, needed: Collection[str]) -> Live:
    """The newest version of the table whose folder holds `files`; `needed` are the columns that the run reads, all of them where empty.

    Raises:
        ConfigError: the library that reads such tables is not installed.
        CorpusError: the table is damaged, or a list of its files does not say which rows it has.
    """
    if table.kind not in _PACKAGES:
        raise CorpusError(f"--input {table.given} is {table.kind.described}, which this job cannot read; {REWRITE}")
    live = _reader_of(table)(table, fs, files, needed)
    for file in live.files:
        require_inside(table, file)
    return live


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
            f"--input {table.given} is {table.kind.described}, but {package}, which reads it, is not installed; "
            f"run pip install 'embed-corpus[{extra}]'"
        ) from error
    return read
