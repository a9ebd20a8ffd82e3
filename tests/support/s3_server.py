"""A real S3 server for tests: SeaweedFS from PyPI, one process on the loopback, gone when the tests are."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import quote

import botocore.session
from botocore.client import Config
from botocore.exceptions import BotoCoreError, ClientError

from tests.support.processes import running
from tests.support.waiting import wait_until

HOST = "127.0.0.1"
REGION = "us-east-1"
PORTS = tuple(f"{server}.port{kind}" for server in ("master", "volume", "filer", "s3", "admin") for kind in ("", ".grpc"))
START_SECONDS = 30
ACTIONS = ["Admin", "Read", "Write", "List", "Tagging"]
START_TRIES = 5
_STOCKERS = 8


@dataclass(frozen=True)
class S3Server:
    """A running server, and the only credentials it accepts."""

    pid: int
    endpoint: str
    key: str
    secret: str
    filer: str
    """host:port of the file server behind the S3 gateway."""
    shared_bucket: str = "tests"

    def folder(self) -> str:
        """URL of a folder never used before, `s3://tests/1f0c9a7e`; costs nothing."""
        return f"s3://{self.shared_bucket}/{secrets.token_hex(4)}"

    def bucket(self) -> str:
        """URL of a new bucket; each takes several storage volumes of the server, so prefer `folder`."""
        name = f"bucket-{secrets.token_hex(4)}"
        self.client().create_bucket(Bucket=name)
        return f"s3://{name}"

    def is_ready(self) -> bool:
        """Whether the shared bucket is there, or now made, and takes an object."""
        client = self.client()
        try:
            if not any(bucket["Name"] == self.shared_bucket for bucket in client.list_buckets()["Buckets"]):
                client.create_bucket(Bucket=self.shared_bucket)
            client.put_object(Bucket=self.shared_bucket, Key="ready")
        except (BotoCoreError, ClientError):
            return False
        return True

    def client(self) -> Any:
        """A botocore client that tries once, for what no filesystem layer shows."""
        config = Config(retries={"total_max_attempts": 1}, connect_timeout=5, read_timeout=30, s3={"addressing_style": "path"})
        return botocore.session.get_session().create_client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.key,
            aws_secret_access_key=self.secret,
            region_name=REGION,
            config=config,
        )

    def stock(self, url: str, names: Sequence[str]) -> None:
        """Objects of one byte below the URL, put past the S3 gateway: several times as fast, for those who need a million."""
        folder = f"/buckets/{url.removeprefix('s3://')}"
        with ThreadPoolExecutor(_STOCKERS) as pool:
            shares = [names[start::_STOCKERS] for start in range(_STOCKERS)]
            list(pool.map(partial(self._stock, folder), shares))

    def _stock(self, folder: str, names: Sequence[str]) -> None:
        connection = HTTPConnection(self.filer)
        for name in names:
            connection.request("PUT", quote(f"{folder}/{name}"), body=b"x")
            answer = connection.getresponse()
            answer.read()
            if answer.status >= 300:
                raise RuntimeError(f"the file server refused {name}: {answer.status} {answer.reason}")
        connection.close()

    def environment(self) -> dict[str, str]:
        """The variables through which every S3 client finds this server, and no other place or credential."""
        return {
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_REGION": REGION,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }


@contextmanager
def s3_server() -> Iterator[S3Server]:
    """Start a server on free ports, wait until it takes an object, and stop it on the way out.

    Raises:
        RuntimeError: it did not come up in five tries; the end of its log says why.
    """
    with mortal_s3_server() as mortal:
        yield mortal.server


@dataclass
class MortalS3:
    """A server that can be killed or suspended, and lives again with the same address, credentials and data."""

    server: S3Server
    _command: list[str]
    _folder: Path
    _stack: ExitStack

    def kill(self) -> None:
        """SIGKILL."""
        os.kill(self.server.pid, signal.SIGKILL)

    def start_again(self) -> None:
        """Start the killed server; it answers some seconds later (`server.is_ready()`)."""
        process = self._stack.enter_context(running(self._command, self._folder))
        self.server = replace(self.server, pid=process.pid)

    def suspend(self) -> None:
        """SIGSTOP: connections open, and nothing comes back."""
        os.kill(self.server.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        os.kill(self.server.pid, signal.SIGCONT)


@contextmanager
def mortal_s3_server() -> Iterator[MortalS3]:
    """As `s3_server`, for who wants to kill it."""
    with tempfile.TemporaryDirectory(prefix="weed-") as folder:
        for _ in range(START_TRIES):  # a port found free can be taken before the server binds it
            with ExitStack() as stack:
                server = _start(Path(folder), stack)
                if server is not None:
                    yield server
                    return
        log = (Path(folder) / "stderr").read_text(errors="replace")
        raise RuntimeError(f"the S3 server did not start in {START_TRIES} tries: {log[-2000:]}")


def _start(folder: Path, stack: ExitStack) -> MortalS3 | None:
    """One try; None where the server ended or never answered to its own credentials."""
    key, secret = secrets.token_hex(8), secrets.token_hex(16)
    identity = {"name": "tests", "credentials": [{"accessKey": key, "secretKey": secret}], "actions": ACTIONS}
    (folder / "ids.json").write_text(json.dumps({"identities": [identity]}))
    data = Path(tempfile.mkdtemp(prefix="data-", dir=folder))
    ports = _free_ports()
    stack.callback(_remove_sockets, ports)
    command = _command(data, folder / "ids.json", ports)
    process = stack.enter_context(running(command, folder))
    server = S3Server(process.pid, f"http://{HOST}:{ports['s3.port']}", key, secret, f"{HOST}:{ports['filer.port']}")
    try:
        wait_until(lambda: process.poll() is not None or server.is_ready(), seconds=START_SECONDS, what="the S3 server")
    except TimeoutError:
        return None
    return MortalS3(server, command, folder, stack) if process.poll() is None else None


def _command(data: Path, identities: Path, ports: dict[str, int]) -> list[str]:
    weed = Path(sys.executable).with_name("weed")
    return [
        *(str(weed), "-logtostderr=true", "mini", f"-dir={data}", f"-ip={HOST}", f"-ip.bind={HOST}"),
        *(f"-{option}={port}" for option, port in ports.items()),
        *(f"-s3.config={identities}", "-s3.autoCreateBucket=false", "-s3.port.iceberg=0", "-s3.port.lance=0"),
        *("-webdav=false", "-admin.ui=false", "-master.telemetry=false", "-volume.preStopSeconds=0"),
    ]


def _free_ports() -> dict[str, int]:
    """A free port for each of the server's sockets, all held open together so that none is named twice."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server((HOST, 0))) for _ in PORTS]
        return {option: opened.getsockname()[1] for option, opened in zip(PORTS, sockets, strict=True)}


def _remove_sockets(ports: dict[str, int]) -> None:
    """The server makes a Unix socket beside each port, always in /tmp, and does not remove them all."""
    for port in ports.values():
        for path in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
            path.unlink(missing_ok=True)
