"""Figures of the report: matplotlib draws them, the page's style sheet colours them, so that one drawing serves light and dark.

Each is an `<svg>` element to be put into a page: no fonts, no ids that nothing refers to, numbers to a tenth of a pixel, and texts of
the page's own font.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from embedding.corpus.lengths import LENGTH_EDGES
from embedding.errors import count
from embedding.run.report.measures import Pace, WorkerTime
from embedding.run.report.wording import short_number

Floats = npt.NDArray[np.float64]

CLASSES = 8
"""Colours for categories; the last one is for all others."""
_COLOURS = {name: f"#0000{number:02x}" for number, name in enumerate(["ink", "muted", "rule", *(f"c{n}" for n in range(CLASSES))], 1)}
"""What matplotlib is told stands for a variable of the style sheet."""
_VARIABLES = {colour: f"var(--{name})" for name, colour in _COLOURS.items()}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # names of workers are no formulas
    "font.size": 12,
    "axes.edgecolor": _COLOURS["rule"],
    "axes.labelcolor": _COLOURS["muted"],
    "axes.labelpad": 7,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.axisbelow": True,
    "grid.color": _COLOURS["rule"],
    "grid.linewidth": 0.8,
    "xtick.color": _COLOURS["rule"],
    "xtick.labelcolor": _COLOURS["muted"],
    "ytick.color": _COLOURS["rule"],
    "ytick.labelcolor": _COLOURS["muted"],
    "ytick.major.size": 0,
}
_WIDTH = 520
"""Pixels at which a text has its own size."""
_CLOCK = (("hours", 3600), ("minutes", 60), ("seconds", 1))
_LONG_NUMBER = re.compile(r"-?\d+\.\d{2,}(?:e-?\d+)?")
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 16, 12, 48


@dataclass(frozen=True)
class Drawing:
    """A figure in the making: its name, what it shows in words, and its axes."""

    name: str
    title: str
    description: str
    figure: Figure
    axes: Axes


def pace_svg(pace: Pace) -> str:
    """Tokens a second over the run."""
    unit, scale = next((unit, scale) for unit, scale in _CLOCK if pace.seconds >= 2 * scale or scale == 1)
    peak = f"Between {pace.tokens_per_second.min():,.0f} and {pace.tokens_per_second.max():,.0f} tokens/s"
    with _drawing("pace", "Tokens per second over the run", f"{peak}, over {pace.seconds / scale:.1f} {unit}.") as drawing:
        axes = drawing.axes
        axes.stairs(pace.tokens_per_second, pace.edges / scale, fill=True, color=_COLOURS["c0"], alpha=0.2)
        axes.stairs(pace.tokens_per_second, pace.edges / scale, baseline=None, color=_COLOURS["c0"], linewidth=1.8)
        axes.set(xlabel=f"{unit} since the first batch", ylim=(0, None), xlim=(0, pace.seconds / scale))
        axes.yaxis.set_major_formatter(FuncFormatter(short_number))
        return _svg(drawing)


def lengths_svg(counts: npt.NDArray[np.int64], truncated: int, max_tokens: int) -> str:
    """Rows by tokens, with what was cut at the line of `max_tokens`."""
    used = np.flatnonzero(counts)
    end = int(np.searchsorted(LENGTH_EDGES, max_tokens, side="right")) - 1
    first, last = min(int(used[0]), end), max(int(used[-1]), end)
    shown, bins = counts[first : last + 1], np.arange(first, last + 1)
    limit = float(np.interp(max_tokens, LENGTH_EDGES, np.arange(len(LENGTH_EDGES))))
    most = int(LENGTH_EDGES[int(counts.argmax())])
    words = f"The most common length is about {most} tokens; {truncated:,} rows were truncated at {max_tokens} tokens."
    with _drawing("lengths", "Rows by length in tokens", words) as drawing:
        axes = drawing.axes
        cut = np.zeros(len(shown))
        cut[int(limit) - first] = min(truncated, shown[int(limit) - first])
        axes.bar(bins + 0.5, shown - cut, width=0.86, color=_COLOURS["c0"])
        axes.bar(bins + 0.5, cut, bottom=shown - cut, width=0.86, color=_COLOURS["c1"])
        axes.axvline(limit, color=_COLOURS["ink"], linewidth=1.2, linestyle=(0, (4, 3)))
        label, place = f"max_tokens {max_tokens:,}", ("data", "axes fraction")
        left = (-6.0, 0.0)  # points, so that the label stands clear of the line
        axes.annotate(label, (limit, 1), left, xycoords=place, textcoords="offset points", ha="right", va="top", color=_COLOURS["ink"])
        marks = [edge for edge in range(first, last + 2) if edge in (1, 2, 4) or (edge >= 8 and edge % 4 == 0)]
        axes.set_xticks(marks, [short_number(float(LENGTH_EDGES[mark])) for mark in marks])
        axes.set(
            xlabel="tokens per row (logarithmic)", xlim=(first - 0.2, last + 1.2), ylim=(0, 1.12 * max(1, int(shown.max())))
        )  # room for the label
        axes.yaxis.set_major_formatter(FuncFormatter(short_number))
        return _svg(drawing)


def workers_svg(workers: Sequence[WorkerTime]) -> str:
    """A bar for each worker: what its time went to."""
    busy = [100 * worker.encoding / worker.seconds for worker in workers]
    words = f"{count(len(workers), 'worker')}; each encoded between {min(busy):.0f}% and {max(busy):.0f}% of the time."
    with _drawing("workers", "Where each worker's time went", words, height=74 + 30 * len(workers)) as drawing:
        axes, rows, left = drawing.axes, np.arange(len(workers)), np.zeros(len(workers))
        for colour, part in (("c0", "encoding"), ("c2", "tokenizing"), ("c1", "waiting"), ("c7", "outside")):
            shares = np.array([getattr(worker, part) / worker.seconds for worker in workers])
            axes.barh(rows, shares, left=left, height=0.62, color=_COLOURS[colour])
            left += shares
        axes.set(xlim=(0, 1), ylim=(len(workers) - 0.5, -0.5), xlabel="share of the time between the first and the last batch")
        axes.set_yticks(rows, [_label(worker.name) for worker in workers])
        axes.set_position((132 / _WIDTH, axes.get_position().y0, (_WIDTH - 132 - 22) / _WIDTH, axes.get_position().height))
        axes.grid(visible=False)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        return _svg(drawing)


def plane_svg(plane_R2: Floats, classes_R: Sequence[int], titles_R: Sequence[str], share: float) -> str:
    """Rows on their first two principal axes, coloured by class; the title of a point shows when it is pointed at."""
    words = f"{len(plane_R2):,} rows on the two axes along which they differ most, which show {share:.0%} of their variance."
    with _drawing("plane", "Map of sampled vectors", words, height=520) as drawing:
        axes, classes = drawing.axes, np.asarray(classes_R)
        for number in sorted(set(classes.tolist()), reverse=True):  # all others first, below the named ones
            points = plane_R2[classes == number]
            [line] = axes.plot(points[:, 0], points[:, 1], "o", markersize=4.6, markeredgewidth=0, color=_COLOURS[f"c{number}"], alpha=0.75)
            line.set_gid(f"points-{number}")
        axes.set_position((6 / _WIDTH, 6 / 520, 1 - 12 / _WIDTH, 1 - 12 / 520))
        axes.set(xticks=[], yticks=[])
        axes.spines["bottom"].set_visible(False)
        axes.margins(0.03)
        axes.grid(visible=False)
        titles = {
            f"points-{number}": [titles_R[row] for row in np.flatnonzero(classes == number).tolist()] for number in set(classes.tolist())
        }
        return _svg(drawing, titles)


def cosines_svg(cosines: Floats, nearest: Floats) -> str:
    """How alike two rows are, and a row and its nearest."""
    words = f"Medians: {np.median(cosines):.2f} for any two rows, {np.median(nearest):.2f} for a row and its nearest."
    with _drawing("cosines", "Cosines between sampled vectors", words) as drawing:
        axes = drawing.axes
        edges = np.linspace(min(-0.05, float(cosines.min())), max(1.0, float(nearest.max())), 61)
        for values, colour in ((cosines, "c0"), (nearest, "c1")):
            shares = np.histogram(values, edges)[0] / len(values)
            axes.stairs(shares, edges, fill=True, color=_COLOURS[colour], alpha=0.25)
            axes.stairs(shares, edges, baseline=None, color=_COLOURS[colour], linewidth=1.6)
        axes.set(xlabel="cosine", ylim=(0, None), xlim=(edges[0], edges[-1]))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        return _svg(drawing)


def norms_svg(norms: Floats) -> str:
    """Lengths of the vectors, where they are not all the same."""
    words = f"Between {norms.min():.3g} and {norms.max():.3g}, with a median of {np.median(norms):.3g}."
    with _drawing("norms", "Lengths of sampled vectors", words) as drawing:
        axes = drawing.axes
        axes.hist(norms, bins=40, color=_COLOURS["c0"], rwidth=0.86)
        axes.set(xlabel="length (L2 norm)")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
        axes.yaxis.set_major_formatter(FuncFormatter(short_number))
        return _svg(drawing)


def _label(name: str) -> str:
    """The end of the name, which has the process, in letters that matplotlib's font has."""
    plain = "".join(letter if letter.isascii() and letter.isprintable() else "?" for letter in name)
    return plain if len(plain) <= 18 else f"...{plain[-15:]}"


