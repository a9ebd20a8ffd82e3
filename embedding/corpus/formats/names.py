"""Which format a source file is in, by its name."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum

from embedding.errors import CorpusError

AUTO = "auto"


class Format(StrEnum):
    """What a source file can be; one corpus is of one format."""

    PARQUET = "parquet"
    ARROW = "arrow"

    @property
    def label(self) -> str:
        """Its name in sentences."""
        return {Format.PARQUET: "Parquet", Format.ARROW: "Arrow"}[self]

    @property
    def suffixes(self) -> tuple[str, ...]:
        """What names of its files end in."""
        return _SUFFIXES[self]


_SUFFIXES = {
    Format.PARQUET: (".parquet", ".parq", ".pq"),
    Format.ARROW: (".arrow", ".feather", ".ipc", ".arrows"),
}


def format_by_name(name: str) -> Format | None:
    """The format that a file's name tells, None where it tells none."""
    return next((kind for kind in Format if name.lower().endswith(kind.suffixes)), None)


def format_of(names: Iterable[str], asked: str = AUTO) -> Format:
    """The format that was asked for; else Parquet where there is any, so that what lies beside it stays out; else the only one there.

    Files whose names tell no format are Parquet where nothing else is there.

    Raises:
        CorpusError: there are several.
    """
    if asked != AUTO:
        return Format(asked)
    examples: dict[Format, str] = {}
    for name in names:
        kind = format_by_name(name)
        if kind is not None:
            examples.setdefault(kind, name)
    if Format.PARQUET in examples or not examples:
        return Format.PARQUET
    if len(examples) > 1:
        (one, first), (other, second) = sorted(examples.items())[:2]
        found = f"{one.label} and {other.label} files ({first}, {second})"
        raise CorpusError(f"the corpus has {found}; a run reads one format: say --input-format {one} or {other}, or name files by a glob")
    return next(iter(examples))
