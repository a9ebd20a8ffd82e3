"""The wall clock jumps by hours under a run that holds an output, or wants one: the lease is neither lost nor taken from a living run."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from subprocess import Popen
from typing import Any

import pytest

from embedding.corpus.lease import Lease
from embedding.corpus.storage import Storage, open_storage
from embedding.errors import OutputBusyError
from tests.corpus.test_lease import HOLD, LIVELY, NAME, said
from tests.support.processes import running
from tests.support.waiting import wait_until

TAKE = """
import logging, sys, time
from embedding.corpus.lease import Lease
from embedding.corpus.storage import open_storage
from embedding.errors import OutputBusyError
logging.basicConfig(level="INFO")
print(time.time(), flush=True)
try:
    Lease.acquire(open_storage(sys.argv[1]), "taker", 3600.0)
except OutputBusyError as error:
    print(time.time(), flush=True)
    print(error, flush=True)
"""
RENEWED_OFTEN = "from embedding.corpus import lease; lease._RENEWALS_PER_LIFE = 45\n"
"""Else every jump takes ten seconds, for two signs of life."""


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage(str(tmp_path / "store"))


@pytest.fixture
def clock(tmp_path: Path) -> Path:
    """What the wall clock of a process started with `faked` is off by; can be written to while the process runs."""
    file = tmp_path / "clock"
    file.write_text("+0h")
    return file


def faked(clock: Path) -> dict[str, str]:
    """Variables of a process whose wall clock is `clock`; its monotonic clock stays what it is, as with a real jump."""
    package = find_spec("libfaketime")
    assert package is not None
    assert package.origin is not None
    library = Path(package.origin).parent / "vendor" / "libfaketime" / "src" / "libfaketime.so.1"
    return {
        "LD_PRELOAD": str(library),
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "FAKETIME_DONT_RESET": "1",
    }


@pytest.fixture
def holder(storage: Storage, clock: Path, tmp_path: Path) -> Iterator[Popen[bytes]]:
    """A process that holds the output by that clock."""
    with running([sys.executable, "-c", RENEWED_OFTEN + HOLD, storage.url, str(LIVELY)], tmp_path, faked(clock)) as process:
        wait_until(lambda: process.poll() is not None or said(tmp_path), what="the holder")
        assert said(tmp_path) == ["held"], (tmp_path / "stderr").read_text()
        yield process


def lease(storage: Storage) -> dict[str, Any]:
    data = storage.read(NAME)
    assert data is not None
    found: dict[str, Any] = json.loads(data)
    return found


def test_a_holder_whose_clock_jumps_keeps_the_output(storage: Storage, clock: Path, holder: Popen[bytes], tmp_path: Path) -> None:
    for jump in ("+5h", "-5h", "+2000d"):
        clock.write_text(jump)
        renewals = lease(storage)["renewals"]
        wait_until(lambda before=renewals: lease(storage)["renewals"] > before + 1, what=f"renewals after {jump}")  # type: ignore[misc]
    with pytest.raises(OutputBusyError, match="is held by run held on "):
        Lease.acquire(storage, "mine", LIVELY)
    assert said(tmp_path) == ["held"]
    assert holder.poll() is None


@pytest.mark.parametrize("jump", ["+5h", "-5h"])
def test_a_taker_whose_clock_jumps_respects_a_living_holder(jump: str, storage: Storage, clock: Path, tmp_path: Path) -> None:
    folder = tmp_path / "taker"
    folder.mkdir()
    command = [sys.executable, "-c", TAKE, storage.url]
    with Lease.acquire(storage, "mine", LIVELY) as held, running(command, folder, faked(clock)) as taker:
        wait_until(lambda: taker.poll() is not None or "watching" in (folder / "stderr").read_text(), what="the taker")
        clock.write_text(jump)
        assert taker.wait(60) == 0
        held.renew()
    before, after, answer = said(folder)
    assert abs(float(after) - float(before)) > 4 * 3600  # its clock did jump
    assert "is held by run mine on " in answer
