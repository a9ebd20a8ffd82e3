"""The command line: the job as the shell asks for it; errors to one sentence and an exit code.

What takes long to import is imported by the functions, so that a signal that comes in the meantime is one of theirs.
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Never, TextIO

import embedding
from embedding.corpus import ending
from embedding.errors import ConfigError, EmbeddingJobError, ExitCode, Terminated, count

if TYPE_CHECKING:
    from embedding.config import JobConfig
    from embedding.run.summary import Summary

_CLEAN_UP_SECONDS = 1.2
"""After a signal, stores are waited for no longer than this."""
_END_SECONDS = 2.0
"""After a signal, the process is gone no later than this; a second is left for Ray, which lets signals through so often only."""
_SHOW_CURSOR = b"\x1b[?25h"
log = logging.getLogger(__name__)

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
    except KeyboardInterrupt:
        code = ExitCode.INTERRUPTED
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
    try:
        from embedding.run.progress import log_to_stderr

        log_to_stderr()
        return command()
    except EmbeddingJobError as error:
        from rich.console import Console

        Console(stderr=True).print(f"[red]error:[/red] {_escape(str(error))}", soft_wrap=True, highlight=False)
        return error.exit_code
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED


def _embed(argv: list[str]) -> int:
    config = parse(argv)
    if config is None:
        return ExitCode.COMPLETE
    from embedding.run.progress import OtherVoices, log_to_stderr

    log_to_stderr(logging.ERROR if config.quiet else logging.DEBUG if config.verbose else logging.INFO)
    if config.restart and not config.dry_run:
        _confirm_restart(config)
    stdout = sys.stdout
    with redirect_stdout(OtherVoices()):  # Ray prints its workers' troubles to stdout, which is the summary's alone
        return embedding.embed_corpus(config, on_end=partial(_report, stdout=stdout)).exit_code


def _report(summary: Summary, stdout: TextIO) -> None:
    """Failed units, and how to go on, to stderr; the plan of a dry run and, last, the one-line JSON to stdout."""
    from embedding.run.foretold import lines

    for failure in summary.failures:
        print(f"failed: {_told(failure)}", file=sys.stderr)
    if summary.status == "interrupted":
        committed = summary.rows_in + summary.rows_skipped
        log.info("stopped with %s committed; run the same command again to resume", count(committed, "row"))
    for line in lines(summary.plan) if summary.plan else ():
        print(line, file=stdout)
    print(summary.line(), file=stdout, flush=True)


def _told(failure: Mapping[str, object]) -> str:
    """A failed unit or file in one line; the source is named once, though most reasons begin with it."""
    source, first_row, reason = str(failure["source"]), failure["first_row"], " ".join(str(failure["reason"]).split())
    where = source if first_row is None else f"{source} from row {first_row}"
    if reason.startswith((f"{source} ", f"{source}: ")):
        return where + reason.removeprefix(source)
    return f"{where}: {reason}"


def parse(argv: list[str]) -> JobConfig | None:
    """The job's configuration; None where --help or --version was all that was asked.

    Raises:
        ConfigError: an option is unknown or its value is wrong.
    """
    from embedding.config import JobConfig
    from embedding.run.options import parse_as

    return parse_as(JobConfig, argv, name="embed_corpus.py", usage="--input PATH|URL... --output PATH|URL [OPTIONS]", description=_HELP)


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
