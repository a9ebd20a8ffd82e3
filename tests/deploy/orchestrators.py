"""The Airflow DAG and the Dagster asset on the real libraries and a real job server: `make test-deploy`, in an environment of its own.

Both pin more than this project's environment can hold beside its own dependencies, so the usual run of the tests does not collect this.
The cluster and the job run on the interpreter that NODE_PYTHON names, which has this package.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from airflow.sdk.exceptions import AirflowException, AirflowFailException

from deploy.airflow.embed_corpus_dag import EmbedCorpusOperator, dag
from deploy.dagster.embed_corpus_asset import EmbedCorpus, defs, vectors
from embedding.run import submission
from tests.deploy.job_server import job_server

REPOSITORY = Path(__file__).resolve().parents[2]
NODE_PYTHON = os.environ["NODE_PYTHON"]


@pytest.fixture(scope="module")
def server() -> Iterator[None]:
    """A cluster of which the environment of this process tells; without a token, for which Ray looks at its first use alone."""
    with job_server(NODE_PYTHON, asks_for_token=False) as started, pytest.MonkeyPatch.context() as patch:
        for name, value in started.environment().items():
            patch.setenv(name, value)
        yield


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes both examples submit this shell command instead of the job."""
    return lambda script: monkeypatch.setattr(submission.submit, "__kwdefaults__", {"command": ("bash", "-c", script), "runtime_env": None})


def options() -> list[list[str]]:
    [task] = dag.tasks
    return [task.arguments, defs.resources["embed_corpus"].arguments]


def test_both_ask_for_what_the_job_understands() -> None:
    """Where the job's own dependencies are."""
    script = "import sys; from embedding.run.cli import parse; print(repr(parse(sys.argv[1:])))"
    first, second = (subprocess.check_output([NODE_PYTHON, "-c", script, *arguments], text=True) for arguments in options())
    assert first == second
    assert first.startswith("JobConfig(")


def operator() -> EmbedCorpusOperator:
    return EmbedCorpusOperator(task_id="test", arguments=["--input", "x"])


SUCCESS = """echo '{"run": "r", "status": "complete", "rows_out": 3}'"""


@pytest.mark.usefixtures("server")
def test_airflow_returns_the_summary(program: Any) -> None:
    program(SUCCESS)
    assert operator().execute({})["rows_out"] == 3


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize(("code", "error"), [(1, AirflowException), (2, AirflowFailException), (3, AirflowFailException)])
def test_airflow_tries_again_after_a_crash_only(code: int, error: type[Exception], program: Any) -> None:
    program(f"exit {code}")
    with pytest.raises(AirflowException) as raised:
        operator().execute({})
    assert type(raised.value) is error


@pytest.mark.usefixtures("server")
def test_dagster_shows_the_summary(program: Any) -> None:
    program(SUCCESS)
    result = dg.materialize([vectors], resources={"embed_corpus": EmbedCorpus(arguments=["--input", "x"])})
    [made] = result.asset_materializations_for_node("vectors")
    assert made.metadata["rows_out"].value == 3


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize(("code", "retried"), [(1, True), (2, False)])
def test_dagster_tries_again_after_a_crash_only(code: int, retried: bool, program: Any) -> None:
    program(f"exit {code}")
    with pytest.raises(dg.Failure) as raised:
        EmbedCorpus(arguments=["--input", "x"]).run(dg.build_asset_context())
    assert raised.value.allow_retries == retried
