"""The Ray cluster of a run: which one, and how it is connected without noise."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import ray
import ray.data

from embedding.corpus import ending
from embedding.errors import ClusterError, ConfigError, LeaseLostError, count, first_line
from embedding.model.host import available_cpus
from embedding.run.placement import this_machine

log = logging.getLogger(__name__)

_KNOCK_SECONDS = 10.0
_GREETING = b"Set ray log level from environment variable"


class Cluster:
    """The Ray cluster of a run, connected when it is first needed: the one at RAY_ADDRESS, one already connected, or an embedded one.

    A context manager: at its end, what it connected is let go. One that is only `looked_at` is connected where it runs already, and
    else this machine stands for it.
    """

    def __init__(self, *, looked_at: bool = False) -> None:
        self._looked_at = looked_at
        self._ours = False
        self._embedded = False

    @property
    def is_here(self) -> bool:
        """Whether it is, or would be, embedded: on this machine, for this run."""
        return self._embedded or not (ray.is_initialized() or os.environ.get("RAY_ADDRESS"))

    def nodes(self) -> list[dict[str, float]]:
        """The Ray resources of each node that lives."""
        if self._looked_at and self.is_here:
            return [this_machine()]
        if not ray.is_initialized():
            self._connect()
        return [node["Resources"] for node in ray.nodes() if node["Alive"]]

    def _connect(self) -> None:
        """An embedded cluster gets a CPU more than the machine has, for the reads beside a worker that holds them all."""
        quiet_ray()
        options: dict[str, Any] = {"logging_level": logging.CRITICAL, "log_to_driver": False}
        address = os.environ.get("RAY_ADDRESS", "")
        if not address:
            cpus = available_cpus()
            log.info("starting Ray on this machine with %s (set RAY_ADDRESS to use a running cluster)", count(cpus, "CPU"))
            options |= {"address": "local", "num_cpus": cpus + 1, "include_dashboard": False}
            self._embedded = True
        with _own_sigterm(), _joining(address), _without_greeting():
            ray.init(**options)
        self._ours = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        in_haste = ending.asked.is_set() or kind is LeaseLostError  # that meets a process which was suspended; Ray's part may be broken
        if self._ours and (self._embedded or not in_haste):  # a cluster that goes on notices by itself when a driver ends
            ray.shutdown()


@contextmanager
def _joining(address: str) -> Iterator[None]:
    """What Ray raises where it cannot join the cluster at `address`, as one sentence, and soon: Ray knocks at a closed port for minutes.

    Raises:
        ConfigError: it is no address of a cluster.
        ClusterError: the cluster cannot be joined now.
    """
    host, _, port = address.rpartition(":")
    remedy = "or unset it to run on this machine"
    try:
        if port.isdecimal() and "/" not in host:
            socket.create_connection((host.strip("[]"), int(port)), _KNOCK_SECONDS).close()
        yield
    except ValueError as error:
        if not address:
            raise
        what = f"RAY_ADDRESS={address} is not the address of a Ray cluster"
        raise ConfigError(f"{what}; set it to the head's host and port, such as head:6379, {remedy}") from error
    except (OSError, RuntimeError) as error:
        if not address:
            raise
        raise ClusterError(f"joining the Ray cluster at RAY_ADDRESS={address} failed: {first_line(error)}; check it, {remedy}") from error


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Connecting installs Ray's own SIGTERM handlers, in C++ one that aborts the process; put back what was there."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


@contextmanager
def _without_greeting() -> Iterator[None]:
    """Ray's C++ side says at each connect, on stderr itself, at what level it logs; all else that it says comes a moment later.

    Where it fails, its exception says why, and the rest is left out.
    """
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as said:
        os.dup2(said.fileno(), 2)
        try:
            yield
        except BaseException:
            said.truncate(0)
            raise
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            said.seek(0)
            for line in said:
                if _GREETING not in line:
                    os.write(2, line)


def quiet_ray() -> None:
    """Ray's own progress and notices off: the job reports for itself. Ray's log files keep what its Python side says."""
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    for name in ("ray.data", "ray"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
