"""Source files to work units: which rows are read, scheduled, retried and committed together, and under which name.

A unit and its name are pure functions of the source file (uri, size, version), the row range and the fingerprint, so that
two runs agree on them without talking, and resuming is a set difference with what the output's folder lists.
"""

from __future__ import annotations

import hashlib
import json
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import pairwise
from operator import itemgetter
from pathlib import PurePosixPath
from typing import Any

from embedding.corpus.formats.found import START
from embedding.corpus.formats.names import Format
from embedding.corpus.sources import Source

_MAX_STEM_CHARS = 120
_HIVE_ESCAPED = re.compile(r"""[\x00-\x1f"#'*?\\{}\[\]^`|<>\x7f]""")
"""Percent-encoded in a hive folder's name, as Hive does it; what other tools parse, letters of all scripts too, stays as it is."""


@dataclass(frozen=True, slots=True)
class SourceLayout:
    """What a file says about its rows."""

    source: Source
    row_groups: tuple[int, ...]
    """Rows of each row group."""
    marks: tuple[tuple[int, int], ...] = (START,)
    """Where reading may begin, as `formats.found.Found` has them."""

    @property
    def num_rows(self) -> int:
        """Rows of the file."""
        return sum(self.row_groups)

    def mark_before(self, row: int) -> tuple[int, int]:
        """The last mark at or before a row."""
        return self.marks[bisect_right(self.marks, row, key=itemgetter(0)) - 1]


@dataclass(frozen=True, slots=True)
class ShardNames:
    """How shards are called, by the format of their files."""

    suffix: str
    has_folders: bool
    """Whether hive segments of the source's path stay folders; else they are joined into the name like other folders."""


PARQUET_NAMES = ShardNames(".parquet", has_folders=True)


@dataclass(frozen=True, slots=True)
class UnreadableSource:
    """A file whose footer cannot be read, so that its rows are not known."""

    source: Source
    reason: str


@dataclass(frozen=True, slots=True)
class Unit:
    """A contiguous row range of one source file: planned, scheduled, retried and committed whole."""

    id: str
    source: Source
    first_row: int
    num_rows: int
    shard: str
    """Name of the unit's shard, relative to the output's folder."""
    near: tuple[int, int] = START
    """The mark that its reader begins at."""

    def identity(self) -> dict[str, Any]:
        """What a shard's footer says about its unit: everything except how to find its rows quickly."""
        facts = asdict(self)
        del facts["near"], facts["source"]["at"]
        return facts


def plan_units(
    layouts: Iterable[SourceLayout], *, unit_rows: int, fingerprint: str, limit_rows: int | None = None, names: ShardNames = PARQUET_NAMES
) -> Iterator[Unit]:
    """The units of all files, in the order of the files and rows; together they cover the first `limit_rows` rows (1 or more) once."""
    remaining = limit_rows
    for layout in layouts:
        for first_row, num_rows in cut_rows(layout.row_groups, unit_rows):
            if remaining is not None:
                num_rows = min(num_rows, remaining)
                remaining -= num_rows
            yield make_unit(layout.source, first_row, num_rows, fingerprint, layout.mark_before(first_row), names)
            if remaining == 0:
                return


def cut_rows(row_groups: Sequence[int], unit_rows: int) -> Iterator[tuple[int, int]]:
    """(first row, rows) ranges of at most `unit_rows` rows that cover the row groups in order.

    Small row groups are taken together as long as they fit; a row group that is larger than a unit is cut inside into even
    ranges, so that no sliver is left over.
    """
    first, rows = 0, 0
    for group in row_groups:
        if rows and rows + group > unit_rows:
            yield first, rows
            first, rows = first + rows, 0
        if group > unit_rows:
            pieces = -(-group // unit_rows)
            cuts = [group * piece // pieces for piece in range(pieces + 1)]
            yield from ((first + start, stop - start) for start, stop in pairwise(cuts))
            first += group
        else:
            rows += group
    if rows:
        yield first, rows


def make_unit(
    source: Source, first_row: int, num_rows: int, fingerprint: str, near: tuple[int, int] = START, names: ShardNames = PARQUET_NAMES
) -> Unit:
    """The unit of a row range, with its id and the name of its shard."""
    identity = json.dumps((source.uri, source.size, source.version, first_row, num_rows, fingerprint))
    unit_id = hashlib.sha256(identity.encode()).hexdigest()[:16]
    shard = f"data/{shard_stem(source, names)}-{first_row:010d}-{unit_id}{names.suffix}"
    return Unit(unit_id, source, first_row, num_rows, shard, near)


def stem_of(shard: str) -> str:
    """The `shard_stem` in a shard's name; sources in several folders can share one."""
    return shard.removeprefix("data/").rsplit("-", 2)[0]


@lru_cache(maxsize=16)  # asked for every unit of a source in turn
def shard_stem(source: Source, names: ShardNames = PARQUET_NAMES) -> str:
    """The source's path as shard names carry it: hive segments stay folders where there are some, other folders are joined into the stem.

    Hive segments are taken from the whole URI, so that the partition is kept where the input is one partition's folder.
    """
    folders = source.uri.partition("://")[2].split("/")[:-1]
    hive = [folder for folder in folders if _is_hive(folder)]
    *above, name = source.path.split("/")
    file = PurePosixPath(name)
    parts = [
        *(() if names.has_folders else hive),
        *(folder for folder in above if not _is_hive(folder)),
        file.stem if file.suffix.lower() in Format.PARQUET.suffixes else file.name,
    ]
    stem = re.sub(r"[^A-Za-z0-9.=_-]+", "_", "-".join(parts))
    # Readers skip names that begin with a dot or an underscore.
    kept = [_HIVE_ESCAPED.sub(lambda match: f"%{ord(match[0]):02X}", folder) for folder in hive] if names.has_folders else []
    return "/".join([*kept, stem[-_MAX_STEM_CHARS:].lstrip("._") or "source"])


def _is_hive(segment: str) -> bool:
    key, equals, _ = segment.partition("=")
    return bool(equals) and re.fullmatch(r"\w+", key) is not None
