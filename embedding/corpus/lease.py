"""One run at a time on an output: a lease renewed by conditional puts, taken over when its holder shows no sign of life.

Protocol, after the leases of distributed lock services, but without comparing clocks of different machines: the holder
changes the object every few seconds; whoever finds it unchanged for the holder's time-to-live, measured on its own
monotonic clock, may replace exactly the version it saw. Replacing is a conditional put, so one taker wins. A holder that
was suspended and wakes up finds its version gone and stops.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import threading
import time
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from embedding.corpus.ending import seconds_left
from embedding.corpus.storage import TEMPORARY, Storage
from embedding.errors import ConfigError, EmbeddingJobError, LeaseLostError, OutputBusyError

log = logging.getLogger(__name__)

LEASE = "_control/lease.json"
_RENEWALS_PER_LIFE = 6
_LOOKS_PER_LIFE = 30


@dataclass(frozen=True, slots=True)
class _Holder:
    """What the lease object says."""

    owner: str
    """Random token of the holding run: tells our own put from another's when a reply was lost."""
    run: str
    host: str
    process: str
    """Identity of the holder's process, so that the same machine can see that it is dead."""
    since: str
    seconds: float
    renewals: int = 0
    released: bool = False

    def encode(self) -> bytes:
        return json.dumps(asdict(self), indent=1).encode()

    @classmethod
    def read(cls, storage: Storage) -> tuple[_Holder, str] | None:
        """What the lease object says, and its version; None where there is none.

        Raises:
            ConfigError: it is damaged.
        """
        seen = storage.read_version(LEASE)
        if seen is None:
            return None
        try:
            return cls(**json.loads(seen[0])), seen[1]
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{storage.url}/{LEASE} is damaged ({error!r}); delete it if no run is using this output") from error


class Lease:
    """Held from `acquire` to `release`, renewed by a thread in between; a context manager."""

    def __init__(self, storage: Storage, holder: _Holder) -> None:
        self._storage = storage
        self._holder = holder
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._lost = False
        self._renewed_at = time.monotonic()
        self._thread = threading.Thread(target=self._keep_renewing, name="lease", daemon=True)
        self._thread.start()

    @classmethod
    def acquire(cls, storage: Storage, run_id: str, seconds: float) -> Self:
        """Take the lease of the output.

        Raises:
            OutputBusyError: another run holds it and is alive.
            ConfigError: the lease object is damaged, or the output cannot be written.
        """
        if not storage.honours_conditional_puts(f"{TEMPORARY}/probe-{secrets.token_hex(8)}"):
            log.warning(
                "%s ignores conditional puts, so two runs at once would not notice each other; make sure there is only one", storage.url
            )
        holder = _Holder(
            owner=secrets.token_hex(8),
            run=run_id,
            host=socket.gethostname(),
            process=process_identity(),
            since=datetime.now(UTC).isoformat(timespec="seconds"),
            seconds=seconds,
        )
        while not storage.put_if_absent(LEASE, holder.encode()):
            seen = _Holder.read(storage)
            if seen is None:
                continue
            other, version = seen
            if not other.released and _process_alive(other.process) is not False:
                _wait_for_silence(storage, other, version)
            if storage.put_if_version(LEASE, holder.encode(), version):
                if not other.released:
                    log.warning("run %s on %s died while it held the output; this run takes over", other.run, other.host)
                break
        return cls(storage, holder)

    @staticmethod
    def require_free(storage: Storage) -> None:
        """Look whether the output could be taken, without taking it.

        Raises:
            OutputBusyError: another run holds it and is alive; for one of another machine this takes a moment of watching.
            ConfigError: the lease object is damaged.
        """
        seen = _Holder.read(storage)
        if seen is None or seen[0].released:
            return
        alive = _process_alive(seen[0].process)
        if alive:
            raise _busy(storage, seen[0])
        if alive is None:
            _wait_for_silence(storage, *seen)

    def check(self) -> None:
        """Make sure that the lease is still held, asking the store only when it was not renewed in time.

        Raises:
            LeaseLostError: another run took it over.
        """
        if not self._lost and time.monotonic() - self._renewed_at > self._holder.seconds:
            self.renew()
        if self._lost:
            raise LeaseLostError(f"{self._storage.url} was taken over by another run while this one showed no sign of life; this run stops")

    def renew(self) -> None:
        """Change the lease object, so that others see this run alive; call before anything that another run must not meet.

        Raises:
            LeaseLostError: another run took it over.
        """
        with self._lock:
            if not self._lost:
                self._replace(replace(self._holder, renewals=self._holder.renewals + 1))
        if self._lost:
            self.check()

    def release(self) -> None:
        """Let the next run begin at once. Does nothing where the lease is lost; a store that fails does not undo what the run did."""
        self._stopped.set()
        self._thread.join(seconds_left())
        if self._thread.is_alive():  # in a request that the store does not answer, while this process has to end
            log.warning("could not release the lease, so the next run will wait %.0f s: the store does not answer", self._holder.seconds)
            return
        try:
            with self._lock:
                if not self._lost:
                    self._replace(replace(self._holder, released=True))
        except EmbeddingJobError as error:
            log.warning("could not release the lease, so the next run will wait %.0f s: %s", self._holder.seconds, error)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()

    def _replace(self, holder: _Holder) -> None:
        began = time.monotonic()  # others may see the change from now on, however late the answer comes
        seen = _Holder.read(self._storage)
        ours = seen is not None and seen[0].owner == holder.owner
        if seen is not None and ours and self._storage.put_if_version(LEASE, holder.encode(), seen[1]):
            self._holder = holder
            self._renewed_at = began
        else:
            self._lost = True

    def _keep_renewing(self) -> None:
        while not self._stopped.wait(self._holder.seconds / _RENEWALS_PER_LIFE):
            try:
                self.renew()
            except LeaseLostError:
                return  # `check` tells the main thread
            except EmbeddingJobError as error:
                log.warning("could not renew the lease, trying again: %s", error)


