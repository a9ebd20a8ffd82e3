"""`ray job submit` on a real job server that asks for a token: a working directory, a stop, a resumption, and ends told apart."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.job_submission import JobStatus, JobSubmissionClient

from embedding.run.submission import submit, watch
from tests.deploy.job_server import JobServer, job_server
from tests.model.tiny import save_model
from tests.support import corpora, outputs
from tests.support.job import REPOSITORY, SCRIPT
from tests.support.waiting import wait_until

ROWS, UNIT_ROWS = 600, 3
COMMAND = (sys.executable, str(SCRIPT))
RAY = [sys.executable, "-m", "ray.scripts.scripts", "job"]
FAILED_UNITS = """echo 'failed: {"source": "a"}'; echo '{"run": "r", "status": "failed units"}'; echo late; exit 3"""
WHERE_WORKERS_ARE_NAMED = 'self._name = f"{socket.gethostname()}'


@pytest.fixture(scope="module")
def server() -> Iterator[JobServer]:
    with job_server() as started:
        yield started


@pytest.fixture(scope="module")
def client(server: JobServer) -> JobSubmissionClient:
    return server.client()


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The same options each time, but for the output."""
    model = save_model(tmp_path_factory.mktemp("model"), "bert")
    source = corpora.plain(rows=ROWS, files=2, row_group_rows=30).write(tmp_path_factory.mktemp("corpus"))
    return ["--input", source, "--id-column", "id", "--unit-rows", str(UNIT_ROWS), "--model", str(model), "--progress", "log"]


@pytest.fixture(scope="module")
def undisturbed(arguments: list[str], server: JobServer, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The output of README's command, `ray job submit --working-dir .`, and what `ray job logs` shows of it.

    The working directory is a copy that gives its workers another name, since the nodes here have the package installed.
    """
    env = {**os.environ, **server.environment()}
    clone, output = tmp_path_factory.mktemp("clone"), str(tmp_path_factory.mktemp("output") / "vectors")
    for part in ("embedding", "jobs"):
        shutil.copytree(REPOSITORY / part, clone / part, ignore=shutil.ignore_patterns("__pycache__"))
    worker = clone / "embedding" / "run" / "worker.py"
    assert WHERE_WORKERS_ARE_NAMED in worker.read_text()
    worker.write_text(worker.read_text().replace(WHERE_WORKERS_ARE_NAMED, WHERE_WORKERS_ARE_NAMED.replace('f"', 'f"clone-')))
    command = [*RAY, "submit", "--submission-id", "undisturbed", "--working-dir", ".", "--"]
    job = [sys.executable, "jobs/embed_corpus.py", *arguments, "--output", output]
    subprocess.run([*command, *job], cwd=clone, env=env, check=True, capture_output=True, timeout=240)
    logs = subprocess.run([*RAY, "logs", "undisturbed"], env=env, check=True, capture_output=True, text=True, timeout=60)
    return output, logs.stdout


def test_workers_run_the_code_of_the_working_directory(undisturbed: tuple[str, str]) -> None:
    records = outputs.control(undisturbed[0], "records")
    assert len(records) == ROWS // UNIT_ROWS
    assert {worker.partition("-")[0] for worker in records["worker"].to_pylist()} == {"clone"}


def test_the_summary_is_the_last_line_of_the_log(undisturbed: tuple[str, str]) -> None:
    summary = json.loads(undisturbed[1].rstrip().rpartition("\n")[2])
    assert (summary["status"], summary["rows_out"]) == ("complete", ROWS)


def test_a_stopped_run_lets_go_and_the_next_one_resumes(
    arguments: list[str], undisturbed: tuple[str, str], client: JobSubmissionClient, tmp_path: Path
) -> None:
    output = str(tmp_path / "vectors")
    command = [*arguments, "--output", output, "--lease-seconds", "600"]  # a run that had to wait for the lease would be seen
    first = submit(client, command, command=COMMAND)
    wait_until(lambda: len(outputs.versions(output)) >= 5, what="shards", seconds=120)
    assert submit(client, command, command=COMMAND) == first  # a scheduler's second try finds the first one's
    client.stop_job(first)
    end = watch(client, first, lambda _: None, poll_seconds=0.2)
    assert (end.status, end.succeeded, end.final) == (JobStatus.STOPPED, False, True)
    assert json.loads((Path(output) / "_control" / "lease.json").read_text())["released"]
    committed = outputs.versions(output)
    assert len(committed) < ROWS // UNIT_ROWS

    lines: list[str] = []
    second = submit(client, command, command=COMMAND)
    end = watch(client, second, lines.append, poll_seconds=0.2)

    assert second != first
    assert (end.succeeded, end.exit_code, end.message) == (True, 0, "")
    assert end.summary["units_skipped"] == len(committed)
    assert json.loads(lines[-1]) == end.summary
    assert outputs.shards(output) == outputs.shards(undisturbed[0])


@pytest.mark.parametrize(
    ("program", "exit_code", "final", "message", "failures"),
    [
        (f"{shlex.join(COMMAND)} --output x", 2, True, "--input is missing", 0),
        (
            """echo 'failed: {"source": "a", "reason": "b"}'; echo '{"run": "r", "status": "failed units"}'; echo late; exit 3""",
            3,
            True,
            "",
            1,
        ),
        ("exit 4", 4, True, "exit code 4", 0),
        ("exit 1", 1, False, "exit code 1", 0),
        ("kill -9 $$", -9, False, "exit code -9", 0),
    ],
    ids=["wrong option", "failed units", "busy", "crash", "killed"],
)
def test_ends_are_told_apart(program: str, exit_code: int, final: bool, message: str, failures: int, client: JobSubmissionClient) -> None:
    end = watch(client, client.submit_job(entrypoint=program), lambda _: None, poll_seconds=0.2)
    assert (end.status, end.exit_code, end.final, end.succeeded) == (JobStatus.FAILED, exit_code, final, False)
    assert message in end.message
    assert len(end.failures) == failures
    assert end.summary == ({"run": "r", "status": "failed units"} if failures else {})


def test_without_the_token_it_is_refused(server: JobServer) -> None:
    env = {**os.environ, **server.environment(), "RAY_AUTH_MODE": "disabled"}
    refused = subprocess.run([*RAY, "list"], env=env, capture_output=True, text=True, timeout=60)
    assert refused.returncode != 0
    assert "401" in refused.stderr + refused.stdout or "token" in refused.stderr
