"""What a proof asks of every shard, and what it finds out about one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from embedding.corpus.reader import Columns
from embedding.corpus.shard import NOT_FINITE, too_long
from embedding.corpus.shards.form import ShardForm
from embedding.corpus.vectors import VectorColumns
from embedding.names import LongText


class Kind(StrEnum):
    """What can be wrong with an output."""

    MISSING_SHARD = "missing shard"
    UNREADABLE_SHARD = "unreadable shard"
    WRONG_UNIT = "wrong unit"
    WRONG_PROVENANCE = "wrong provenance"
    WRONG_COLUMNS = "wrong columns"
    WRONG_ROW_COUNT = "wrong row count"
    WRONG_IDS = "wrong ids"
    WRONG_KEPT_COLUMN = "wrong kept column"
    WRONG_CHUNKS = "wrong chunks"
    NOT_FINITE = "not finite"
    WRONG_NORM = "wrong norm"
    WRONG_RECORD = "wrong record"
    WRONG_REJECTED_ROWS = "wrong rejected rows"
    WRONG_BYTES = "wrong bytes"
    WRONG_VECTOR = "wrong vector"
    UNCLAIMED_SHARD = "unclaimed shard"
    UNCLAIMED_REJECTED_ROWS = "unclaimed rejected rows"
    FOREIGN_FILE = "foreign file"
    WRONG_MANIFEST = "wrong manifest"
    WRONG_LEDGER = "wrong ledger"
    WRONG_VERSION = "wrong version"
    SOURCE_CHANGED = "source changed"
    UNREADABLE_SOURCE = "unreadable source"
    NOT_COMPLETE = "not complete"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong."""

    kind: Kind
    name: str
    """The object that it is wrong with: relative to the output's folder, or a source's URI."""
    what: str
    """How that shows, in one sentence."""


@dataclass(frozen=True, slots=True)
class Rules:
    """What every shard of an output must be, from the settings that the output was begun with."""

    columns: Columns
    has_id: bool
    token_columns: bool
    vectors: VectorColumns
    normalized: bool
    fingerprint: str
    settings: Mapping[str, Any]
    """The hashed settings, which every footer repeats."""
    form: ShardForm
    long_text: LongText
    max_tokens: int
    package_version: str
    """Bytes are built again and compared where the same version of this package, and of what writes shards, wrote them."""

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why a row with a text can be rejected."""
        return (NOT_FINITE, too_long(self.max_tokens)) if self.long_text == "reject" else (NOT_FINITE,)


@dataclass(frozen=True, slots=True)
class Sample:
    """A row to be embedded again."""

    source_row: int
    text: str
    """The whole, or a chunk of it."""
    vectors: tuple[tuple[float, ...], ...]
    """Of each vector column, as it is stored."""
    chunk: int | None = None
    """The chunk's number."""


@dataclass(frozen=True, slots=True)
class CheckedUnit:
    """What a unit's shard really holds; only `finding` counts where there is one."""

    unit: str
    finding: Finding | None = None
    bytes: int = 0
    rows: int = 0
    """Rows of the source with a vector in the shard."""
    rejected: int = 0
    tokens: int = 0
    truncated: int = 0
    chunks: int = 0
    versions: str = ""
    """Versions of the libraries that made it, as its footer says them."""
    samples: tuple[Sample, ...] = ()