@contextmanager
def _drawing(name: str, title: str, description: str, *, height: int = 270) -> Iterator[Drawing]:
    """An empty figure of _WIDTH by `height` pixels, in the style of the report."""
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(_WIDTH / 72, height / 72), dpi=72)
        figure.patch.set_visible(False)
        place = (_LEFT / _WIDTH, _BOTTOM / height, 1 - (_LEFT + _RIGHT) / _WIDTH, 1 - (_BOTTOM + _TOP) / height)
        axes = figure.add_axes(place)
        axes.patch.set_visible(False)
        axes.grid(visible=True, axis="y")
        yield Drawing(name, title, description, figure, axes)


def _svg(drawing: Drawing, titles: Mapping[str, Sequence[str]] | None = None) -> str:
    """The element; `titles` are those of the points of each group that has its name as gid."""
    buffer = io.BytesIO()
    drawing.figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    root = ElementTree.fromstring(buffer.getvalue())
    for element in root.iter():
        _simplify(element)
    for group, texts in (titles or {}).items():
        points = root.findall(f".//g[@id='{group}']//use")
        for point, text in zip(points, texts, strict=True):
            ElementTree.SubElement(point, "title").text = text
    referred = set(re.findall(r"#([\w-]+)", ElementTree.tostring(root, "unicode")))
    for element in root.iter():
        if element.get("id") not in referred:
            element.attrib.pop("id", None)
    for position, (tag, text) in enumerate((("title", drawing.title), ("desc", drawing.description))):
        heading = ElementTree.Element(tag, id=f"{drawing.name}-{tag}")
        heading.text = text
        root.insert(position, heading)
    for size in ("width", "height", "version"):
        del root.attrib[size]
    root.attrib |= {"role": "img", "aria-labelledby": f"{drawing.name}-title {drawing.name}-desc", "class": f"figure {drawing.name}"}
    for definitions in root.findall("defs/style/.."):
        root.remove(definitions)
    return re.sub(r">\s+<", "><", ElementTree.tostring(root, "unicode"))


def _simplify(element: ElementTree.Element) -> None:
    """Plain names, as HTML has them; a tenth of a pixel is enough; points take the style of their group."""
    element.tag = element.tag.rpartition("}")[2]
    for key, value in list(element.attrib.items()):
        del element.attrib[key]
        if key in ("d", "x", "y", "transform", "points"):
            value = _LONG_NUMBER.sub(lambda match: f"{float(match[0]):.1f}", " ".join(value.split()))
        if key == "style":
            value = re.sub(r"font-family:[^;]*;?", "", value)
            value = re.sub(r"#0000[0-9a-f]{2}", lambda match: _VARIABLES.get(match[0], match[0]), value)
        element.attrib[key.rpartition("}")[2]] = value
