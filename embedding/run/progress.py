"""How a run shows that it lives: a calm bar in a terminal, a line every few seconds in a log, or nothing."""

from __future__ import annotations

import io
import logging
import re
import sys
import time
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from embedding.config import ProgressStyle
from embedding.run.summary import Summary

log = logging.getLogger(__name__)

_LOG_SECONDS = 5.0
_VOICE_CHARS = 200
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class ProgressView(Protocol):
    """Shows a summary as it grows."""

    def update(self, summary: Summary) -> None:
        """A unit ended."""

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...


def open_progress(style: ProgressStyle, total_rows: int) -> ProgressView:
    """The view of that style; auto is a bar where stderr is a terminal, else log lines."""
    console = Console(stderr=True)
    if style == "auto":
        style = "bar" if console.is_terminal else "log"
    if style == "bar":
        return _Bar(console, total_rows)
    return _Lines(total_rows, silent=style == "none")


class _Bar:
    def __init__(self, console: Console, total_rows: int) -> None:
        self._progress = Progress(
            TextColumn("embedding"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("rows · {task.fields[pace]}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[trouble]}"),
            console=console,
        )
        self._row = self._progress.add_task("rows", total=total_rows, pace="starting workers", trouble="")

    def update(self, summary: Summary) -> None:
        pace = f"{summary.tokens_per_second:,.0f} tokens/s · ETA {_clock(summary.seconds_left)} · elapsed"
        trouble = f"[red]{summary.units_failed} units failed" if summary.units_failed else ""
        self._progress.update(self._row, completed=summary.rows_in + summary.rows_failed, pace=pace, trouble=trouble)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()


class _Lines:
    def __init__(self, total_rows: int, *, silent: bool) -> None:
        self._total = total_rows
        self._silent = silent
        self._next = time.monotonic()

    def update(self, summary: Summary) -> None:
        now, rows = time.monotonic(), summary.rows_in + summary.rows_failed
        if self._silent or (now < self._next and rows < self._total):
            return
        self._next = now + _LOG_SECONDS
        log.info(
            "%s of %s rows (%.0f%%), %s rows/s, %s tokens/s, %s units failed, ETA %s",
            f"{rows:,}",
            f"{self._total:,}",
            100 * rows / max(1, self._total),
            f"{summary.rows_per_second:,.0f}",
            f"{summary.tokens_per_second:,.0f}",
            summary.units_failed,
            _clock(summary.seconds_left),
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

    Ray prints whole tracebacks of what it is only going to try again.
    """

    def write(self, text: str) -> int:
        """Log it; nothing is kept."""
        line = next((line for each in text.splitlines() if (line := _COLOUR.sub("", each).strip())), "")
        if line:
            log.info("%s", line if len(line) <= _VOICE_CHARS else f"{line[:_VOICE_CHARS]} ...")
        return len(text)


def log_to_stderr(level: int = logging.INFO) -> None:
    """Our messages to stderr, one line each; stdout stays for the summary."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    root = logging.getLogger("embedding")
    root.handlers[:] = [handler]
    root.propagate = False
    root.setLevel(level)
