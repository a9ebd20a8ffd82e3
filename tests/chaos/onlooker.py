"""A reader that knows nothing of the job and opens every file it finds in data/: each must be whole, always."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from botocore.exceptions import BotoCoreError, ClientError

from embedding.corpus.shards.parquet import PARQUET
from tests.chaos.scene import listing

LOOK_SECONDS = 0.25


class Onlooker:
    """Opens each file once for each version of it."""

    def __init__(self, client: Any, bucket: str, output: str) -> None:
        self._client = client
        self._bucket = bucket
        self._output = output
        self._seen: dict[str, str] = {}
        self.looks = 0
        """Files that were opened."""
        self.faults: list[str] = []
        """Files that were not what a reader expects, and why."""

    def look_round(self) -> None:
        """List data/ and open what is new; a store that is down has nothing to show."""
        try:
            found = listing(self._client, f"{self._output}/data", self._bucket)
            for name, version in found.items():
                if self._seen.get(name) != version:
                    self.look_at(f"data/{name}")
                    self._seen[name] = version
        except (BotoCoreError, ClientError):
            return

    def look_at(self, name: str) -> None:
        """Open one file.

        Raises:
            BotoCoreError, ClientError: the store is down.
        """
        data = self._client.get_object(Bucket=self._bucket, Key=f"{self._output}/{name}")["Body"].read()
        self.looks += 1
        if fault := fault_of(data):
            self.faults.append(f"{name}: {fault}")

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Look round again and again until the block is left."""
        over = threading.Event()

        def keep_looking() -> None:
            while not over.wait(LOOK_SECONDS):
                self.look_round()

        thread = threading.Thread(target=keep_looking, name="onlooker")
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


def fault_of(data: bytes) -> str:
    """Why the bytes are no whole shard; empty where they are one."""
    try:
        rows = pq.read_table(io.BytesIO(data)).num_rows
        footer = PARQUET.facts(io.BytesIO(data))
        claimed = footer["unit"]["num_rows"] - footer["record"]["rejected"]
    except (pa.ArrowException, OSError, KeyError) as error:
        return f"{type(error).__name__}: {error}"
    return "" if rows == claimed else f"{rows} rows, but its footer says {claimed}"
