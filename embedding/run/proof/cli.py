"""The command line of the proof: options to one VerifyConfig, what was found to stdout and an exit code."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from functools import partial
from typing import TYPE_CHECKING, Never

from embedding.errors import ExitCode
from embedding.run.cli import answer, end_with

if TYPE_CHECKING:
    from embedding.run.proof.config import VerifyConfig
    from embedding.run.proof.result import Proof

_HELP = " ".join(
    """Verify an output of embed_corpus.py: read every shard, compare it with its source, and embed a sample again. Without --repair,
    nothing is written to the output. Every option can also be set in a YAML file (--config) or in the environment (EMBED_SAMPLE for
    --sample). The last line on stdout is a JSON summary; the verdict and what is wrong go to stderr. Exit codes: 0 proved,
    1 crashed (nothing is proved), 2 wrong usage or configuration, 3 not proved, 4 --repair met a run, 130/143 interrupted.""".split()
)


def main(argv: list[str] | None = None) -> Never:
    """Prove an output as the shell asks for it; ends the process with one of ExitCode."""
    end_with(partial(answer, partial(_verify, sys.argv[1:] if argv is None else argv)))


def parse(argv: list[str]) -> VerifyConfig | None:
    """The configuration; None where --help or --version was all that was asked.

    Raises:
        ConfigError: an option is unknown or its value is wrong.
    """
    from embedding.run.options import parse_as
    from embedding.run.proof.config import VerifyConfig

    return parse_as(VerifyConfig, argv, name="verify_corpus.py", usage="OUTPUT [OPTIONS]", description=_HELP, positional=True)


def _verify(argv: list[str]) -> int:
    config = parse(argv)
    if config is None:
        return ExitCode.COMPLETE
    from embedding.run.progress import OtherVoices
    from embedding.run.proof.verify import verify_corpus  # Ray and more, which --help and a wrong option need not wait for

    stdout = sys.stdout

    def report(proof: Proof) -> None:
        print(proof.verdict, file=sys.stderr)
        print(proof.line(), file=stdout, flush=True)

    with redirect_stdout(OtherVoices()):  # Ray prints its workers' troubles to stdout, which is the summary's alone
        return verify_corpus(config, on_end=report).exit_code
