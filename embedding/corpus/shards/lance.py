"""Shards as Lance data files, by Lance's own writer and reader on local files: stores are reached through `storage` alone."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any, BinaryIO, ClassVar

import pyarrow as pa

from embedding.corpus.plan import ShardNames
from embedding.corpus.reader import Fits
from embedding.corpus.requests import explained
from embedding.corpus.shard import require_same_vectors, vector_bytes, vector_columns_in
from embedding.corpus.shards import dataset
from embedding.corpus.shards.footer import require_seal, seal
from embedding.corpus.shards.form import Picked, Published, ReadShard, Rows
from embedding.corpus.shards.library import VERSION, call, library, pylance_version
from embedding.corpus.shards.types import LanceFits, batch_as_stored, stored_schema
from embedding.corpus.storage import Storage
from embedding.errors import StorageError

_KEY = b"embedding"
"""The one key-value of a file: Lance keeps several in no order, and the bytes are to be the same each time."""
_PAGE_BYTES = 8 * 2**20
"""Raw vector bytes that are written at once, and so make a page."""
_TAIL_BYTES = 2**18
"""Of a file's end, where Lance keeps what is not rows; more is fetched where that is not all."""
_READ_ROWS = 2**14
_NO_DIGEST = "0" * 64
_SAID_OF_DIGEST = b'"file_sha256": "'
_DIGEST = re.compile(_SAID_OF_DIGEST + b"([0-9a-f]{64})")


