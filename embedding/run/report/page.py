"""What the report is made of, and what stands in it: the template lays out a Page, item by item."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from embedding.corpus.output import JobSettings
from embedding.corpus.review import Records, Rejections, Sample, Totals
from embedding.run.report.vectors import VectorFacts
from embedding.run.report.wording import Named
from embedding.run.summary import Summary


@dataclass(frozen=True)
class Findings:
    """All that the report is made of."""

    summary: Summary
    settings: JobSettings
    model: str
    """As the user said it."""
    shards: int
    """Shards that are committed."""
    totals: Totals
    records: Records
    rejections: Rejections
    runs: list[dict[str, object]]
    sample: Sample
    vectors: VectorFacts | None
    """None where there is no vector to look at."""


@dataclass(frozen=True)
class Numbers:
    """A table; columns named in `numeric` are aligned right."""

    heads: Sequence[str]
    rows: Sequence[Sequence[object]]
    numeric: Sequence[str] = ()


@dataclass(frozen=True)
class Item:
    """A figure, or without `svg` a table, under a title, with one sentence that reads it."""

    title: str
    reading: str
    numbers: Numbers | None = None
    svg: str = ""
    legend: Sequence[tuple[str, str]] = ()
    """Colour class and label."""
    kind: str = ""


@dataclass(frozen=True)
class Section:
    """A part of the page."""

    title: str
    lead: str
    grid: Sequence[Item] = ()
    neighbours: Sequence[tuple[Named, Sequence[Named]]] = ()
    blocks: Sequence[Item] = ()


@dataclass(frozen=True)
class Page:
    """The whole of it, in the order of the page."""

    title: str
    good: bool
    verdict: str
    sentence: str
    tiles: Sequence[tuple[str, str, str]]
    """Name, value, note."""
    warnings: Sequence[str]
    sections: Sequence[Section]
