"""The view of a run: on a real terminal, as a person sees it, and as log lines."""

from __future__ import annotations

import logging
import re
import sys
import threading
import time
from pathlib import Path

import pytest

from embedding.corpus import ending
from embedding.corpus.ledger import CommitRecord
from embedding.corpus.plan import make_unit
from embedding.corpus.sources import Source
from embedding.run.outlook import Outlook
from embedding.run.placement import Placement
from embedding.run.progress import OtherVoices, Watched, open_progress
from embedding.run.summary import Summary
from tests.model.tiny import save_model
from tests.support import corpora
from tests.support.job import SCRIPT
from tests.support.ray_cluster import RayCluster
from tests.support.terminal import on_terminal

ROWS = 2_000
SOURCE = Source("a.parquet", "file:///a.parquet", 4_000, "v")
UNITS = [make_unit(SOURCE, first, 1_000, "f") for first in range(0, 4_000, 1_000)]


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str | Path]:
    """A job whose model runs padded, which a worker says in the middle of the run."""
    folder = tmp_path_factory.mktemp("terminal")
    source = corpora.plain(rows=ROWS, files=1, row_group_rows=500).write(folder / "in")
    options = ["--max-tokens", "16", "--unit-rows", "10", "--id-column", "id"]
    return [sys.executable, SCRIPT, "--input", source, "--model", save_model(folder / "model", "t5"), *options]


def count(lines: list[str], pattern: str) -> int:
    return sum(re.search(pattern, line) is not None for line in lines)


def test_a_run_on_a_terminal(command: list[str | Path], ray_cluster: RayCluster, tmp_path: Path) -> None:
    with on_terminal([*command, "--output", tmp_path / "out"], ray_cluster.environment()) as terminal:
        terminal.wait_for(lambda lines: count(lines, r"starting workers · ETA unknown · elapsed 0:00:0[1-9]"), what="time to go on")
        shown = terminal.wait_for(lambda lines: count(lines, r"^[1-9]\d* in flight, [1-9]\d* of 200 units done, 0 failed$"), what="units")
        assert count(shown, r"^[1-9][\d,]* of 2,000 rows, \d+% · [\d,]+ tokens/s · ETA 0:\d\d:\d\d · elapsed 0:\d\d:\d\d$") == 1
        assert count(shown, r"^1 of 1 workers(, CPU busy \d+%)? · [1-9][\d,]* truncated, 0 rejected$") == 1
        last = terminal.wait()
        assert terminal.process.returncode == 0
        assert not terminal.cursor_hidden
    assert count(last, r"^\d\d:\d\d:\d\d WARNING the model runs padded: ") == 1
    assert [count(last, pattern) for pattern in ("━━━", "starting workers ·", "of 2,000 rows", "2,000 of 2,000 rows, 100%")] == [1, 0, 1, 1]
    [view] = [number for number, line in enumerate(last) if line.startswith("━━━")]
    assert f"{tmp_path}/out" in last[view - 1]
    assert last[view + 4].startswith('{"output": ')


def test_ctrl_c_leaves_the_terminal_as_it_was(command: list[str | Path], ray_cluster: RayCluster, tmp_path: Path) -> None:
    claimed = {"COLUMNS": "80"}  # exported by a shell, say, whose window was wider then
    with on_terminal([*command, "--output", tmp_path / "out"], {**ray_cluster.environment(), **claimed}, columns=60) as terminal:
        terminal.wait_for(lambda lines: count(lines, r"^[1-9][\d,]* of 2,000 rows"), what="rows")
        assert terminal.cursor_hidden
        terminal.press(b"\x03")
        last = terminal.wait()
        assert terminal.process.returncode == 130
        assert not terminal.cursor_hidden
    assert [count(last, pattern) for pattern in ("━━━", "of 2,000 rows", "units done|in flight")] == [1, 1, 1]
    shown = "".join(last)  # the terminal wraps lines
    assert re.search('"status": ?"interrupted"', shown)
    assert re.search(r"INFO stopped with [1-9][\d,]* rows committed; run the same *command again to resume", shown)


def test_how_workers_are_stopped_is_no_news(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray tells of each one that it will be tried again for ever, below the view that has just ended."""
    caplog.set_level("INFO", "embedding")
    monkeypatch.setattr(logging.getLogger("embedding"), "propagate", True)
    asked = threading.Event()
    monkeypatch.setattr(ending, "asked", asked)
    print("(raylet) a node has gone\nand more of it", file=OtherVoices())
    asked.set()
    print("(raylet) There are infinite retries remaining", file=OtherVoices())
    assert caplog.messages == ["(raylet) a node has gone"]


def watched() -> Watched:
    """A run of four units of 1,000 rows: one is done, one failed."""
    summary = Summary.planned(output="out", run="r", done=[], pending=UNITS)
    outlook = Outlook(UNITS, UNITS)
    records = [
        CommitRecord.of(UNITS[0], tokens=20_000, truncated=1_200, rejected=3, encode_started=100.0, encode_seconds=10_000.0, worker="w"),
        CommitRecord.of(UNITS[1], error="damaged"),
    ]
    for record in records:
        summary.add(record)
        outlook.add(record, time.monotonic())
    return Watched(summary, outlook, Placement(2, 4, 1.0, 1, 4, "bf16"), lambda: None)


def test_lines_where_there_is_no_terminal(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("embedding"), "propagate", True)
    with caplog.at_level(logging.INFO, "embedding"), open_progress("auto", watched()) as view:
        view.update()
        view.update()  # at once: says nothing
    [line] = caplog.messages
    assert re.fullmatch(
        r"2,000 of 4,000 rows \(50%\), 0 rows/s, 2 tokens/s, 1 unit failed, ETA 5:33:\d\d, 1 of 4 workers, 1,200 truncated, 3 rejected",
        line,
    )


def test_silence(caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("embedding"), "propagate", True)
    with caplog.at_level(logging.INFO, "embedding"), open_progress("none", watched()) as view:
        view.update()
    assert (caplog.messages, capsys.readouterr().err) == ([], "")
