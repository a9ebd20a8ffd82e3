"""Numbers and sampled rows in words, as the report says them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import unquote

_NAMED_CLASSES = 7
_COVERED = 0.15
"""Share of the rows that the named classes of a column must have for it to be worth a colour."""
_READABLE_CHARS = 30
_NAME_CHARS, _TEXT_CHARS = 80, 160


@dataclass(frozen=True)
class Named:
    """A row of the sample, as it is called and what it says."""

    name: str
    text: str = ""
    cosine: str = ""


@dataclass(frozen=True)
class Classes:
    """Rows by the values of a column."""

    column: str
    """Empty where no column divides the rows into few classes."""
    labels: Mapping[int, str]
    """By class number; the last number is that of all other values."""
    of_rows: Sequence[int]


def share(part: float, whole: float) -> str:
    """Percent with a decimal; what is there never reads as 0.0%."""
    percent = 100 * part / whole if whole else 0.0
    return "under 0.1%" if 0 < percent < 0.05 else f"{percent:.1f}%"


def duration(seconds: float) -> str:
    """1.5 s, 2 min 5 s, 3 h 4 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def short_number(value: float, _position: int | None = None) -> str:
    """12,300 as 12.3k; the second argument is that of an axis's formatter."""
    for scale, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= scale:
            return f"{value / scale:.3g}{letter}"
    return f"{value:.3g}"


def file_name(uri: str) -> str:
    """The last part of a source's URI."""
    return unquote(uri.rpartition("/")[2])


def said(value: object) -> str:
    """A setting's value."""
    if isinstance(value, list | tuple):
        return ", ".join(map(said, value)) or "none"
    return {"": "none", "None": "none", "True": "yes", "False": "no"}.get(str(value), str(value))


def name_rows(columns: Mapping[str, Sequence[str | None]], id_column: str | None, text_column: str) -> list[Named]:
    """What to call each row: its id, else its place; and what it says, if a kept column tells."""
    rows = len(columns["source"])
    if id_column and id_column in columns:
        names = [_short(value, _NAME_CHARS) or "(null)" for value in columns[id_column]]
    else:
        numbers = columns.get("row_index", [""] * rows)
        names = [f"{file_name(uri or '')} row {number}" for uri, number in zip(columns["source"], numbers, strict=True)]
    kept = {name: values for name, values in columns.items() if name not in ("source", "row_index", id_column)}
    lengths = {name: sum(len(value or "") for value in values) / rows for name, values in kept.items()}
    longest = text_column if text_column in kept else max(lengths, key=lambda name: lengths[name], default="")
    readable = kept[longest] if longest and lengths[longest] >= _READABLE_CHARS else [""] * rows
    return [Named(name, _short(text, _TEXT_CHARS)) for name, text in zip(names, readable, strict=True)]


def classify_rows(columns: Mapping[str, Sequence[str | None]], but: Sequence[str | None]) -> Classes:
    """The column, other than `but`, whose commonest values cover most of the rows; the source file where no kept column does."""
    rows = len(columns["source"])
    best, best_rows = "", max(_COVERED * rows, 2.0)
    kept = [name for name in columns if name not in (*but, "source", "row_index")]
    for name in [*kept, *(["source"] if "source" not in but else [])]:
        common = Counter(columns[name]).most_common(_NAMED_CLASSES)
        covered = sum(number for _, number in common)
        if len(common) > 1 and covered >= best_rows and not (name == "source" and best):
            best, best_rows = name, covered + 1
    if not best:
        return Classes("", {}, [0] * rows)
    common = Counter(columns[best]).most_common()
    numbers = {value: min(number, _NAMED_CLASSES) for number, (value, _) in enumerate(common)}
    labels = {number: (file_name(value or "") if best == "source" else _short(value, 40) or "(empty)") for value, number in numbers.items()}
    if len(common) > _NAMED_CLASSES:
        labels[_NAMED_CLASSES] = f"{len(common) - _NAMED_CLASSES:,} others"
    return Classes("source file" if best == "source" else best, labels, [numbers[value] for value in columns[best]])


def _short(value: str | None, chars: int) -> str:
    """On one line, without control characters, cut at `chars`."""
    text = " ".join("".join(letter if letter.isprintable() else " " for letter in value or "").split())
    return text if len(text) <= chars else f"{text[: chars - 3]}..."
