"""Lance's Python library: an extra, loaded where it is needed, and told apart by what it raises."""

from __future__ import annotations

import errno
import os
import warnings
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from types import ModuleType
from typing import TypeVar

from embedding.errors import ConfigError, first_line

T = TypeVar("T")
VERSION = "2.1"
"""Of the file format: what Lance has written by default since its release 2 and readers of any later release know."""


@cache
def library() -> ModuleType:
    """The module `lance` with its parts `file` and `fragment`.

    Raises:
        ConfigError: it is not installed here.
    """
    try:
        import lance
        import lance.file
        import lance.fragment
    except ImportError as error:
        if not (error.name or "").startswith("lance"):
            raise
        raise ConfigError(
            "--output-format=lance needs pylance, which writes such files and is not installed here; pip install 'embed-corpus[lance]'"
        ) from error
    # What Ray forks becomes another program at once, and its workers are no forks of this process.
    warnings.filterwarnings("ignore", message="lance is not fork-safe", category=UserWarning)
    return lance


def pylance_version() -> str:
    """As it is installed here."""
    return version("pylance")


def call(action: Callable[[], T]) -> T:
    """The result of `action`.

    Raises:
        OSError: the disk is full, which Lance says in words alone.
        ValueError: Lance refuses, in whatever way: as an error of any kind, or as a panic of its Rust code, which is no Exception.
        MemoryError, KeyboardInterrupt, SystemExit: as they are.
    """
    try:
        return action()
    except (MemoryError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        if f"os error {errno.ENOSPC}" in str(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        raise ValueError(first_line(error)) from error
