"""The tests' own tools do what the other tests lean on."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import psutil
import pytest
from botocore.exceptions import BotoCoreError, ClientError, ConnectionClosedError

from tests.support.corpora import plain
from tests.support.faulty_proxy import When, faulty_proxy
from tests.support.job import run_job, start_job
from tests.support.processes import running, session_members
from tests.support.ray_cluster import ray_cluster
from tests.support.s3_server import S3Server, mortal_s3_server
from tests.support.waiting import wait_until


def filesystem(root: str) -> Any:
    options = {"use_listings_cache": False} if root.startswith("s3://") else {"auto_mkdir": True}
    return fsspec.url_to_fs(root, **options)[0]


def test_put_get_list(storage_root: str) -> None:
    files = filesystem(storage_root)
    files.pipe_file(f"{storage_root}/a/one", b"1")
    files.pipe_file(f"{storage_root}/two", b"22")
    assert files.cat_file(f"{storage_root}/a/one") == b"1"
    assert sorted(Path(name).name for name in files.find(storage_root)) == ["one", "two"]


def test_s3_put_if_absent(s3: S3Server) -> None:
    client, bucket = s3.client(), s3.bucket().removeprefix("s3://")
    client.put_object(Bucket=bucket, Key="lock", Body=b"first", IfNoneMatch="*")
    with pytest.raises(ClientError, match="PreconditionFailed"):
        client.put_object(Bucket=bucket, Key="lock", Body=b"second", IfNoneMatch="*")
    assert client.get_object(Bucket=bucket, Key="lock")["Body"].read() == b"first"


def test_s3_refuses_a_wrong_secret(s3: S3Server) -> None:
    impostor = replace(s3, secret="wrong")
    with pytest.raises(ClientError, match="SignatureDoesNotMatch"):
        impostor.client().list_buckets()
    with pytest.raises(PermissionError):
        fsspec.filesystem("s3", secret="wrong", key=s3.key, skip_instance_cache=True).ls(s3.shared_bucket)


def test_s3_pages_long_listings(s3: S3Server) -> None:
    root = s3.folder()
    files = filesystem(root)
    files.pipe({f"{root}/{number:05}": b"" for number in range(1500)})
    assert len(files.find(root)) == 1500


@pytest.mark.parametrize(("when", "carried_out"), [("before", False), ("after", True)])
def test_a_watcher_can_lose_a_request_or_its_answer(when: When, carried_out: bool, s3: S3Server) -> None:
    key = secrets.token_hex(4)
    asking: list[list[int]] = []

    def lose(moment: When, method: str, path: str) -> None:
        if (moment, method) == (when, "PUT") and path.startswith(f"/{s3.shared_bucket}/{key}"):
            ends = (proxy.exchange.client_port, proxy.server_port)  # another's connection may have one of them, on another address
            asking.append(
                [each.pid for each in psutil.net_connections("tcp4") if each.raddr and (each.laddr.port, each.raddr.port) == ends]
            )
            raise ConnectionResetError

    with faulty_proxy(s3.endpoint) as proxy:
        proxy.watchers.append(lose)
        with pytest.raises(ConnectionClosedError):
            replace(s3, endpoint=proxy.endpoint).client().put_object(Bucket=s3.shared_bucket, Key=key)
    assert asking == [[os.getpid()]]
    assert ("Contents" in s3.client().list_objects_v2(Bucket=s3.shared_bucket, Prefix=key)) is carried_out


def test_an_s3_server_comes_back_with_its_data() -> None:
    with mortal_s3_server() as store:
        store.server.client().put_object(Bucket=store.server.shared_bucket, Key="kept", Body=b"data")
        before = store.server
        store.kill()
        wait_until(lambda: not before.is_ready(), what="the server to be gone")
        store.start_again()
        wait_until(lambda: _read(before, "kept") == b"data", what="the server to be back with its data")
        assert store.server.pid != before.pid


def _read(server: S3Server, key: str) -> bytes | None:
    """The object; None while the server does not give it: right after a start it can take new objects before it finds the old ones."""
    try:
        return bytes(server.client().get_object(Bucket=server.shared_bucket, Key=key)["Body"].read())
    except (BotoCoreError, ClientError):
        return None


def test_nothing_outlives_a_killed_program(tmp_path: Path) -> None:
    program = "import subprocess; subprocess.Popen(['sleep', '300'], process_group=0); print('begun', flush=True); input()"
    with running([sys.executable, "-c", program], tmp_path) as process:
        wait_until(lambda: (tmp_path / "stdout").read_text() == "begun\n", what="the program")
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        (orphan,) = session_members(process.pid, "sleep")
    assert not orphan.is_running() or orphan.status() == psutil.STATUS_ZOMBIE


def test_waiting_ends() -> None:
    with pytest.raises(TimeoutError, match="for Godot"):
        wait_until(lambda: False, seconds=0.1, what="Godot")


def test_a_ray_cluster_is_joined_and_leaves_nothing(s3: S3Server) -> None:
    program = (
        "import ray, os, sys\nray.init(log_to_driver=False)\n"
        "print(ray.cluster_resources()['CPU'], ray.get(ray.remote(lambda: os.environ['AWS_ENDPOINT_URL']).remote()))"
    )
    with ray_cluster(cpus=3) as cluster:
        joined = subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, **cluster.environment()},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        assert cluster.processes("raylet")
    assert joined.stdout.split() == ["3.0", s3.endpoint]
    assert cluster.processes("") == []


def test_a_job_answers_with_its_exit_code_and_summary(tmp_path: Path) -> None:
    source = plain().write(tmp_path / "in")
    assert run_job("--input", source, "--output", tmp_path / "out", "--dry-run").exit_code == 0
    refused = run_job("--input", source, "--output", tmp_path / "out", "--text-column", "body", check=2)
    assert refused.summary == {}
    assert "body" in refused.stderr
    with pytest.raises(AssertionError, match="exit code 2, expected 0"):
        run_job("--no-such-option")


def test_a_killed_job_leaves_nothing(tmp_path: Path) -> None:
    with start_job("--input", plain().write(tmp_path / "in"), "--output", tmp_path / "out") as job:
        job.wait_until(lambda: job.workers("ray::"), what="Ray's workers")
        assert job.kill().exit_code == 128 + signal.SIGKILL
    assert job.workers("") == []
