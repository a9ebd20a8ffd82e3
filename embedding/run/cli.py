"""The command line: options, configuration file and environment to one JobConfig; errors to one sentence and an exit code."""

from __future__ import annotations

import json
import signal
import sys
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Never, TextIO

import cyclopts.config
from cyclopts import App, Parameter
from cyclopts.exceptions import CycloptsError
from pydantic import ValidationError
from rich.console import Console

import embedding
from embedding.config import JobConfig, explain
from embedding.errors import ConfigError, EmbeddingJobError, ExitCode, Terminated
from embedding.run.progress import log_to_stderr

if TYPE_CHECKING:
    from embedding.run.summary import Summary

_HELP = " ".join(
    """Give every row of a Parquet corpus a vector, on one laptop or a thousand GPUs.
    Every option can also stand in a YAML file (--config; same names with underscores) or in the environment
    (EMBED_BATCH_TOKENS for --batch-tokens); the command line wins over the environment, the environment over the file.
    The last line on stdout is a JSON summary. Exit codes: 0 complete or nothing to do, 1 crashed (run it again),
    2 usage or configuration, 3 finished with failed units, 4 another run holds the output, 130/143 interrupted.""".split()
)


def main(argv: list[str] | None = None) -> Never:
    """Run the job as the shell asks for it; ends the process with one of ExitCode."""
    sys.exit(run(sys.argv[1:] if argv is None else argv))


def run(argv: list[str]) -> int:
    """The exit code for these arguments; the summary goes to stdout, everything else to stderr."""
    log_to_stderr()
    signal.signal(signal.SIGTERM, _terminate)
    try:
        config = parse(argv)
        if config is None:
            return ExitCode.COMPLETE
        if config.restart and not config.dry_run:
            _confirm_restart(config)
        stdout = sys.stdout
        with redirect_stdout(sys.stderr):  # Ray prints its workers' troubles to stdout, which is the summary's alone
            return embedding.embed_corpus(config, on_end=partial(_report, stdout=stdout)).exit_code
    except EmbeddingJobError as error:
        Console(stderr=True).print(f"[red]error:[/red] {_escape(str(error))}", soft_wrap=True, highlight=False)
        return error.exit_code
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED


def _report(summary: Summary, stdout: TextIO) -> None:
    """Failed units to stderr; the plan of a dry run and, last, the one-line JSON to stdout."""
    for failure in summary.failures:
        print(f"failed: {json.dumps(failure)}", file=sys.stderr)
    for key, value in summary.plan.items():
        print(f"{key:<20} {value}", file=stdout)
    print(summary.line(), file=stdout, flush=True)


def parse(argv: list[str]) -> JobConfig | None:
    """The configuration; None where --help or --version was all that was asked.

    Raises:
        ConfigError: an option is unknown or its value is wrong.
    """
    parsed: list[JobConfig] = []
    app = App(name="embed_corpus.py", help=_HELP, version=embedding.__version__, help_format="plaintext", result_action="return_value")

    @app.default
    def command(*, config: Annotated[JobConfig, Parameter(name="*")]) -> None:
        parsed.append(config)

    @app.meta.default
    def configured(
        *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
        config: Annotated[Path | None, Parameter(help="YAML file with any of the options below.")] = None,
    ) -> None:
        app.config = [cyclopts.config.Env("EMBED_", command=False)]
        if config is not None:
            app.config = [*app.config, cyclopts.config.Yaml(config, must_exist=True, search_parents=False)]
        app(tokens, exit_on_error=False, print_error=False)

    try:
        app.meta(argv, exit_on_error=False, print_error=False)
    except CycloptsError as error:
        raise ConfigError(_sentence(error)) from error
    except ValidationError as error:
        raise ConfigError(explain(error)) from None
    except FileNotFoundError as error:
        raise ConfigError(f"--config {error.filename or error} does not exist; check the path") from error
    return parsed[0] if parsed else None


def _sentence(error: CycloptsError) -> str:
    cause = error.__cause__
    if isinstance(cause, ValidationError):
        return explain(cause)
    return " ".join(str(error).split())


def _confirm_restart(config: JobConfig) -> None:
    if config.yes:
        return
    if not sys.stdin.isatty():
        raise ConfigError(f"--restart deletes everything in {config.output}; say --yes to allow it")
    answer = input(f"--restart deletes every shard in {config.output}. Type yes to go on: ")
    if answer.strip().lower() != "yes":
        raise ConfigError("--restart was not confirmed; nothing was deleted")


def _terminate(_signal: int, _frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough: a second must not cut the clean-up short
    raise Terminated


def _escape(text: str) -> str:
    return text.replace("[", r"\[")
