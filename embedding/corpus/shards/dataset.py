"""The versions of the Lance dataset that an output is: each points at shards where they lie, and none of their rows is written again.

A version is committed by Lance in a local folder that has nothing but the version before, and what that makes is put into the output:
the transaction, then the manifest, whose presence is the version's commit.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias

import pyarrow as pa

from embedding.corpus.shards.form import Published
from embedding.corpus.shards.library import VERSION, call, library
from embedding.corpus.storage import Storage
from embedding.errors import StorageError, first_line

VERSIONS = "_versions"
TRANSACTIONS = "_transactions"
_DATA = "data/"
_MANIFEST = re.compile(rf"{VERSIONS}/(\d{{20}})\.manifest")
_TRANSACTION = re.compile(rf"{TRANSACTIONS}/(\d+)-")
"""By the version that it was made of."""
_LAST = 2**64 - 1
"""Minus the version is the manifest's name, so that the newest is the first in a listing."""

Fragments: TypeAlias = Mapping[str, tuple[int, int]]
"""Rows and bytes of each shard that has rows."""


@dataclass(frozen=True)
class _Version:
    """What one version says."""

    number: int
    fragments: Fragments | None
    """None where somebody deleted rows or added columns, through Lance."""
    schema: pa.Schema


def publish(storage: Storage, manifest: pa.Table, schema_in: Callable[[str], pa.Schema], still_ours: Callable[[], None]) -> None:
    """Make the version that has the shards of `manifest`, unless the newest is that; remove those that say what will not be there.

    Where shards have only come, they are appended: indexes that somebody made stay, and cover what they did.

    Raises:
        StorageError: somebody else made a version meanwhile, or the newest is damaged.
    """
    rows = manifest.select(["shard", "rows", "bytes"]).to_pylist()
    wanted = {row["shard"]: (row["rows"], row["bytes"]) for row in rows if row["rows"]}
    numbers = _numbers(storage)
    if not rows:
        _remove(storage, numbers, still_ours)
        return
    newest = _read(storage, numbers[-1]) if numbers else None
    schema = schema_in(rows[0]["shard"]).remove_metadata()
    if newest is None or newest.fragments != wanted or not newest.schema.equals(schema):
        numbers.append(_commit(storage, newest, schema, wanted, still_ours))
    older = numbers[:-1]
    if older and not _is_part(_read(storage, older[-1]), wanted):
        _remove(storage, older, still_ours)


def published(storage: Storage) -> Published | None:
    """The newest version."""
    numbers = _numbers(storage)
    if not numbers:
        return Published(_name(1), None)
    try:
        return Published(_name(numbers[-1]), _read(storage, numbers[-1]).fragments)
    except StorageError:
        return Published(_name(numbers[-1]), None)


def _name(number: int) -> str:
    return f"{VERSIONS}/{_LAST - number:020d}.manifest"


def _numbers(storage: Storage) -> list[int]:
    """Of the versions, rising."""
    found = (_MANIFEST.fullmatch(name) for name in storage.list(VERSIONS))
    return sorted(_LAST - int(match[1]) for match in found if match)


@contextmanager
def _alone(storage: Storage, number: int | None) -> Iterator[Path]:
    """A local dataset that has no version but that one, and no data."""
    with TemporaryDirectory(prefix="version-") as folder:
        if number is not None:
            file = Path(folder, _name(number))
            file.parent.mkdir()
            storage.download(_name(number), file)
        yield Path(folder)


def _read(storage: Storage, number: int) -> _Version:
    with _alone(storage, number) as folder:
        try:
            found = call(lambda: library().dataset(str(folder)))
            fragments = [fragment.metadata for fragment in call(found.get_fragments)]
        except ValueError as error:
            what = f"{storage.url}/{_name(number)} is not a readable version of a Lance dataset: {first_line(error)}"
            raise StorageError(f"{what}; delete it and run the same command again") from error
    if any(len(each.files) != 1 or each.deletion_file is not None for each in fragments):
        return _Version(number, None, found.schema)
    held = {f"{_DATA}{each.files[0].path}": (each.physical_rows, each.files[0].file_size_bytes) for each in fragments}
    return _Version(number, held, found.schema)


def _is_part(version: _Version, wanted: Fragments) -> bool:
    return version.fragments is not None and version.fragments.items() <= wanted.items()


def _commit(storage: Storage, newest: _Version | None, schema: pa.Schema, wanted: Fragments, still_ours: Callable[[], None]) -> int:
    """The number of the version that was made."""
    before = None if newest is None else newest.number
    with _alone(storage, before) as folder:
        try:
            operation = _operation(newest, schema, wanted)
            made = call(lambda: library().LanceDataset.commit(str(folder), operation, read_version=before))
        except ValueError as error:
            raise StorageError(f"Lance cannot commit the shards in {storage.url}: {error}; run the same command again") from error
        for file in (folder / TRANSACTIONS).iterdir():
            still_ours()
            storage.put(f"{TRANSACTIONS}/{file.name}", file.read_bytes())
        name = _name(made.version)
        still_ours()
        if not storage.put_if_absent(name, (folder / name).read_bytes()):
            remedy = "run the same command again to continue from that version"
            raise StorageError(f"{storage.url}/{name} was written by another program in the meantime; {remedy}")
    return int(made.version)


def _operation(newest: _Version | None, schema: pa.Schema, wanted: Fragments) -> Any:
    """What makes the version of the newest: the shards that it lacks, or all of them, in the order of the corpus."""
    operations = library().LanceOperation
    if newest is not None and newest.fragments and newest.schema.equals(schema) and _is_part(newest, wanted):
        return operations.Append(list(_fragments(schema, {name: wanted[name] for name in wanted if name not in newest.fragments})))
    return operations.Overwrite(schema, list(_fragments(schema, wanted)))


def _fragments(schema: pa.Schema, wanted: Fragments) -> Iterator[Any]:
    """As Lance has them; how it numbers the columns, a file of its own tells that has a row of nulls."""
    lance = library()
    nullable = pa.schema([field.with_nullable(True) for field in schema])
    with TemporaryDirectory(prefix="columns-") as folder:
        row = pa.table([pa.nulls(1, field.type) for field in nullable], schema=nullable)
        found = call(lambda: lance.write_dataset(row, folder, data_storage_version=VERSION).get_fragments()[0].metadata.files[0])
    for name, (rows, size) in wanted.items():
        file = lance.fragment.DataFile(
            name.removeprefix(_DATA), found.fields, found.column_indices, found.file_major_version, found.file_minor_version, size
        )
        yield lance.fragment.FragmentMetadata(0, [file], rows)  # 0: to be numbered by the commit


def _remove(storage: Storage, numbers: list[int], still_ours: Callable[[], None]) -> None:
    """Versions and what made them."""
    if not numbers:
        return
    made = [name for name in storage.list(TRANSACTIONS) if (found := _TRANSACTION.match(name)) and int(found[1]) < numbers[-1]]
    still_ours()
    storage.delete([*map(_name, numbers), *made])
