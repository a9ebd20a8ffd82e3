"""`ray job submit` on real job servers whose nodes have the dependencies but not the package, with a token and without: a working
directory, a wheel, readable logs, a stop, a resumption, and ends told apart.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.job_submission import JobStatus, JobSubmissionClient

import embedding
from embedding.run.submission import submit, watch
from tests.deploy.job_server import JobServer, bare_python, job_server
from tests.model.tiny import save_model
from tests.support import corpora, outputs
from tests.support.job import LOG_LINE, REPOSITORY, SCRIPT
from tests.support.waiting import wait_until

ROWS, UNIT_ROWS = 600, 3
COMMAND = ("python", "jobs/embed_corpus.py")
RAY = [sys.executable, "-m", "ray.scripts.scripts", "job"]
FAILED_UNITS = """echo 'failed: s3://a from row 0: b'; echo '{"run": "r", "status": "failed units"}'; echo late; exit 3"""
FROM_RAY = r"[-\d]+ [:,\d]+\s+INFO (cli|job_manager)\.py:\d+ -- .*|Running entrypoint for job .*"
PROGRESS = r".* of [\d,]+ rows \(\d+%\), [\d,]+ rows/s, [\d,]+ tokens/s, \d+ units? failed, ETA (unknown|\d+:\d\d:\d\d), .*"


@pytest.fixture(scope="module")
def node_python(tmp_path_factory: pytest.TempPathFactory) -> str:
    python = bare_python(tmp_path_factory.mktemp("nodes"))
    missing = subprocess.run([python, "-c", "import ray, torch, embedding"], capture_output=True, text=True, cwd="/", check=False)
    assert "No module named 'embedding'" in missing.stderr
    return python


@pytest.fixture(scope="module")
def server(node_python: str) -> Iterator[JobServer]:
    with job_server(node_python) as started:
        yield started


@pytest.fixture(scope="module")
def open_server(node_python: str) -> Iterator[JobServer]:
    """One that asks for no token."""
    with job_server(node_python, asks_for_token=False) as started:
        yield started


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What of a clone the job needs; Ray leaves out what git ignores, but this clone's other files would be sent too."""
    folder = tmp_path_factory.mktemp("clone")
    for part in ("embedding", "jobs"):
        shutil.copytree(REPOSITORY / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


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
def undisturbed(arguments: list[str], server: JobServer, clone: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[str]]:
    """The output of README's command, `ray job submit --working-dir .`, and what `ray job logs` shows of it."""
    output = str(tmp_path_factory.mktemp("output") / "vectors")
    submitted = ["--working-dir", ".", "--", *COMMAND, *arguments, "--output", output]
    return output, logs_of("undisturbed", server, submitted, cwd=clone)


def logs_of(name: str, server: JobServer, submitted: list[str], cwd: Path) -> list[str]:
    """Submit as a user does, wait for the end, and give the lines of `ray job logs`."""
    env = {**os.environ, **server.environment()}
    run = subprocess.run(
        [*RAY, "submit", "--submission-id", name, *submitted], cwd=cwd, env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    logs = subprocess.run([*RAY, "logs", name], env=env, check=True, capture_output=True, text=True, timeout=60).stdout
    return logs.splitlines()


def rest_of(lines: list[str]) -> list[str]:
    """Lines that are neither a message of ours nor one of the few that Ray's job server writes itself."""
    return [line for line in lines if line and not re.fullmatch(f"{LOG_LINE}|{FROM_RAY}", line)]


def test_a_working_directory_is_all_that_workers_need(undisturbed: tuple[str, list[str]]) -> None:
    assert len(outputs.control(undisturbed[0], "records")) == ROWS // UNIT_ROWS


def test_the_log_is_readable(undisturbed: tuple[str, list[str]]) -> None:
    lines = undisturbed[1]
    summary = json.loads(lines[-1])
    assert (summary["status"], summary["rows_out"]) == ("complete", ROWS)
    assert rest_of(lines) == lines[-1:], "\n".join(rest_of(lines))
    assert len(lines) < 40
    assert any(re.fullmatch(PROGRESS, line) for line in lines)
    assert any(f"{ROWS} of {ROWS} rows (100%)" in line for line in lines)


def test_a_wheel_on_a_cluster_without_a_token(
    arguments: list[str], open_server: JobServer, undisturbed: tuple[str, list[str]], tmp_path: Path
) -> None:
    """The wheel has a version of its own, by which its code is known in the output."""
    built = tmp_path / "source"
    shutil.copytree(REPOSITORY / "embedding", built / "embedding", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, built)
    front = built / "embedding" / "__init__.py"
    front.write_text(front.read_text().replace(f'"{embedding.__version__}"', f'"{embedding.__version__}+wheel"'))
    wheels, output = tmp_path / "wheels", str(tmp_path / "vectors")
    build = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--wheel-dir", str(wheels)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *build, str(built)], check=True, timeout=120)
    [wheel] = wheels.iterdir()
    environment = tmp_path / "environment.yaml"
    environment.write_text(f"working_dir: {wheels}\npip: ['${{RAY_RUNTIME_ENV_CREATE_WORKING_DIR}}/{wheel.name}']\n")

    submitted = ["--runtime-env", str(environment), "--", "embed-corpus", *arguments, "--output", output]
    lines = logs_of("wheel", open_server, submitted, cwd=tmp_path)

    assert json.loads(lines[-1])["status"] == "complete"
    assert rest_of(lines) == lines[-1:]
    assert outputs.document(output, "_control/job.json")["versions"]["embed-corpus"] == f"{embedding.__version__}+wheel"
    assert outputs.table(output).equals(outputs.table(undisturbed[0]))


def test_a_stopped_run_lets_go_and_the_next_one_resumes(
    arguments: list[str], undisturbed: tuple[str, list[str]], clone: Path, client: JobSubmissionClient, tmp_path: Path
) -> None:
    output = str(tmp_path / "vectors")
    command = [*arguments, "--output", output, "--lease-seconds", "600"]  # a run that had to wait for the lease would be seen
    sent = {"working_dir": str(clone)}
    first = submit(client, command, command=COMMAND, runtime_env=sent)
    wait_until(lambda: len(outputs.versions(output)) >= 5, what="shards", seconds=120)
    assert submit(client, command, command=COMMAND, runtime_env=sent) == first  # a scheduler's second try finds the first one's
    client.stop_job(first)
    end = watch(client, first, lambda _: None, poll_seconds=0.2)
    assert (end.status, end.succeeded, end.final) == (JobStatus.STOPPED, False, True)
    assert json.loads((Path(output) / "_control" / "lease.json").read_text())["released"]
    committed = outputs.versions(output)
    assert len(committed) < ROWS // UNIT_ROWS

    lines: list[str] = []
    second = submit(client, command, command=COMMAND, runtime_env=sent)
    end = watch(client, second, lines.append, poll_seconds=0.2)

    assert second != first
    assert (end.succeeded, end.exit_code, end.message) == (True, 0, "")
    assert end.summary["units_skipped"] == len(committed)
    assert json.loads(lines[-1]) == end.summary
    assert outputs.shards(output) == outputs.shards(undisturbed[0])


@pytest.mark.parametrize(
    ("program", "exit_code", "final", "message", "failures"),
    [
        (f"{shlex.join([sys.executable, str(SCRIPT)])} --output x", 2, True, "--input is missing", []),
        (FAILED_UNITS, 3, True, "", ["s3://a from row 0: b"]),
        ("exit 4", 4, True, "exit code 4", []),
        ("exit 1", 1, False, "exit code 1", []),
        ("kill -9 $$", -9, False, "exit code -9", []),
    ],
    ids=["wrong option", "failed units", "busy", "crash", "killed"],
)
def test_ends_are_told_apart(
    program: str, exit_code: int, final: bool, message: str, failures: list[str], client: JobSubmissionClient
) -> None:
    end = watch(client, client.submit_job(entrypoint=program), lambda _: None, poll_seconds=0.2)
    assert (end.status, end.exit_code, end.final, end.succeeded) == (JobStatus.FAILED, exit_code, final, False)
    assert message in end.message
    assert end.failures == failures
    assert end.summary == ({"run": "r", "status": "failed units"} if failures else {})


def test_without_the_token_it_is_refused(server: JobServer) -> None:
    env = {**os.environ, **server.environment(), "RAY_AUTH_MODE": "disabled"}
    refused = subprocess.run([*RAY, "list"], env=env, capture_output=True, text=True, timeout=60)
    assert refused.returncode != 0
    assert "401" in refused.stderr + refused.stdout or "token" in refused.stderr
