"""One run at a time: a living holder keeps the output, a dead or silent one loses it to exactly one other, and notices."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import psutil
import pytest

from embedding.corpus.lease import Lease, _process_alive, process_identity
from embedding.corpus.storage import Storage, open_storage
from embedding.errors import ConfigError, LeaseLostError, OutputBusyError
from tests.support.faulty_proxy import FaultyProxy
from tests.support.processes import running
from tests.support.s3_server import S3Server
from tests.support.waiting import wait_until

NAME = "_control/lease.json"
LONG = 3600.0
"""Nobody waits for so long: what is told before was told at once."""
LIVELY = 30.0
"""No load and no disk makes a thread wait for so long; a sign of life comes after five seconds, of `renewed_often` after a half."""
SHORT = 1.0

HOLD = """
import sys
from embedding.corpus.lease import Lease
from embedding.corpus.storage import open_storage
from embedding.errors import LeaseLostError
lease = Lease.acquire(open_storage(sys.argv[1]), "held", float(sys.argv[2]))
print("held", flush=True)
while sys.stdin.readable():
    try:
        lease.check()
    except LeaseLostError as error:
        print(error, flush=True)
        break
lease.release()
print("released", flush=True)
"""


@pytest.fixture
def storage(storage_root: str) -> Storage:
    return open_storage(storage_root)


@pytest.fixture
def renewed_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases of this process show life soon, however long they may be silent."""
    monkeypatch.setattr("embedding.corpus.lease._RENEWALS_PER_LIFE", 60)
    monkeypatch.setattr("embedding.corpus.lease._LOOKS_PER_LIFE", 300)


def document(storage: Storage) -> dict[str, Any]:
    data = storage.read(NAME)
    assert data is not None
    found: dict[str, Any] = json.loads(data)
    return found


