"""The command line: options, configuration file and environment to one JobConfig; errors to one sentence and an exit code."""

from __future__ import annotations

import atexit
import json
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Literal, Never, TextIO, TypeAlias, TypeVar

import cyclopts.config
import yaml
from cyclopts import App, Group, Parameter
from cyclopts.exceptions import CycloptsError, MissingArgumentError
from pydantic import BaseModel, ValidationError
from rich.console import Console

import embedding
from embedding.config import JobConfig
from embedding.corpus import ending
from embedding.errors import ConfigError, EmbeddingJobError, ExitCode, Terminated, count, explain, missing
from embedding.run.foretold import lines
from embedding.run.progress import OtherVoices, log_to_stderr

if TYPE_CHECKING:
    from embedding.run.summary import Summary

_CLEAN_UP_SECONDS = 1.2
"""After a signal, stores are waited for no longer than this."""
_END_SECONDS = 2.0
"""After a signal, the process is gone no later than this; a second is left for Ray, which lets signals through so often only."""
_FILE_GROUP, _HELP_GROUP = Group("Configuration", sort_key=10), Group("Help", sort_key=11)
_SHOW_CURSOR = b"\x1b[?25h"
log = logging.getLogger(__name__)
Config = TypeVar("Config", bound=BaseModel)
Shell: TypeAlias = Literal["zsh", "bash", "fish", "powershell"]

_HELP = " ".join(
    """Give every row of a text corpus an embedding vector, on one laptop or a thousand GPUs.
    Every option can also be set in a YAML file (--config; same names with underscores) or in the environment
    (EMBED_BATCH_TOKENS for --batch-tokens); the command line overrides the environment, which overrides the file.
    The last line on stdout is a JSON summary. Exit codes: 0 complete or nothing to do, 1 crashed (run it again),
    2 wrong usage or configuration, 3 finished with failed units, 4 another run holds the output, 130/143 interrupted.""".split()
)


def main(argv: list[str] | None = None) -> Never:
    """Run the job as the shell asks for it; ends the process with one of ExitCode."""
    end_with(partial(run, sys.argv[1:] if argv is None else argv))


def end_with(command: Callable[[], int]) -> Never:
    """Run the command to its end, to a quick and clean one where a signal asks for it; ends the process with one of ExitCode."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)
    try:
        code = command()
    except Terminated:
        code = ExitCode.TERMINATED
    in_haste = ending.asked.is_set() or code == ExitCode.OUTPUT_BUSY  # all is cleaned up, and Ray's goodbye may take long or fail
    if not in_haste:
        atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # Python would take a second more to take apart what the kernel frees at once


def run(argv: list[str]) -> int:
    """The exit code for these arguments; the summary goes to stdout, everything else to stderr."""
    return answer(partial(_embed, argv))


def answer(command: Callable[[], int]) -> int:
    """The command's exit code, or that of the error it raises, which is told in one sentence."""
    log_to_stderr()
    try:
        return command()
    except EmbeddingJobError as error:
        Console(stderr=True).print(f"[red]error:[/red] {_escape(str(error))}", soft_wrap=True, highlight=False)
        return error.exit_code
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED


def _embed(argv: list[str]) -> int:
    config = parse(argv)
    if config is None:
        return ExitCode.COMPLETE
    log_to_stderr(logging.ERROR if config.quiet else logging.DEBUG if config.verbose else logging.INFO)
    if config.restart and not config.dry_run:
        _confirm_restart(config)
    stdout = sys.stdout
    with redirect_stdout(OtherVoices()):  # Ray prints its workers' troubles to stdout, which is the summary's alone
        return embedding.embed_corpus(config, on_end=partial(_report, stdout=stdout)).exit_code


def _report(summary: Summary, stdout: TextIO) -> None:
    """Failed units, and how to go on, to stderr; the plan of a dry run and, last, the one-line JSON to stdout."""
    for failure in summary.failures:
        print(f"failed: {json.dumps(failure)}", file=sys.stderr)
    if summary.status == "interrupted":
        committed = summary.rows_in + summary.rows_skipped
        log.info("stopped with %s committed; run the same command again to resume", count(committed, "row"))
    for line in lines(summary.plan) if summary.plan else ():
        print(line, file=stdout)
    print(summary.line(), file=stdout, flush=True)


def parse(argv: list[str]) -> JobConfig | None:
    """The job's configuration; None where --help or --version was all that was asked.

    Raises:
        ConfigError: an option is unknown or its value is wrong.
    """
    return parse_as(JobConfig, argv, name="embed_corpus.py", usage="--input PATH|URL... --output PATH|URL [OPTIONS]", description=_HELP)


class _App(App):
    def generate_completion(self, *, prog_name: str | None = None, shell: Shell | None = None) -> str:
        """Options whose values nobody can list are offered files: input, output and model are folders more often than not.

        The condition of fish's lines, that no word has been a command yet, would end completion at the first value of an option.
        """
        script: str = super().generate_completion(prog_name=prog_name, shell=shell)
        script = re.sub(r"^complete -F ", "complete -o default -F ", script, flags=re.MULTILINE)  # bash
        script = script.replace(" -n __fish_use_subcommand", "")
        return re.sub(r"(\]:[\w-]+)' \\$", r"\1:_files' \\", script, flags=re.MULTILINE)  # zsh


