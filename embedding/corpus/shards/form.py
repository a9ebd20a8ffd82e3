"""What every form of shards offers: chosen once, by its name, and asked from then on."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, ClassVar, Protocol, TypeAlias

import pyarrow as pa

from embedding.corpus.plan import ShardNames
from embedding.corpus.reader import Fits
from embedding.corpus.storage import Storage

Picked: TypeAlias = Callable[[pa.Schema], list[str]]
"""Which columns are wanted of a shard with that schema."""
Rows: TypeAlias = Callable[[pa.Schema], int]
"""How many rows, one or more."""


@dataclass(frozen=True, slots=True)
class ReadShard:
    """A whole shard, after everything that says whether it is damaged was asked."""

    table: pa.Table
    facts: dict[str, Any]
    """What it was given as footer."""
    writer: str
    """What the file says of the library that wrote it."""


@dataclass(frozen=True, slots=True)
class Published:
    """What readers are told of a complete output."""

    name: str
    """The object that tells it."""
    shards: Mapping[str, tuple[int, int]] | None
    """Rows and bytes of each shard that has rows; None where that cannot be read."""


class ShardForm(Protocol):
    """One way to keep a table and some facts about it in a file. Instances travel to workers; libraries are found there."""

    names: ClassVar[ShardNames]
    libraries: ClassVar[tuple[str, ...]]
    """Distributions, beyond those that every run uses, whose versions shape the bytes."""

    def require(self) -> None:
        """Check that what writes and reads such files is installed.

        Raises:
            ConfigError: it is not.
        """

    def fits(self, columns: Sequence[str]) -> Fits:
        """Checks these columns of one source file after another."""

    def encode(self, table: pa.Table, footer: Mapping[str, object]) -> bytes:
        """The table as one complete file, which says `footer` of itself: the same bytes for the same rows, however they lie in memory.

        Raises:
            EmbeddingJobError: what was written does not read back as it went in.
        """

    def facts(self, file: BinaryIO) -> dict[str, Any]:
        """What `encode` was given as footer, without reading the rows; closes the file.

        Raises:
            ValueError, KeyError, TypeError, OSError, pa.ArrowException: it is not what was written.
        """

    def read(self, data: bytes) -> ReadShard:
        """The whole shard.

        Raises:
            ValueError, KeyError, TypeError, OSError, pa.ArrowException: it is not what was written.
        """

    def is_of_library(self, versions: Mapping[str, str], writer: str) -> bool:
        """Whether the library that is installed here wrote a shard, by its footer and its file: it would write the same bytes again."""

    def returned(self, column: pa.ChunkedArray) -> pa.ChunkedArray:
        """The column as it comes back from such a file: a few types change on the way."""

    def scan(self, storage: Storage, name: str, columns: Picked, rows: Rows, rng: random.Random) -> tuple[pa.Table, dict[str, Any]]:
        """Rows one after another from a random place of a shard, and its facts; its schema says which columns and how many.

        Raises:
            EmbeddingJobError: the store does not answer.
            ValueError, KeyError, TypeError, OSError, pa.ArrowException: it is not what was written.
        """

    def publish(self, storage: Storage, manifest: pa.Table, still_ours: Callable[[], None]) -> None:
        """Tell readers of what is complete now, before anything that they may still read is removed.

        Raises:
            StorageError: somebody else did so meanwhile.
        """

    def published(self, storage: Storage) -> Published | None:
        """What readers are told, None where they are told nothing but what they list themselves."""
