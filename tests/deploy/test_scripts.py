"""What the shell, Slurm and Docker are to read is checked by their own linters, and asks for what docs/clusters.md says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from embedding.errors import ExitCode

REPOSITORY = Path(__file__).resolve().parents[2]
SBATCH = REPOSITORY / "deploy" / "slurm" / "embed_corpus.sbatch"


def linted(tool: str, *arguments: str, text: str) -> subprocess.CompletedProcess[str]:
    """What a linter of this environment says about a text."""
    program = Path(sys.executable).with_name(tool)
    return subprocess.run([program, *arguments, "-"], input=text, capture_output=True, text=True, timeout=60)


def test_the_batch_script_is_sound() -> None:
    subprocess.run(["bash", "-n", SBATCH], check=True, timeout=60)
    found = linted("shellcheck", text=SBATCH.read_text())
    assert found.returncode == 0, found.stdout
    assert linted("shellcheck", text=SBATCH.read_text().replace('"$driver"', "$driver")).returncode == 1


def test_the_image_is_sound() -> None:
    text = (REPOSITORY / "deploy" / "Dockerfile").read_text()
    found = linted("hadolint", text=text)
    assert found.returncode == 0, found.stdout
    assert linted("hadolint", text=text.replace("RUN pip install --no-cache-dir", "RUN pip install")).returncode == 1


def test_what_the_image_copies_is_let_through() -> None:
    copied = re.findall(r"^COPY (.+) \S+$", (REPOSITORY / "deploy" / "Dockerfile").read_text(), flags=re.MULTILINE)
    through = [line.removeprefix("!") for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert sorted(path for line in copied for path in line.split()) == sorted(through)
    assert [path for path in through if not (REPOSITORY / path).exists()] == []


def test_slurm_brings_the_script_back() -> None:
    lines = SBATCH.read_text().splitlines()
    first_command = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    found = [re.fullmatch(r"#SBATCH --([\w-]+)(?:=(\S+))?", line) for line in lines[:first_command]]
    given = {match[1]: match[2] or "" for match in found if match}
    assert sum(line.startswith("#SBATCH") for line in lines) == len(given)  # Slurm reads none after the first command
    assert {"requeue", "open-mode", "exclusive"} <= given.keys()
    assert given["open-mode"] == "append"
    name, _, seconds = given["signal"].partition("@")
    assert (name, int(seconds) >= 60) == ("B:USR1", True)
    assert re.search(r"^trap '.*' USR1\b", SBATCH.read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize("code", [ExitCode.COMPLETE, ExitCode.USAGE, ExitCode.FAILED_UNITS, ExitCode.OUTPUT_BUSY, ExitCode.CRASHED])
def test_slurm_tries_again_after_a_crash_only(code: ExitCode, tmp_path: Path) -> None:
    """The end of the script, with `scontrol` as a command that says that it was called."""
    text = SBATCH.read_text()
    start = text.index("\ncase $stopped in")
    resume = text[text.index("resume_later()") : text.index("trap stop_ray EXIT")]
    [crashes] = re.findall(r"^crashes=.*", text, flags=re.MULTILINE)
    begin = f"scontrol() {{ echo again; }}\nSLURM_JOB_ID=1 MAX_RESTARTS=2\n{crashes}\n{resume}"
    runs = [("USR1", ExitCode.CRASHED), ("", code), ("USR1", ExitCode.CRASHED), ("", code), ("", code), ("", code)]
    again = []
    for restarts, (stopped, ended_with) in enumerate(runs):
        script = f"SLURM_RESTART_COUNT={restarts} stopped={stopped} code={int(ended_with)}\n{begin}{text[start:]}"
        ended = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60)
        again.append(ended.stdout == "again\n")
        assert ended.returncode == (0 if again[-1] else ended_with)
    crashed = code == ExitCode.CRASHED
    assert again == [True, crashed, True, crashed, False, crashed]  # the time limit does not count, two crashes do
    assert [file.name for file in tmp_path.iterdir()] == (["embed-corpus-1.crashes"] if crashed else [])


def test_slurm_does_not_try_again_what_it_cannot_count(tmp_path: Path) -> None:
    text = SBATCH.read_text()
    resume = text[text.index("resume_later()") : text.index("trap stop_ray EXIT")]
    begin = f"scontrol() {{ echo again; }}\nSLURM_JOB_ID=1 MAX_RESTARTS=2 stopped= code=1 crashes={tmp_path}\n{resume}"
    script = begin + text[text.index("\ncase $stopped in") :]
    ended = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (1, "")