@dataclass(frozen=True)
class LanceShards:
    """Whole `.lance` files that lie where a Lance dataset has its data, and that its versions point at. See `ShardForm`.

    A file's facts are JSON: `facts`, their `seal`, and the `file_sha256` of all bytes with zeros in the place of these 64 digits.
    """

    names: ClassVar[ShardNames] = ShardNames(".lance", has_folders=False)
    libraries: ClassVar[tuple[str, ...]] = ("pylance",)

    def require(self) -> None:
        """See ShardForm."""
        library()

    def fits(self, columns: Sequence[str]) -> Fits:
        """See ShardForm; a dataset has one type for each column."""
        return LanceFits(columns, self.returned)

    def encode(self, table: pa.Table, footer: Mapping[str, object]) -> bytes:
        """See ShardForm; numbers lie as they are, strings are compressed by zstd, since what Lance would choose for them is random."""
        said = json.dumps({"facts": footer, "seal": seal(footer), "file_sha256": _NO_DIGEST}, sort_keys=True)
        with explained(f"writing a shard in {gettempdir()}"), _file() as file:
            write_file(file, table, said, rows=max(1, _PAGE_BYTES // vector_bytes(table.schema)))
            data = file.read_bytes()
            place = data.rindex(_SAID_OF_DIGEST + _NO_DIGEST.encode()) + len(_SAID_OF_DIGEST)
            digest = hashlib.sha256(data).hexdigest().encode()
            with file.open("r+b") as written:
                written.seek(place)
                written.write(digest)
            require_same_vectors(_rows_of(file, vector_columns_in(table.schema)), table, "Lance")
        return b"".join((memoryview(data)[:place], digest, memoryview(data)[place + len(digest) :]))

    def facts(self, file: BinaryIO) -> dict[str, Any]:
        """See ShardForm; no more than the file's end is fetched."""
        return _of_end(file)[0]

    def read(self, data: bytes) -> ReadShard:
        """See ShardForm; the digest of all bytes is compared before Lance is asked anything."""
        if not any(_is_digest(data, found) for found in _DIGEST.finditer(data)):
            raise ValueError("its bytes do not match the digest written into them")
        with _file() as file:
            file.write_bytes(data)
            table = _rows_of(file)
            table.validate(full=True)
            return ReadShard(table.replace_schema_metadata(None), _facts_of(file), "")

    def is_of_library(self, versions: Mapping[str, str], writer: str) -> bool:
        """See ShardForm; the file itself does not say."""
        del writer
        return versions.get("pylance") == pylance_version()

    def returned(self, column: pa.ChunkedArray) -> pa.ChunkedArray:
        """See ShardForm."""
        with _file() as file:
            write_file(file, pa.table({"column": column}), "", rows=max(1, len(column)))
            return _rows_of(file).column("column")

    def scan(self, storage: Storage, name: str, columns: Picked, rows: Rows, rng: random.Random) -> tuple[pa.Table, dict[str, Any]]:
        """See ShardForm; the whole file is fetched onto the disk, and some of its rows into memory."""
        with _file() as file:
            storage.download(name, file)
            facts, schema = _facts_of(file), _schema_of(file)
            reader = _opened(file, columns(schema))
            there = call(reader.num_rows)
            count = min(there, rows(schema))
            if not count:
                return schema.empty_table(), facts
            first = rng.randrange(there - count + 1)
            return call(lambda: reader.read_range(first, count, batch_size=count).to_table()), facts

    def publish(self, storage: Storage, manifest: pa.Table, still_ours: Callable[[], None]) -> None:
        """See ShardForm; the next version of the dataset, where what is there is not what the last one says."""
        dataset.publish(storage, manifest, partial(_schema_in, storage), still_ours)

    def published(self, storage: Storage) -> Published | None:
        """See ShardForm; the last version."""
        return dataset.published(storage)


def write_file(file: Path, table: pa.Table, said: str, *, rows: int) -> None:
    """A Lance file of the table, so many rows at once, however they are parted in memory."""
    schema = stored_schema(table.schema)
    writer = call(lambda: library().file.LanceFileWriter(str(file), schema, version=VERSION))
    call(lambda: writer.add_schema_metadata(_KEY.decode(), said))
    for batch in table.combine_chunks().to_batches(max_chunksize=rows):
        call(partial(writer.write_batch, batch_as_stored(batch, schema)))
    call(writer.close)


@contextmanager
def _file() -> Iterator[Path]:
    """Where a local file can be, as long as the block runs: Lance reads and writes no other kind of memory."""
    with TemporaryDirectory(prefix="shard-") as folder:
        yield Path(folder, "shard.lance")


def _opened(file: Path, columns: Sequence[str] | None = None) -> Any:
    return call(lambda: library().file.LanceFileReader(str(file), columns=None if columns is None else list(columns)))


def _rows_of(file: Path, columns: Sequence[str] | None = None) -> pa.Table:
    return call(lambda: _opened(file, columns).read_all(batch_size=_READ_ROWS).to_table())


def _schema_of(file: Path) -> pa.Schema:
    return call(lambda: _opened(file).metadata().schema)


def _facts_of(file: Path) -> dict[str, Any]:
    """What the file says of itself; its schema is asked, and no row."""
    said = json.loads((_schema_of(file).metadata or {})[_KEY])
    require_seal(said["facts"], said["seal"])
    return dict(said["facts"])


def _of_end(file: BinaryIO) -> tuple[dict[str, Any], pa.Schema]:
    """Facts and schema of a file of which the end is fetched, all of it where that is not enough; closes the file."""
    with file, _file() as local:
        size = file.seek(0, 2)
        for start in dict.fromkeys((max(0, size - _TAIL_BYTES), 0)):
            file.seek(start)
            with local.open("wb") as sparse:
                sparse.truncate(size)
                sparse.seek(start)
                sparse.write(file.read())
            try:
                return _facts_of(local), _schema_of(local)
            except (KeyError, TypeError, ValueError):
                if not start:
                    raise
    raise AssertionError


def _schema_in(storage: Storage, name: str) -> pa.Schema:
    """Raises StorageError: it is no shard."""
    with explained(f"reading {storage.url}/{name}"):
        try:
            return _of_end(storage.open(name))[1]
        except (KeyError, TypeError, ValueError) as error:
            raise StorageError(f"{storage.url}/{name} is not a complete shard; delete it and run the same command again") from error


def _is_digest(data: bytes, found: re.Match[bytes]) -> bool:
    digest = hashlib.sha256(memoryview(data)[: found.start(1)])
    digest.update(_NO_DIGEST.encode())
    digest.update(memoryview(data)[found.end(1) :])
    return digest.hexdigest().encode() == found[1]


LANCE = LanceShards()
