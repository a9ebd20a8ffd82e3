"""Where a storm rages: a Ray cluster of several nodes, an S3 server, between them a proxy that sees every request, and the job."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa

from tests.support.corpora import numbered, parquet, sentences
from tests.support.faulty_proxy import FaultyProxy, faulty_proxy
from tests.support.ray_cluster import RayNodes, ray_nodes
from tests.support.s3_server import MortalS3, mortal_s3_server

NODES, NODE_CPUS = 2, 2
UNIT_ROWS, FILES = 5, 4
"""Of the rows of a unit, and of the files of the corpus where they are not small."""
TOGETHER = 4
"""So many units of small files would have as many rows as a unit may, so that they can travel together."""
CORPUS = "corpus"
WORKER_TITLE, IDLE_TITLE = "ray::MapWorker", "ray::IDLE"
LEASE_SECONDS = 6
"""Short, so that outages of the store can be longer."""


@dataclass
class Scene:
    """All that can die, but for the driver, and what is embedded."""

    nodes: RayNodes
    store: MortalS3
    proxy: FaultyProxy
    model: Path
    units: int
    unit_rows: int
    rows: list[dict[str, Any]]

    def command(self, output: str) -> list[str]:
        """The arguments of the job, the same each time but for its output."""
        return [
            *("--input", f"s3://{self.bucket}/{CORPUS}", "--output", f"s3://{self.bucket}/{output}", "--model", str(self.model)),
            *("--id-column", "id", "--unit-rows", str(self.unit_rows), "--workers", str(NODES), "--cpus-per-worker", "1"),
            *("--lease-seconds", str(LEASE_SECONDS), "--progress", "log"),
        ]

    def environment(self) -> dict[str, str]:
        """Variables of a driver: it joins the cluster and reaches the store through the proxy."""
        return {**self.nodes.environment(), **_through(self.proxy, self.store)}

    @property
    def bucket(self) -> str:
        """Where everything is."""
        return self.store.server.shared_bucket

    def objects(self, folder: str) -> dict[str, bytes]:
        """Everything below a folder, by relative name, asked from the server itself."""
        client = self.store.server.client()
        return {name: client.get_object(Bucket=self.bucket, Key=f"{folder}/{name}")["Body"].read() for name in listing(client, folder)}

    def asking(self) -> psutil.Process | None:
        """The process whose request the proxy has in hand, in the thread that asks; None where it is gone."""
        port = self.proxy.exchange.client_port
        for each in psutil.net_connections("tcp4"):
            if each.laddr.port == port and each.raddr and each.raddr.port == self.proxy.server_port and each.pid:
                with suppress(psutil.NoSuchProcess):
                    return psutil.Process(each.pid)
        return None

    def node_of(self, process: psutil.Process | None) -> int:
        """The raylet of the node that a worker process belongs to; some node's for a process of none."""
        with suppress(psutil.NoSuchProcess):
            parent = process.ppid() if process else 0
            if parent in self.nodes.raylets:
                return parent
        return self.nodes.raylets[0]


def listing(client: Any, folder: str, bucket: str = "tests") -> dict[str, str]:
    """Names below a folder, relative to it, each with a version."""
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{folder}/")
    found = (each for page in pages for each in page.get("Contents", []))
    return {each["Key"].removeprefix(f"{folder}/"): f"{each['ETag']} {each['LastModified']}" for each in found}


def is_reader(process: psutil.Process) -> bool:
    """Whether it reads source rows for the job: a Ray worker process with a task that is none of the encoders."""
    title = _title(process)
    return title.startswith("ray::") and not title.startswith((WORKER_TITLE, IDLE_TITLE))


def is_worker(process: psutil.Process) -> bool:
    """Whether it is one of the job's workers."""
    return _title(process).startswith(WORKER_TITLE)


def _title(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def _through(proxy: FaultyProxy, store: MortalS3) -> dict[str, str]:
    return {**store.server.environment(), "AWS_ENDPOINT_URL": proxy.endpoint}


@contextmanager
def scene(model: Path, units: int, *, small_files: bool = False) -> Iterator[Scene]:
    """Set it up, with a corpus of `units` work units, each a file of its own if they are `small_files`; when the block is left, nothing of
    it runs any more.
    """
    with ExitStack() as stack:
        store = stack.enter_context(mortal_s3_server())
        proxy = stack.enter_context(faulty_proxy(store.server.endpoint))
        nodes = stack.enter_context(ray_nodes(NODES, NODE_CPUS, _through(proxy, store)))
        rows = _rows(units * UNIT_ROWS)
        client = store.server.client()
        files = units if small_files else FILES
        for number in range(files):
            part = pa.Table.from_pylist(rows[number * len(rows) // files : (number + 1) * len(rows) // files])
            body = parquet(part, row_group_rows=4 * UNIT_ROWS)
            client.put_object(Bucket=store.server.shared_bucket, Key=f"{CORPUS}/part-{number}.parquet", Body=body)
        yield Scene(nodes, store, proxy, model, units, UNIT_ROWS * (TOGETHER if small_files else 1), rows)


def _rows(count: int) -> list[dict[str, Any]]:
    """Rows of which some have no text, so that most units have a row to reject, and some have none."""
    return [row | ({"text": None} if row["id"] % 7 == 3 else {}) for row in numbered(list(sentences(count, seed=11)))]