def _wait_for_silence(storage: Storage, other: _Holder, version: str) -> None:
    """Return when the lease stayed as it is for its time-to-live, or was given back meanwhile.

    Raises:
        OutputBusyError: it changed, so its holder is alive.
    """
    log.info("run %s on %s holds the output; watching for up to %.0f s to see whether it is alive", other.run, other.host, other.seconds)
    deadline = time.monotonic() + other.seconds
    while time.monotonic() < deadline:
        time.sleep(other.seconds / _LOOKS_PER_LIFE)  # a look at intervals: a store cannot notify
        seen = _Holder.read(storage)
        if seen is None or seen[0].released:
            return
        now = seen[0]
        if seen[1] != version:
            raise _busy(storage, now)


def _busy(storage: Storage, holder: _Holder) -> OutputBusyError:
    held = f"{storage.url} is held by run {holder.run} on {holder.host} since {holder.since}"
    return OutputBusyError(f"{held}; wait for it to end, stop it, or choose another output")


def process_identity() -> str:
    """Names this process uniquely on this machine, its boot and its process namespace; empty where the system cannot tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = Path("/proc/self/ns/pid").readlink()
    except OSError:
        return ""
    return f"{socket.gethostname()}/{boot}/{namespace}/{os.getpid()}/{_start_time(os.getpid())}"


def _process_alive(identity: str) -> bool | None:
    """Whether the process lives, None where this machine cannot know."""
    mine = process_identity()
    if not mine or identity.split("/")[:-2] != mine.split("/")[:-2]:
        return None
    pid, start_time = identity.split("/")[-2:]
    return _start_time(int(pid)) == start_time


def _start_time(pid: int) -> str:
    """Clock ticks after boot at which the process started; empty for one that is gone or only waits to be reaped."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state in "ZX" else rest[18]
