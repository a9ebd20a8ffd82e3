"""Whole runs on a store that fails: what passes is not seen, what stays is one sentence, and the next run finishes with the same bytes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from embedding.run import cli
from tests.support import corpora, outputs
from tests.support.faulty_proxy import FaultyProxy, faulty_proxy
from tests.support.job import JobResult, run_job, start_job
from tests.support.ray_cluster import RayCluster
from tests.support.ray_cluster import ray_cluster as start_ray_cluster
from tests.support.s3_server import S3Server

ROWS, UNIT_ROWS = 120, 10
UNITS = ROWS // UNIT_ROWS
RAY_SECONDS = 3
"""After so long, `ray job stop` sends SIGKILL."""
LOADED_SECONDS = 30
"""A run that was asked to end is killed after so long: a loaded machine makes even the last resort late."""
OFTEN = ("slow down", "internal error", "too many requests", "reset", "truncate", "lose reply")
SCATTERED = [*OFTEN, *OFTEN, *OFTEN, "stall", "trickle"]


@pytest.fixture(scope="module")
def proxy(s3: S3Server) -> Iterator[FaultyProxy]:
    """What stands between every process of a run and the store."""
    with faulty_proxy(s3.endpoint) as proxy:
        yield proxy


@pytest.fixture(autouse=True)
def healed(proxy: FaultyProxy) -> Iterator[None]:
    """No test leaves its faults to the next."""
    yield
    proxy.heal()


@contextmanager
def cluster_behind(proxy: FaultyProxy, **variables: str) -> Iterator[dict[str, str]]:
    """What a run is started with for a cluster whose processes go through the proxy, and wait but a few seconds for an answer."""
    variables |= {"AWS_ENDPOINT_URL": proxy.endpoint, "FSSPEC_S3": json.dumps({"config_kwargs": {"read_timeout": 3}})}
    with start_ray_cluster(env=variables) as cluster:
        yield variables | cluster.environment()


@pytest.fixture(scope="module")
def env(proxy: FaultyProxy) -> Iterator[dict[str, str]]:
    """Of runs by an operator who has no time: tries end after four seconds."""
    with cluster_behind(proxy, EMBED_STORE_SECONDS="4") as env:
        yield env


def job_on(folder: str, tiny_model: Path) -> list[str]:
    """The command for a corpus in a new folder `folder`, but for its output."""
    source = corpora.plain(rows=ROWS, files=2, row_group_rows=20).write(f"{folder}/in")
    size = ["--unit-rows", str(UNIT_ROWS), "--workers", "1", "--cpus-per-worker", "1", "--max-unit-attempts", "2"]
    return ["--input", source, "--id-column", "id", "--model", str(tiny_model), "--progress", "log", *size]


@pytest.fixture(scope="module")
def folder(s3: S3Server) -> str:
    """Where the corpus and the outputs of the module are."""
    return s3.folder()


@pytest.fixture(scope="module")
def arguments(folder: str, tiny_model: Path) -> list[str]:
    """The same command each time, but for its output."""
    return job_on(folder, tiny_model)


@pytest.fixture(scope="module")
def undisturbed(arguments: list[str], folder: str, env: dict[str, str]) -> dict[str, bytes]:
    """The shards of a run that nothing happened to."""
    run_job(*arguments, "--output", f"{folder}/undisturbed", env=env)
    return outputs.shards(f"{folder}/undisturbed")


def error_of(result: JobResult) -> str:
    """The one sentence that a run which could not go on says."""
    assert "Traceback" not in result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    return line


def test_scattered_faults_are_not_seen(arguments: list[str], undisturbed: dict[str, bytes], folder: str, proxy: FaultyProxy) -> None:
    output = f"{folder}/scattered"
    with cluster_behind(proxy) as patient:  # one process may meet the whole burst
        proxy.scatter(SCATTERED, over=100, seed=4)
        proxy.faults.extend(["slow down"] * 10)  # a burst, in the midst of the workers' requests
        summary = run_job(*arguments, "--output", output, env=patient).summary
    assert not proxy.faults
    assert (summary["units_done"], summary["rows_out"], summary["units_failed"]) == (UNITS, ROWS, 0)
    assert outputs.shards(output) == undisturbed


def test_a_bad_day(arguments: list[str], undisturbed: dict[str, bytes], folder: str, env: dict[str, str], proxy: FaultyProxy) -> None:
    output = f"{folder}/bad-day"
    command, victim = [*arguments, "--output", output], sorted(undisturbed)[-1]

    def expire(moment: str, method: str, path: str) -> None:
        if moment == "after" and method == "PUT" and "/data/" in path:
            proxy.always = "expired"

    proxy.watchers.append(expire)  # with the first shard
    result = run_job(*command, env=env, check=1)
    refusal = r" is not allowed: (expired|.*Bad Request); check the credentials and permissions of this process; "  # a HEAD says no more
    assert re.search(refusal, error_of(result))
    assert error_of(result).endswith("run the same command again to resume")
    assert (result.summary["status"], result.summary["units_failed"]) == ("crashed", 0)
    proxy.heal()
    committed = outputs.versions(output)
    assert 0 < len(committed) < UNITS

    proxy.only, proxy.kinds, proxy.always = victim, frozenset({"PUT"}), "internal error"
    result = run_job(*command, env=env, check=3)
    assert (result.summary["units_done"], result.summary["units_failed"]) == (UNITS - 1 - len(committed), 1)
    assert f"/{victim} failed: " in result.stderr
    assert "_SUCCESS" not in outputs.files(output)
    proxy.heal()

    proxy.only, proxy.kinds, proxy.always = "manifest.parquet", frozenset({"PUT"}), "slow down"
    result = run_job(*command, env=env, check=1)
    assert error_of(result).startswith(f"error: writing {output}/_control/manifest.parquet failed: ")
    assert (result.summary["units_done"], result.summary["status"]) == (1, "crashed")
    assert "_SUCCESS" not in outputs.files(output)
    proxy.heal()

    proxy.only, proxy.kinds, proxy.always = "_SUCCESS", frozenset({"PUT"}), "denied"
    error = error_of(run_job(*command, env=env, check=1))
    assert error == (
        f"error: writing {output}/_SUCCESS is not allowed: denied; "
        "check the credentials and permissions of this process, then run the same command again to resume"
    )
    proxy.heal()

    summary = run_job(*command, env=env).summary
    assert (summary["status"], summary["units_done"]) == ("complete", 0)
    assert committed.items() <= outputs.versions(output).items()
    assert outputs.shards(output) == undisturbed


def test_a_source_that_is_replaced_while_it_is_read(s3: S3Server, tiny_model: Path, env: dict[str, str], proxy: FaultyProxy) -> None:
    folder = s3.folder()
    command = [*job_on(folder, tiny_model), "--output", f"{folder}/out"]
    new = corpora.plain(rows=ROWS + 2, files=2, row_group_rows=20).files["part-0.parquet"]
    moments: list[str] = []

    def replace(moment: str, method: str, path: str) -> None:
        if path.partition("?")[0].endswith("lease.json") and method == "PUT":
            moments.append("planned")
        elif moments and moment == "after" and method == "GET" and path.partition("?")[0].endswith("/in/part-0.parquet"):
            proxy.watchers.clear()  # between the reader's footer and its rows
            fs, root = outputs.filesystem(folder)
            fs.pipe_file(f"{root}/in/part-0.parquet", new)

    proxy.watchers.append(replace)
    result = run_job(*command, env=env, check=3)
    assert not proxy.watchers
    assert result.summary["units_done"] >= UNITS // 2  # those of the other file
    assert re.search(
        r"/part-0\.parquet from row \d+ was replaced after it was listed; run again to read the new version$", result.stderr, re.M
    )
    summary = run_job(*command, env=env).summary
    assert summary["status"] == "complete"
    assert len(outputs.table(f"{folder}/out")) == ROWS // 2 + (ROWS + 2) // 2


def test_a_stopped_run_is_to_end_before_ray_kills_it() -> None:
    assert 0 < cli._CLEAN_UP_SECONDS < cli._END_SECONDS <= 2 < RAY_SECONDS


def test_a_stopped_run_ends_though_the_store_does_not_answer(
    arguments: list[str], undisturbed: dict[str, bytes], folder: str, env: dict[str, str], proxy: FaultyProxy
) -> None:
    output = f"{folder}/stopped"
    with start_job(*arguments, "--output", output, env=env) as job:
        job.wait_until(lambda: outputs.versions(output), what="a shard")
        proxy.always = "stall"
        os.kill(job.process.pid, signal.SIGTERM)
        try:
            job.process.wait(LOADED_SECONDS)
        except subprocess.TimeoutExpired:
            job.process.kill()
        result = job.wait()
    assert result.exit_code == 143
    assert result.summary["status"] == "interrupted"
    assert "Traceback" not in result.stderr
    proxy.heal()
    run_job(*arguments, "--output", output, env=env)
    assert outputs.shards(output) == undisturbed


@pytest.mark.parametrize("store", ["local", "s3"])
def test_a_zombie_harms_nothing(
    store: str,
    arguments: list[str],
    undisturbed: dict[str, bytes],
    folder: str,
    env: dict[str, str],
    ray_cluster: RayCluster,
    tmp_path: Path,
) -> None:
    output = str(tmp_path / "out") if store == "local" else f"{folder}/zombie"
    command = [*arguments, "--output", output, "--lease-seconds", "2"]
    with start_job(*command, env=env) as zombie:
        zombie.wait_until(lambda: outputs.versions(output), what="a shard")
        os.kill(zombie.process.pid, signal.SIGSTOP)
        taker = run_job(*command, env=ray_cluster.environment())  # the zombie may hold all of its own cluster
        assert "died while it held the output; this run takes over" in taker.stderr
        before = outputs.files(output)
        os.kill(zombie.process.pid, signal.SIGCONT)
        result = zombie.wait()
    assert result.exit_code == 4, f"{result.stdout}\n{result.stderr}"
    assert error_of(result).endswith("was taken over by another run while this one showed no sign of life; this run stops")
    after = outputs.files(output)
    mine = ["_control/runs/.*", "_control/records/.*"]
    mine += [rf"_control/tmp/\.{re.escape(Path(shard).name)}\.[0-9a-f]{{8}}\.tmp" for shard in undisturbed]  # its workers died in a put
    assert [name for name in after.keys() - before.keys() if not re.fullmatch("|".join(mine), name)] == []
    assert before.items() <= after.items()
    assert outputs.shards(output) == undisturbed
