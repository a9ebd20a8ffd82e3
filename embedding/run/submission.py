"""The job on a Ray cluster, from outside of it: submit it, watch it, and learn how it ended. For schedulers such as Airflow and Dagster.

Imports neither torch nor the pipeline: besides this package without its dependencies, a scheduler needs ray[default], cyclopts and
tenacity. Address and token come from where Ray's own commands take them: RAY_API_SERVER_ADDRESS, RAY_AUTH_MODE and RAY_AUTH_TOKEN.
"""

from __future__ import annotations

import json
import logging
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ray.job_submission import JobStatus, JobSubmissionClient
from tenacity import retry, stop_after_delay, wait_fixed

from embedding.errors import ExitCode

log = logging.getLogger(__name__)

COMMAND = ("embed-corpus",)
"""The command where the nodes have this package installed; with a `working_dir`, ("python", "jobs/embed_corpus.py")."""
POLL_SECONDS = 5.0
_UNREACHABLE_SECONDS = 300
"""A job server may be gone for that long before watching it fails."""
_KEY = "embed-corpus-arguments"
"""Metadata of a submission by which a later try finds it."""


@dataclass(frozen=True)
class Ending:
    """How a submission ended."""

    submission_id: str
    status: str
    """Ray's word: SUCCEEDED, FAILED or STOPPED."""
    exit_code: int | None
    """The job's own; None where it was stopped, or its node died."""
    summary: dict[str, Any] = field(default_factory=dict)
    """The JSON of the last line of stdout; empty where the run did not come to have a plan."""
    failures: list[str] = field(default_factory=list)
    """The failed units and files, a line each: source, first row, reason."""
    message: str = ""
    """Why it did not succeed, in a sentence or a few."""

    @property
    def succeeded(self) -> bool:
        """Whether every row is embedded or rejected with its reason."""
        return self.status == JobStatus.SUCCEEDED

    @property
    def final(self) -> bool:
        """Whether a human has to look before it is run again: wrong options, failed units, another run, or stopped by hand."""
        return self.status == JobStatus.STOPPED or self.exit_code in (ExitCode.USAGE, ExitCode.FAILED_UNITS, ExitCode.OUTPUT_BUSY)


def submit(
    client: JobSubmissionClient,
    arguments: Sequence[str],
    *,
    command: Sequence[str] = COMMAND,
    runtime_env: Mapping[str, Any] | None = None,
) -> str:
    """The id of a submission of the job with these arguments: of one that is still alive, else of a new one.

    So a scheduler's second try, after its own worker died, goes on watching what the first one began.
    """
    key = shlex.join(arguments)
    for known in client.list_jobs():
        if known.submission_id and (known.metadata or {}).get(_KEY) == key and not known.status.is_terminal():
            log.info("%s is already running this job", known.submission_id)
            return known.submission_id
    entrypoint = shlex.join([*command, *arguments])
    return client.submit_job(entrypoint=entrypoint, runtime_env=dict(runtime_env or {}), metadata={_KEY: key})


def watch(client: JobSubmissionClient, submission_id: str, on_log: Callable[[str], None], *, poll_seconds: float = POLL_SECONDS) -> Ending:
    """Wait for the end; `on_log` gets each new line of the log.

    Raises:
        tenacity.RetryError: the job server did not answer for five minutes.
    """
    seen = 0
    while True:
        status = _asked(client.get_job_status, submission_id)
        lines = _asked(client.get_job_logs, submission_id).splitlines()
        for line in lines[seen:]:
            on_log(line)
        seen = len(lines)
        if status.is_terminal():
            return _ending(_asked(client.get_job_info, submission_id), lines)
        time.sleep(poll_seconds)


@retry(stop=stop_after_delay(_UNREACHABLE_SECONDS), wait=wait_fixed(POLL_SECONDS))
def _asked(question: Callable[[str], Any], submission_id: str) -> Any:
    return question(submission_id)


def _ending(details: Any, lines: Sequence[str]) -> Ending:
    """The log has stdout and stderr in one, so what is looked for may stand anywhere near its end."""
    objects = [found for line in lines if line.startswith("{") and "run" in (found := _object(line)) and "status" in found]
    error = next((line for line in reversed(lines) if line.startswith("error: ")), None)
    return Ending(
        submission_id=details.submission_id,
        status=str(details.status),
        exit_code=details.driver_exit_code,
        summary=objects[-1] if objects else {},
        failures=[line.removeprefix("failed: ") for line in lines if line.startswith("failed: ")],
        message="" if details.status == JobStatus.SUCCEEDED else error or details.message or str(details.status),
    )


def _object(line: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
