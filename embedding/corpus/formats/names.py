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
    JSONL = "jsonl"
    CSV = "csv"
    TSV = "tsv"

    @property
    def label(self) -> str:
        """Its name in sentences."""
        return {Format.PARQUET: "Parquet", Format.ARROW: "Arrow", Format.JSONL: "JSON Lines"}.get(self, self.upper())

    @property
    def suffixes(self) -> tuple[str, ...]:
        """What names of its files end in."""
        return _SUFFIXES[self]


_SUFFIXES = {
    Format.PARQUET: (".parquet", ".parq", ".pq"),
    Format.ARROW: (".arrow", ".feather", ".ipc", ".arrows"),
    Format.JSONL: (".jsonl", ".ndjson", ".json"),
    Format.CSV: (".csv",),
    Format.TSV: (".tsv",),
}
_CODECS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
"""Of the text formats; the others compress inside."""
_BY_SUFFIX = {suffix: kind for kind, suffixes in _SUFFIXES.items() for suffix in suffixes}
_OFTEN_BESIDE = ".json"
"""Files of this name often describe a corpus that lies beside them."""


def format_by_name(name: str) -> Format | None:
    """The format that a file's name tells, None where it tells none."""
    bare, dot, last = name.lower().rpartition(".")
    if is_compressed := dot + last in _CODECS:
        _, dot, last = bare.rpartition(".")
    kind = _BY_SUFFIX.get(dot + last)
    return None if is_compressed and kind in (Format.PARQUET, Format.ARROW) else kind


def codec_by_name(name: str) -> str | None:
    """What a text file is compressed with, by the end of its name."""
    return next((codec for suffix, codec in _CODECS.items() if name.lower().endswith(suffix)), None)


def _without_codec(name: str) -> str:
    return next((name.removesuffix(suffix) for suffix in _CODECS if name.endswith(suffix)), name)


def format_of(names: Iterable[str], asked: str = AUTO) -> Format:
    """The format that was asked for; else Parquet where there is any, so that what lies beside it stays out; else the only one there.

    Files whose names tell no format are Parquet where nothing else is there, and .json counts only where nothing else does.

    Raises:
        CorpusError: there are several.
    """
    if asked != AUTO:
        return Format(asked)
    examples: dict[Format, str] = {}
    weak: dict[Format, str] = {}
    for name in names:
        kind = format_by_name(name)
        if kind is not None:
            (weak if _without_codec(name.lower()).endswith(_OFTEN_BESIDE) else examples).setdefault(kind, name)
    examples = examples or weak
    if Format.PARQUET in examples or not examples:
        return Format.PARQUET
    if len(examples) > 1:
        (one, first), (other, second) = sorted(examples.items())[:2]
        found = f"{one.label} and {other.label} files ({first}, {second})"
        raise CorpusError(
            f"the corpus has {found}, but a run reads one format; set --input-format to {one} or {other}, or select files with a glob"
        )
    return next(iter(examples))
