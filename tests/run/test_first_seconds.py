"""Ctrl-C and SIGTERM while the commands still import what they need, and what is told of what failed."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from embedding.run.cli import _report, run
from embedding.run.summary import Summary
from tests.support.job import REPOSITORY
from tests.support.waiting import wait_until

EMBED, VERIFY = ["jobs/embed_corpus.py", "--input", "in", "--output", "out"], ["jobs/verify_corpus.py", "out"]
INSTALLED = ["-c", "from embedding.run.cli import main; main()", "--help"]
INSTALLED_PROOF = ["-c", "from embedding.run.proof.cli import main; main()", "--help"]


@pytest.mark.parametrize(
    ("command", "slow", "number"),
    [
        (EMBED, "rich", signal.SIGINT),
        (EMBED, "cyclopts", signal.SIGINT),
        (EMBED, "rich", signal.SIGTERM),
        (VERIFY, "rich", signal.SIGINT),
        (INSTALLED, "rich", signal.SIGINT),
        (INSTALLED_PROOF, "cyclopts", signal.SIGINT),
    ],
)
def test_a_signal_during_the_imports_ends_silently(command: list[str], slow: str, number: signal.Signals, tmp_path: Path) -> None:
    """A package of that name, which never finishes, stands for a slow disk."""
    (tmp_path / f"{slow}.py").write_text("import pathlib, time\npathlib.Path(__file__).with_name('reached').touch()\ntime.sleep(60)\n")
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}:{REPOSITORY}"}
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, *command], cwd=REPOSITORY, env=env, stdout=pipe, stderr=pipe) as process:
        wait_until(lambda: (tmp_path / "reached").exists() or process.poll() is not None, what="the import", seconds=60)
        process.send_signal(number)
        said = process.communicate(timeout=30)
    assert (process.returncode, said) == (128 + number, (b"", b""))


def test_a_file_that_failed_is_told_in_words(tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "good.csv").write_text("id,text\n1,a\n")
    (tmp_path / "in" / "bad.csv").write_text('id,text\n1,"a\n')
    (tmp_path / "in" / "empty.csv").touch()  # a night without new rows
    summary = tmp_path / "summary.json"
    options = ["--output", str(tmp_path / "out"), "--model", str(tiny_model), "--dry-run", "--quiet", "--json-summary", str(summary)]
    assert run(["--input", str(tmp_path / "in"), *options]) == 0
    told = capsys.readouterr()
    bad = f"file://{tmp_path}/in/bad.csv"
    assert told.err == f"failed: {bad}: row 0 opens a quote that is never closed\n"
    [failure] = json.loads(summary.read_text())["failures"]
    assert (failure["source"], failure["first_row"]) == (bad, None)


@pytest.mark.parametrize(
    ("reason", "line"),
    [
        ("its worker process died each time", "failed: s3://b/a.csv from row 8: its worker process died each time\n"),
        ("s3://b/a.csv: row 9 is\nbad", "failed: s3://b/a.csv from row 8: row 9 is bad\n"),
        ("s3://b/a.csv is not a readable CSV file: x", "failed: s3://b/a.csv from row 8 is not a readable CSV file: x\n"),
    ],
)
def test_a_unit_that_failed_is_told_with_its_first_row(reason: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    failure: dict[str, object] = {"unit": "1f", "source": "s3://b/a.csv", "first_row": 8, "rows": 8, "reason": reason}
    _report(Summary(output="out", run="r", failures=[failure]), io.StringIO())
    assert capsys.readouterr().err == line
