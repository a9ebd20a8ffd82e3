"""The error tree and the exit codes of the job.

Every error a user can meet is one sentence: the value, the rule it breaks, and the remedy.
"""

from __future__ import annotations

from enum import IntEnum
from typing import ClassVar


class ExitCode(IntEnum):
    """What the process answers to the shell, the pipeline or the cluster scheduler."""

    COMPLETE = 0
    """Every row is embedded or rejected with its reason, or there was nothing to do."""
    CRASHED = 1
    """Something outside the job broke; running the same command again resumes."""
    USAGE = 2
    """An option, the configuration, the corpus or the model is wrong; running again will not help."""
    FAILED_UNITS = 3
    """The run finished, but some units or source files failed; running again retries just those."""
    OUTPUT_BUSY = 4
    """Another run holds the output."""
    INTERRUPTED = 130
    """Stopped by Ctrl-C (128 + SIGINT)."""
    TERMINATED = 143
    """Stopped by SIGTERM (128 + SIGTERM), as `ray job stop` and cluster schedulers send it."""


class EmbeddingJobError(Exception):
    """Base of every error of this package; its text is meant for the user."""

    exit_code: ClassVar[ExitCode] = ExitCode.CRASHED


class ConfigError(EmbeddingJobError):
    """An option is wrong, or does not fit the others or the output."""

    exit_code = ExitCode.USAGE


class ModelError(ConfigError):
    """The model cannot be found, loaded or used as an encoder."""


class ModelUnreachableError(EmbeddingJobError):
    """The model cannot be fetched now, such as from a hub that does not answer; running again can help."""


class ClusterError(EmbeddingJobError):
    """The Ray cluster cannot be joined now."""


class CorpusError(ConfigError):
    """The corpus as a whole cannot be used: nothing matched, a column is missing or is not text."""


class AccessError(ConfigError):
    """A store refuses this process: credentials are missing, wrong or expired, or a permission is."""


class SettingsChangedError(ConfigError):
    """The output was begun with other settings that shape its vectors or columns."""


class OutputBusyError(EmbeddingJobError):
    """Another run holds the lease of the output."""

    exit_code = ExitCode.OUTPUT_BUSY


class LeaseLostError(OutputBusyError):
    """The lease of this run was taken over by another one; this run must do nothing more."""


class StorageError(EmbeddingJobError):
    """A store kept failing after all retries."""


class StorageFullError(StorageError):
    """A store has no room left."""


class SourceError(EmbeddingJobError):
    """One source file cannot be read; only its units fail."""


class BadRowsError(EmbeddingJobError):
    """A unit has rows that cannot be embedded, and the job was told to fail it then; trying again will not help."""


class SourceChangedError(SourceError):
    """A source file was replaced after it was listed; its units must be planned again."""


class Terminated(SystemExit):
    """Raised in the main thread when SIGTERM arrives, so that the run lets go of the output before it ends."""

    def __init__(self) -> None:
        super().__init__(int(ExitCode.TERMINATED))


def first_line(error: BaseException) -> str:
    """The first line of an error from a library, or its type if it says nothing: the rest seldom helps a user."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def count(number: int, noun: str) -> str:
    """3 rows, 1 row."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
