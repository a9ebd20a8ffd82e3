"""Whatever dies, the finished output is byte for byte that of an undisturbed run, and no committed unit is computed again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.support import corpora, outputs
from tests.support.job import RunningJob, run_job, start_job
from tests.support.ray_cluster import RayCluster
from tests.support.waiting import wait_until

ROWS, UNIT_ROWS = 400, 5
UNITS = ROWS // UNIT_ROWS


@pytest.fixture(scope="module")
def arguments(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The same command each time, but for its output."""
    source = corpora.plain(rows=ROWS, files=4, row_group_rows=20).write(tmp_path_factory.mktemp("corpus"))
    return ["--input", source, "--id-column", "id", "--unit-rows", str(UNIT_ROWS), "--model", str(tiny_model), "--progress", "log"]


@pytest.fixture(scope="module")
def undisturbed(arguments: list[str], ray_cluster: RayCluster, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The output of a run that nothing happened to."""
    output = str(tmp_path_factory.mktemp("undisturbed"))
    run_job(*arguments, "--output", output, env=ray_cluster.environment())
    return output


def has_shards(output: str, count: int) -> Callable[[], bool]:
    return lambda: len(outputs.versions(output)) >= count


def has_file(output: str, name: str) -> Callable[[], bool]:
    fs, path = outputs.filesystem(output)
    return lambda: bool(fs.exists(f"{path}/{name}"))


def workers(cluster: RayCluster) -> set[psutil.Process]:
    return set(cluster.processes("ray::MapWorker"))


def no_worker_but(known: set[psutil.Process], cluster: RayCluster) -> Callable[[], bool]:
    return lambda: workers(cluster) <= known


def test_killed_drivers(arguments: list[str], undisturbed: str, storage_root: str, ray_cluster: RayCluster) -> None:
    env, output = ray_cluster.environment(), f"{storage_root}/out"
    moments = [
        has_file(output, "_control/job.json"),
        has_shards(output, 1),
        has_shards(output, UNITS // 3),
        has_shards(output, 2 * UNITS // 3),
        has_shards(output, UNITS),
    ]
    committed: dict[str, tuple[str, ...]] = {}
    for moment in moments:
        earlier = workers(ray_cluster)  # of runs that ended well; Ray lets a process go that hangs at its exit
        with start_job(*arguments, "--output", output, env=env) as job:
            wait_until(moment, what="the moment to kill", seconds=120)
            job.kill()
        # Workers of a dead driver may finish what they hold: wait until the cluster has ended them.
        wait_until(no_worker_but(earlier, ray_cluster), what="the dead run's workers to end")
        now = outputs.versions(output)
        assert committed.items() <= now.items()
        committed = now

    summary = run_job(*arguments, "--output", output, env=env).summary

    assert summary["units_skipped"] == len(committed)
    assert summary["units_done"] == UNITS - len(committed)
    assert committed.items() <= outputs.versions(output).items()
    assert outputs.shards(output) == outputs.shards(undisturbed)
    manifests = [outputs.control(url, "manifest.parquet").drop_columns("bytes") for url in (undisturbed, output)]
    assert manifests[0] == manifests[1]


def test_killed_workers(arguments: list[str], undisturbed: str, storage_root: str, ray_cluster: RayCluster) -> None:
    env, output = ray_cluster.environment(), f"{storage_root}/out"
    with start_job(*arguments, "--output", output, env=env) as job:
        victims: set[psutil.Process] = set()
        for count in (1, UNITS // 4):
            job.wait_until(has_shards(output, count), what="shards")
            found = workers(ray_cluster) - victims
            for victim in found:
                victim.kill()
            victims |= found
        result = job.wait()
    assert victims
    assert (result.exit_code, result.summary["rows_out"]) == (0, ROWS)
    assert outputs.shards(output) == outputs.shards(undisturbed)


def is_released(output: str) -> bool:
    return bool(outputs.document(output, "_control/lease.json")["released"])


@pytest.mark.parametrize(("stop", "exit_code"), [(RunningJob.terminate, 143), (RunningJob.interrupt, 130)])
def test_a_stopped_run_lets_go_of_the_output(
    stop: Callable[[RunningJob], object], exit_code: int, arguments: list[str], tmp_path: Path, ray_cluster: RayCluster
) -> None:
    output = str(tmp_path / "out")
    with start_job(*arguments, "--output", output, env=ray_cluster.environment()) as job:
        job.wait_until(has_shards(output, 3), what="three shards")
        stop(job)
        result = job.wait()
    assert result.exit_code == exit_code
    assert is_released(output)
    assert "Traceback" not in result.stderr
    [summary] = [name for name in outputs.files(output) if name.endswith("summary.json")]
    assert outputs.document(output, summary)["status"] == result.summary["status"] == "interrupted"
    done = len(outputs.shards(output))
    assert outputs.document(output, summary)["units_done"] <= done  # a record follows its shard
    assert 3 <= done < UNITS
    assert run_job(*arguments, "--output", output, env=ray_cluster.environment()).summary["units_done"] == UNITS - done


def test_two_runs_on_one_output(arguments: list[str], tmp_path: Path, ray_cluster: RayCluster) -> None:
    output = str(tmp_path / "out")
    command = [*arguments, "--output", output, "--lease-seconds", "9"]
    with start_job(*command, env=ray_cluster.environment()) as first:
        first.wait_until(has_file(output, "_control/lease.json"), what="the first run's lease")
        second = run_job(*command, env=ray_cluster.environment(), check=4)
        assert "is held by run" in second.stderr
        assert "Traceback" not in second.stderr
        assert first.wait().exit_code == 0
    assert len(outputs.shards(output)) == UNITS
