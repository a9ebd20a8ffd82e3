"""Delta Lake: the Parquet files that a table's log leaves in it.

deltalake reads a copy of the log on this machine, which the store of the corpus gives like everything else: with the same credentials,
retries and error messages, on every kind of store.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import fsspec
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError

from embedding.corpus.listing import Details
from embedding.corpus.storage import Storage
from embedding.corpus.tables.table import REWRITE, Live, Table, damaged, refusal
from embedding.errors import CorpusError

_LOG = "_delta_log"
_LAST_CHECKPOINT = "_last_checkpoint"
_COPY_THREADS = 16
_DELETION_VECTORS = "deletionVectors"
_HARMLESS = {_DELETION_VECTORS, "timestampNtz", "v2Checkpoint", "vacuumProtocolCheck", "variantType", "columnMapping"}
"""What a table may ask of its readers without that its rows are others than those of its files; two of these are looked into."""


def read(table: Table, fs: fsspec.AbstractFileSystem, files: Details, needed: Collection[str]) -> Live:
    """The newest version of the table.

    Raises:
        CorpusError: its log is damaged, or the files that it lists are not all that its rows depend on.
    """
    with TemporaryDirectory(prefix="embed-corpus-") as copy:
        _copy_log(Storage(fs, table.folder), [file.removeprefix(f"{table.folder}/") for file in files], Path(copy))
        try:
            delta = DeltaTable(copy)
            _require_plain(table, delta, needed)
            return Live(f"version {delta.version()}", tuple(_place(table, copy, uri) for uri in delta.file_uris()))
        except (DeltaError, ValueError) as error:
            raise damaged(table, error) from error


def _place(table: Table, copy: str, uri: str) -> str:
    """Where a file of the copy would lie in the table; what is above the copy may be written in another way than we know it."""
    _, found, name = uri.partition(f"/{Path(copy).name}/")
    return f"{table.folder}/{name}" if found else uri


def _copy_log(storage: Storage, names: list[str], copy: Path) -> None:
    """Copy what the newest version needs: the last checkpoint and the commits since."""
    (copy / _LOG).mkdir()
    wanted = [name for name in _since_checkpoint(storage, names) if ".." not in name.split("/")]
    for name in wanted:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(_COPY_THREADS) as pool:
        list(pool.map(lambda name: storage.download(name, copy / name), wanted))


def _since_checkpoint(storage: Storage, names: list[str]) -> Iterator[str]:
    """Names in the log; a pointer to the last checkpoint that is damaged is as good as none."""
    pointer = f"{_LOG}/{_LAST_CHECKPOINT}"
    try:
        first = int(json.loads(storage.read(pointer) or b"{}")["version"]) if pointer in names else 0
    except (ValueError, KeyError, TypeError):
        first = 0
    for name in names:
        folder, _, file = name.rpartition("/")
        version = file.partition(".")[0]
        if folder.split("/")[0] == _LOG and not (folder == _LOG and version.isdigit() and int(version) < first):
            yield name


def _require_plain(table: Table, delta: DeltaTable, needed: Collection[str]) -> None:
    """Check that the rows of the table are those of its files.

    Raises:
        CorpusError: they are not.
    """
    features = set(delta.protocol().reader_features or ())
    if unknown := sorted(features - _HARMLESS):
        raise refusal(table, f"the features {', '.join(unknown)}", REWRITE)
    if delta.metadata().configuration.get("delta.columnMapping.mode", "none") != "none":
        raise refusal(table, "mapped columns, whose names are different in its files", REWRITE)
    if _DELETION_VECTORS in features and _deletes_rows(delta):
        raise refusal(table, "deletion vectors", f"purge them (REORG TABLE ... APPLY (PURGE)), or {REWRITE}")
    if partitions := [column for column in delta.metadata().partition_columns if column in needed]:
        said = f"is partitioned by {partitions[0]!r}, which its files do not contain; leave that column out, or {REWRITE}"
        raise CorpusError(f"--input {table.given} is {table.kind.described} that {said}")


def _deletes_rows(delta: DeltaTable) -> bool:
    try:
        return bool(delta.deletion_vectors().read_all().num_rows)
    except DeltaError:  # they lie in files of their own, of which there is no copy
        return True
