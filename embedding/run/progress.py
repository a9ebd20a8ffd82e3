"""How a run shows its progress: one calm view in a terminal, a line every few seconds in a log, or nothing."""

from __future__ import annotations

import io
import logging
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from embedding.corpus import ending
from embedding.errors import count
from embedding.names import ProgressStyle
from embedding.run.outlook import Outlook
from embedding.run.placement import Placement
from embedding.run.summary import Summary

log = logging.getLogger(__name__)

_LOG_SECONDS = 5.0
_VOICE_CHARS = 200
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_LOOKS_PER_SECOND = 2
_CLAIMED_SIZE = {"COLUMNS", "LINES"}
"""Exported, these outlive the window that they were true of, and a view wider than its terminal leaves parts of itself behind."""
_WIDTH = 100
"""Of the bar at most, in characters."""


@dataclass(frozen=True)
class Watched:
    """What a view looks at, from any thread: all of it grows while the run goes on."""

    summary: Summary
    outlook: Outlook
    placement: Placement
    in_flight: Callable[[], int | None]
    """Units that are being read or worked on right now, None where that is not known (yet)."""

    @property
    def rows(self) -> int:
        """Rows of units that ended in this run."""
        return self.summary.rows_in + self.summary.rows_failed

    @property
    def total(self) -> int:
        """Rows that this run has to embed."""
        return self.rows + self.summary.rows_pending

    @property
    def percent(self) -> str:
        """Share of the rows that is done, rounded down: 100% means all of them."""
        return f"{100 * self.rows // max(1, self.total)}%"

    def left(self, now: float) -> str:
        """Time that is left, as a clock."""
        return _clock(self.outlook.seconds_left(now))

    def pace(self, now: float) -> str:
        """Tokens a second lately."""
        return f"{self.outlook.tokens_per_second(now) or 0:,.0f} tokens/s"

    def workers(self, now: float) -> str:
        """Who is at work, and how much of it is work for the device."""
        most, busy = self.placement.max_workers, self.outlook.busy_share(now)
        device = "GPU" if self.placement.gpus else "CPU"
        return f"{self.outlook.workers_seen(now)} of {most} workers" + ("" if busy is None else f", {device} busy {busy:.0%}")

    def faults(self) -> str:
        """Rows that are not what they could be."""
        return f"{self.summary.truncated_rows:,} truncated, {self.summary.rows_rejected:,} rejected"


class ProgressView(Protocol):
    """Shows a run as it goes on."""

    def update(self) -> None:
        """A unit ended."""

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...


def open_progress(style: ProgressStyle, watched: Watched) -> ProgressView:
    """The view of that style; auto is a bar where stderr is a terminal that can move its cursor, else log lines."""
    console = Console(stderr=True, _environ={name: value for name, value in os.environ.items() if name not in _CLAIMED_SIZE})
    if style == "auto":
        style = "bar" if console.is_terminal and not console.is_dumb_terminal else "log"
    if style == "bar":
        return _Bar(console, watched)
    return _Lines(watched, silent=style == "none")


class _Bar:
    """Drawn anew twice a second, whether a unit ended or not. What is printed or logged meanwhile goes above it, whole."""

    def __init__(self, console: Console, watched: Watched) -> None:
        self._console = console
        self._watched = watched
        self._began = time.monotonic()
        self._live = Live(
            console=console,
            refresh_per_second=_LOOKS_PER_SECOND,
            redirect_stdout=sys.stdout.isatty(),  # what goes to a file goes there still
            get_renderable=self._drawn,
        )

    def update(self) -> None:
        """See ProgressView; the next look shows it."""

    def _drawn(self) -> Group:
        now, watched = time.monotonic(), self._watched
        summary, in_flight = watched.summary, watched.in_flight()
        head = f"{summary.output} · {watched.placement}"
        if summary.units_skipped:
            head += f" · {count(summary.units_skipped, 'unit')} already done"
        progress = [
            f"{watched.rows:,} of {watched.total:,} rows, {watched.percent}",
            watched.pace(now) if watched.rows else "starting workers",
            f"ETA {watched.left(now)}",
            f"elapsed {_clock(now - self._began)}",
        ]
        moving = "" if in_flight is None else f"{min(in_flight, summary.units_pending):,} in flight, "
        units = f"{moving}{summary.units_done:,} of {summary.units_done + summary.units_failed + summary.units_pending:,} units done, "
        trouble = Text(f"{summary.units_failed:,} failed", style="bold red" if summary.units_failed else "")
        bar = Table.grid()  # a line of its own, which a bare bar would share with what follows
        bar.add_row(ProgressBar(total=max(1, watched.total), completed=watched.rows, width=min(_WIDTH, self._console.width)))
        return Group(
            _line(Text(head, style="dim")),
            bar,
            _line(Text(" · ".join(progress))),
            _line(Text(units) + trouble),
            _line(Text(f"{watched.workers(now)} · {watched.faults()}")),
        )

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._live.stop()


def _line(text: Text) -> Text:
    """Cut at the terminal's edge: a view whose height changes would leave parts of itself behind."""
    text.no_wrap, text.overflow = True, "ellipsis"
    return text


class _Lines:
    def __init__(self, watched: Watched, *, silent: bool) -> None:
        self._watched = watched
        self._silent = silent
        self._next = time.monotonic()

    def update(self) -> None:
        now, watched = time.monotonic(), self._watched
        if self._silent or (now < self._next and watched.summary.rows_pending):
            return
        self._next = now + _LOG_SECONDS
        log.info(
            "%s of %s rows (%s), %s rows/s, %s, %s failed, ETA %s, %s, %s",
            f"{watched.rows:,}",
            f"{watched.total:,}",
            watched.percent,
            f"{watched.summary.rows_per_second:,.0f}",
            watched.pace(now),
            count(watched.summary.units_failed, "unit"),
            watched.left(now),
            watched.workers(now),
            watched.faults(),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        return None


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return "unknown"
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02}"


class OtherVoices(io.StringIO):
    """Stands for stdout while a run works: of what libraries print, the first line is logged.

    Ray prints whole tracebacks of what it is only going to try again, and how workers are stopped when that was asked for.
    """

    def write(self, text: str) -> int:
        """Log it; nothing is kept."""
        line = next((line for each in text.splitlines() if (line := _COLOUR.sub("", each).strip())), "")
        if line and not ending.asked.is_set():
            log.info("%s", line if len(line) <= _VOICE_CHARS else f"{line[:_VOICE_CHARS]} ...")
        return len(text)


class _Stderr(logging.Handler):
    """Writes to whatever sys.stderr is at that moment: while a view is shown, this puts lines above it."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            print(self.format(record), file=sys.stderr, flush=True)
        except OSError:  # whoever read it is gone
            self.handleError(record)


def log_to_stderr(level: int = logging.INFO) -> None:
    """Our messages to stderr, one line each; stdout stays for the summary."""
    handler = _Stderr()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    root = logging.getLogger("embedding")
    root.handlers[:] = [handler]
    root.propagate = False
    root.setLevel(level)