def parse_as(kind: type[Config], argv: list[str], *, name: str, usage: str, description: str, positional: bool = False) -> Config | None:
    """The configuration of that kind; None where --help or --version was all that was asked.

    `positional`: fields that are not keyword-only can also be given without their option's name.

    Raises:
        ConfigError: an option is unknown or its value is wrong.
    """
    parsed: list[Config] = []
    installed = name.removesuffix(".py").replace("_", "-")
    is_installed = Path(sys.argv[0]).name == installed
    app = _App(
        name=installed if is_installed else name,
        usage=f"Usage: {installed if is_installed else name} {usage}",
        help=description,
        version=embedding.__version__,
        help_format="plaintext",
        result_action="return_value",
        group_commands=_HELP_GROUP,
    )
    if is_installed:  # shells complete the names of programs, not those of scripts that python is given
        app.register_install_completion_command(help="Install completion of the options for bash, zsh or fish.")

    def command(*, config: Config) -> None:
        parsed.append(config)

    def with_arguments(config: Config) -> None:
        command(config=config)

    chosen = with_arguments if positional else command
    chosen.__annotations__["config"] = Annotated[kind, Parameter(name="*")]
    app.default(chosen)

    @app.meta.default
    def configured(
        *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
        config: Annotated[Path | None, Parameter(help="YAML file with any of these options.", group=_FILE_GROUP, metavar="PATH")] = None,
    ) -> None:
        from_file = [] if config is None else [cyclopts.config.Dict(read_options(config, kind.model_fields), source=str(config))]
        app.config = [cyclopts.config.Env("EMBED_", command=False), *from_file]
        app(tokens, exit_on_error=False, print_error=False)

    try:
        app.meta(argv, exit_on_error=False, print_error=False)
    except MissingArgumentError as error:  # not the cause where another option has its name wrong
        raise ConfigError(_mistyped(argv, kind.model_fields) or _sentence(error)) from error
    except CycloptsError as error:
        raise ConfigError(_sentence(error)) from error
    except ValidationError as error:
        raise ConfigError(explain(error)) from None
    return parsed[0] if parsed else None


def read_options(file: Path, known: Iterable[str] = tuple(JobConfig.model_fields)) -> dict[str, object]:
    """The options of a YAML file, every value as it is written there: YAML's own types would make 63 of `workers: 1:3`.

    A key without a value, or with null, counts as not given.

    Raises:
        ConfigError: there is no such file, it is no YAML mapping, or a key is no option.
    """
    try:
        content = yaml.load(file.read_text(), Loader=yaml.BaseLoader)
    except (OSError, UnicodeDecodeError) as error:
        reason = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
        raise ConfigError(f"--config {file} {reason}; check the path") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {file} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"--config {file} must contain one option per line, such as `batch_tokens: 4096`")
    for key in content.keys() - set(known):
        close = get_close_matches(key, known, n=1)
        raise ConfigError(
            f"--config {file}: {key!r} is not an option{f'; did you mean {close[0]!r}?' if close else '; --help lists them all'}"
        )
    return {key: value for key, value in content.items() if value not in ("", "null", "~")}


def _mistyped(argv: Iterable[str], fields: Iterable[str]) -> str:
    """The sentence for the first argument that looks like an option and is none, else empty."""
    known = ["--config", *(f"--{field.replace('_', '-')}" for field in fields)]
    for name in (argument.partition("=")[0] for argument in argv if argument.startswith("--")):
        if name not in known:
            close = get_close_matches(name, known, n=1)
            return f"Unknown option: {name}." + (f" Did you mean {close[0]}?" if close else " --help lists them all.")
    return ""


def _sentence(error: CycloptsError) -> str:
    if isinstance(error, MissingArgumentError) and error.argument is not None:
        return missing(error.argument.name.removeprefix("--").replace("-", "_"))
    cause = error.__cause__
    if isinstance(cause, ValidationError):
        return explain(cause)
    return " ".join(str(error).split())


def _confirm_restart(config: JobConfig) -> None:
    if config.yes:
        return
    if not sys.stdin.isatty():
        raise ConfigError(f"--restart deletes everything in {config.output}; add --yes to allow it")
    answer = input(f"--restart deletes every shard in {config.output}. Type yes to continue: ")
    if answer.strip().lower() != "yes":
        raise ConfigError("--restart was not confirmed; nothing was deleted")


def _stop(number: int, _frame: FrameType | None) -> None:
    """Let the run clean up and end: within 3 s, after which `ray job stop` kills it, whatever a store or a library does."""
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, signal.SIG_IGN)  # once is enough: a second must not cut the clean-up short
    ending.end_within(_CLEAN_UP_SECONDS)
    last_resort = threading.Timer(_END_SECONDS, _end_at_once, [128 + number])
    last_resort.daemon = True
    last_resort.start()
    raise KeyboardInterrupt if number == signal.SIGINT else Terminated


def _end_at_once(code: int) -> None:
    """End without any clean-up but for the cursor, which a view that could not be closed has hidden."""
    if sys.__stderr__ is not None and sys.__stderr__.isatty():
        os.write(sys.__stderr__.fileno(), _SHOW_CURSOR)
    os._exit(code)


def _escape(text: str) -> str:
    return text.replace("[", r"\[")