@contextmanager
def holder(storage: Storage, seconds: float, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Another process that holds the lease; what it says goes to `stdout` in the folder."""
    with running([sys.executable, "-c", HOLD, storage.url, str(seconds)], folder) as process:
        wait_until(lambda: process.poll() is not None or said(folder), what="the holder")
        assert said(folder) == ["held"], (folder / "stderr").read_text()
        yield process


def said(folder: Path) -> list[str]:
    return (folder / "stdout").read_text().splitlines()


def test_a_released_output_is_free_at_once(storage: Storage) -> None:
    for run in ("first", "second", "third"):
        with Lease.acquire(storage, run, LONG) as lease:
            lease.check()
            assert (document(storage)["run"], document(storage)["released"]) == (run, False)
        assert document(storage)["released"]
    assert storage.list("_control").keys() == {NAME}


def test_an_error_releases_the_output(storage: Storage) -> None:
    with pytest.raises(KeyError), Lease.acquire(storage, "first", LONG):
        raise KeyError
    Lease.acquire(storage, "second", LONG).release()


@pytest.mark.usefixtures("renewed_often")
def test_a_living_holder_is_named(storage: Storage) -> None:
    with Lease.acquire(storage, "run-1", LIVELY) as lease:
        held = document(storage)
        with pytest.raises(OutputBusyError) as refused:
            Lease.acquire(storage, "run-2", LIVELY)
        lease.check()
    assert str(refused.value) == (
        f"{storage.url} is held by run run-1 on {held['host']} since {held['since']}; wait for it to end, stop it, or choose another output"
    )


@pytest.mark.usefixtures("renewed_often")
@pytest.mark.parametrize("process", [process_identity(), "another/machine/1/2"], ids=["of this machine", "of another"])
def test_a_look_tells_a_living_holder_and_takes_nothing(process: str, storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    Lease.require_free(storage)
    assert storage.list("") == {}
    with monkeypatch.context() as patch:
        patch.setattr("embedding.corpus.lease.process_identity", lambda: process)
        lease = Lease.acquire(storage, "run-1", LIVELY)
    with lease:
        with pytest.raises(OutputBusyError, match="is held by run run-1 on "):
            Lease.require_free(storage)
        lease.check()
    Lease.require_free(storage)


def test_a_holder_in_another_process_is_busy_and_keeps_the_output(storage: Storage, tmp_path: Path) -> None:
    with holder(storage, LIVELY, tmp_path):
        with pytest.raises(OutputBusyError, match="is held by run held on "):
            Lease.acquire(storage, "mine", LIVELY)
        assert document(storage)["run"] == "held"
        assert said(tmp_path) == ["held"]


@pytest.mark.parametrize("reaped", [True, False])
def test_a_killed_holder_is_replaced_at_once(storage: Storage, reaped: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with holder(storage, LONG, tmp_path) as process:
        os.kill(process.pid, signal.SIGKILL)
        if reaped:
            process.wait()
        else:
            wait_until(lambda: psutil.Process(process.pid).status() == psutil.STATUS_ZOMBIE, what="the kill")
        with Lease.acquire(storage, "mine", LONG):
            assert document(storage)["run"] == "mine"
    assert "run held on " in caplog.text
    assert "died while it held the output; this run takes over" in caplog.text


def test_a_stopped_holder_is_replaced_and_notices_when_it_wakes(storage: Storage, tmp_path: Path) -> None:
    with holder(storage, SHORT, tmp_path) as process:
        os.kill(process.pid, signal.SIGSTOP)
        with Lease.acquire(storage, "mine", LONG) as lease:
            os.kill(process.pid, signal.SIGCONT)
            assert process.wait(60) == 0
            _, error, last = said(tmp_path)
            assert error == f"{storage.url} was taken over by another run while this one showed no sign of life; this run stops"
            assert last == "released"
            lease.renew()
            assert (document(storage)["run"], document(storage)["released"]) == ("mine", False)


def lease_of(storage: Storage, **changed: Any) -> None:
    """Write the lease of a run that lives elsewhere, or nowhere."""
    other = {"owner": "them", "run": "theirs", "host": "elsewhere", "process": "", "since": "2025-01-01T00:00:00+00:00", "seconds": LONG}
    storage.put(NAME, json.dumps(other | changed).encode())


def test_a_silent_holder_elsewhere_is_replaced_after_its_time(storage: Storage) -> None:
    lease_of(storage, seconds=0.5)
    with Lease.acquire(storage, "mine", LONG):
        assert document(storage)["run"] == "mine"


def test_a_holder_elsewhere_that_shows_life_is_busy(storage: Storage) -> None:
    lease_of(storage, seconds=LIVELY)
    with ThreadPoolExecutor(1) as pool:
        taker = pool.submit(Lease.acquire, storage, "mine", LONG)
        renewals = count(1)

        def refused_or_renewed() -> bool:
            lease_of(storage, seconds=LIVELY, renewals=next(renewals))
            return taker.done()

        wait_until(refused_or_renewed, what="the taker")
        with pytest.raises(OutputBusyError, match=r"is held by run theirs on elsewhere since 2025-01-01T00:00:00\+00:00; "):
            taker.result()


@pytest.mark.parametrize("ending", ["released", "deleted"])
def test_an_output_given_back_while_somebody_waits_is_taken(storage: Storage, ending: str, caplog: pytest.LogCaptureFixture) -> None:
    lease_of(storage, seconds=LIVELY)
    with caplog.at_level(logging.INFO), ThreadPoolExecutor(1) as pool:
        taker = pool.submit(Lease.acquire, storage, "mine", LONG)
        wait_until(lambda: "run theirs on elsewhere holds the output; watching" in caplog.text, what="the taker")
        if ending == "released":
            lease_of(storage, released=True)
        else:
            storage.delete([NAME])
        taker.result().release()
    assert "died while it held" not in caplog.text


def test_a_process_number_used_again_is_not_the_holder(storage: Storage) -> None:
    lease_of(storage, process=f"{process_identity().rpartition('/')[0]}/1")
    Lease.acquire(storage, "mine", LONG).release()


def test_what_is_known_of_processes() -> None:
    mine = process_identity()
    host, boot, namespace, pid, started = mine.split("/")
    assert int(pid) == os.getpid()
    assert _process_alive(mine) is True
    assert _process_alive("/".join([host, boot, namespace, pid, str(int(started) + 1)])) is False
    for elsewhere in ("", "nonsense", f"other-{mine}", "/".join([host, "other-boot", namespace, pid, started])):
        assert _process_alive(elsewhere) is None


def test_one_of_many_takers_wins(storage: Storage) -> None:
    lease_of(storage, seconds=0.5)

    def take(number: int) -> Lease | None:
        try:
            return Lease.acquire(storage, f"taker-{number}", LIVELY)
        except OutputBusyError:
            return None

    with ThreadPoolExecutor(3) as pool:
        leases = list(pool.map(take, range(3)))
    (winner,) = [number for number, lease in enumerate(leases) if lease is not None]
    assert document(storage)["run"] == f"taker-{winner}"
    for lease in leases:
        if lease is not None:
            lease.check()
            lease.release()


def test_a_lease_is_renewed(storage: Storage) -> None:
    with Lease.acquire(storage, "mine", SHORT) as lease:
        wait_until(lambda: document(storage)["renewals"] >= 3, what="three renewals")
        lease.check()
        before = document(storage)["renewals"]
        lease.renew()
        assert document(storage)["renewals"] > before


@pytest.mark.parametrize("theft", ["taken", "deleted"])
def test_a_lost_lease_stays_lost_and_is_left_alone(storage: Storage, theft: str) -> None:
    lease = Lease.acquire(storage, "mine", LONG)
    if theft == "taken":
        lease_of(storage)
    else:
        storage.delete([NAME])
    lease.check()  # renewed in time: asks nobody
    for call in (lease.renew, lease.check, lease.renew):
        with pytest.raises(LeaseLostError, match="was taken over by another run"):
            call()
    lease.release()
    assert storage.exists(NAME) == (theft == "taken")
    assert theft == "deleted" or document(storage)["run"] == "theirs"


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"{}", b'{"owner": "them", "of_a_later_version": 1}'])
def test_a_damaged_lease_is_named(storage: Storage, damage: bytes) -> None:
    storage.put(NAME, damage)
    with pytest.raises(ConfigError, match=r"/_control/lease\.json is damaged \(.*\); delete it if no run is using this output$"):
        Lease.acquire(storage, "mine", LONG)
    assert storage.read(NAME) == damage


@pytest.mark.usefixtures("no_waiting")
def test_lost_replies_lose_no_lease(s3: S3Server, proxy: FaultyProxy) -> None:
    storage = open_storage(s3.folder())
    proxy.only = "lease.json"
    for run in ("first", "second"):  # put where there was none, and put in place of a released one
        proxy.faults.extend(["lose reply"] if run == "first" else ["", "", "", "", "lose reply"])
        with Lease.acquire(storage, run, LONG) as lease:
            assert not proxy.faults
            proxy.faults.extend(["", "", "lose reply"])
            lease.renew()
            assert not proxy.faults
            lease.renew()
            proxy.faults.extend(["", "", "lose reply"])
        assert not proxy.faults
        assert (document(storage)["run"], document(storage)["released"]) == (run, True)


@pytest.mark.usefixtures("no_waiting")
def test_a_store_that_fails_at_the_end_does_not_fail_the_run(s3: S3Server, proxy: FaultyProxy, caplog: pytest.LogCaptureFixture) -> None:
    storage = open_storage(s3.folder())
    with Lease.acquire(storage, "mine", LONG):
        proxy.faults.extend(["internal error"] * 100)
    assert "could not release the lease, so the next run will wait 3600 s: " in caplog.text


@pytest.mark.usefixtures("no_waiting")
def test_a_holder_that_can_not_reach_the_store_does_not_outlive_its_time(s3: S3Server, proxy: FaultyProxy) -> None:
    lease = Lease.acquire(open_storage(s3.folder()), "mine", 0.5)
    proxy.faults.extend(["denied"] * 10_000)

    def stopped() -> bool:
        try:
            lease.check()
        except ConfigError as error:
            return "is not allowed" in str(error)
        return False

    wait_until(stopped, what="the check to fail")
    proxy.faults.clear()
    lease.release()


@pytest.mark.usefixtures("no_waiting")
def test_a_passing_fault_does_not_end_the_renewing(s3: S3Server, proxy: FaultyProxy) -> None:
    storage = open_storage(s3.folder())
    with Lease.acquire(storage, "mine", SHORT) as lease:
        proxy.faults.extend(["denied"] * 2)
        wait_until(lambda: not proxy.faults, what="the faults")
        renewals = document(storage)["renewals"]
        wait_until(lambda: document(storage)["renewals"] > renewals, what="another renewal")
        lease.check()


def test_a_store_that_ignores_conditions_is_told(s3: S3Server, proxy: FaultyProxy, caplog: pytest.LogCaptureFixture) -> None:
    storage = open_storage(s3.folder())
    proxy.faults.extend(["", "claim success"])
    Lease.acquire(storage, "mine", LONG).release()
    assert f"{storage.url} ignores conditional puts, so two runs at once would not notice each other" in caplog.text
