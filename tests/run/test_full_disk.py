"""A disk that fills up in the middle of a run, and one that may only be read."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from embedding.corpus.shard import shard_table
from embedding.corpus.shards.lance import LANCE
from embedding.errors import AccessError, StorageFullError
from tests.run.conftest import Embed
from tests.support import corpora, outputs
from tests.support.job import run_job
from tests.support.ray_cluster import RayCluster

PAGE = 4096
DISK_PAGES = 256
FREE_PAGES = 20
"""Room for lease, settings and some shards, not for all."""


def as_root(*command: str) -> None:
    """Run a command that mounts; where the tests are not root's, through sudo."""
    subprocess.run([*([] if os.geteuid() == 0 else ["sudo", "-n"]), *command], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        as_root("mount", "-t", "tmpfs", "-o", f"size={DISK_PAGES * PAGE},mode=777", "tmpfs", str(folder))
    except (OSError, subprocess.CalledProcessError) as error:  # no such program, or a container that may not
        pytest.skip(f"nothing can be mounted here: {error}")
    yield folder
    as_root("umount", "--lazy", str(folder))


def test_a_full_temporary_folder_stops_a_run_as_a_full_disk_does(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(small_disk))
    table = shard_table(pa.table({"id": range(2000)}), np.random.default_rng(0).standard_normal((2000, 384), dtype=np.float32), {})
    with pytest.raises(StorageFullError, match=rf"^writing a shard in {small_disk} failed: .* No space left on device; free some space"):
        LANCE.encode(table, {})
    assert list(small_disk.iterdir()) == []


def test_a_full_disk_loses_nothing(small_disk: Path, embed: Embed, tiny_model: Path, ray_cluster: RayCluster, tmp_path: Path) -> None:
    source, output = corpora.plain(rows=400, files=2).write(tmp_path / "in"), str(small_disk / "out")
    embed(input=source, output=str(tmp_path / "undisturbed"))
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes((DISK_PAGES - FREE_PAGES) * PAGE))
    arguments = ["--input", source, "--output", output, "--id-column", "id", "--unit-rows", "10", "--model", str(tiny_model)]

    result = run_job(*arguments, env=ray_cluster.environment(), check=1)

    assert "Traceback" not in result.stderr
    (error,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert error.startswith("error: the run stopped: writing ")
    assert error.endswith(" No space left on device; free some space, then run the same command again to resume")
    assert result.summary["status"] == "crashed"
    assert result.summary["units_failed"] == 0
    committed = outputs.versions(output)
    assert "_SUCCESS" not in outputs.files(output)
    ballast.unlink()
    summary = embed(input=source, output=output)
    assert (summary.status, summary.units_skipped) == ("complete", len(committed))
    assert committed.items() <= outputs.versions(output).items()
    assert outputs.shards(output) == outputs.shards(str(tmp_path / "undisturbed"))
    assert not outputs.files(output, "_control/tmp")


def test_a_read_only_disk_is_refused_at_start(small_disk: Path, embed: Embed, tmp_path: Path) -> None:
    source = corpora.plain(rows=4, files=1).write(tmp_path / "in")
    as_root("mount", "-o", "remount,ro", str(small_disk))
    with pytest.raises(AccessError, match=r"^writing .* is not allowed: .*Read-only file system.*; check the credentials and permissions"):
        embed(input=source, output=str(small_disk / "out"))
    assert AccessError.exit_code == 2
