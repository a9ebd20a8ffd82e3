"""What a test finds in an output folder, local or on S3."""

from __future__ import annotations

import io
import json
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq


def filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of an output, without a cache of listings, and the path on it."""
    fs, path = fsspec.url_to_fs(url, **({"use_listings_cache": False} if url.startswith("s3://") else {}))
    return fs, str(path)


def files(url: str, below: str = "") -> dict[str, bytes]:
    """Every file below the folder, by relative name."""
    fs, path = filesystem(url)
    found = fs.find(f"{path}/{below}".rstrip("/"))
    return {name.removeprefix(f"{path}/"): fs.cat_file(name) for name in sorted(found)}


def shards(url: str) -> dict[str, bytes]:
    """Every file in data/, by name: whatever stands there, finished or not."""
    return files(url, "data")


def versions(url: str) -> dict[str, tuple[str, ...]]:
    """When each shard was written: changes if it is put again, even with the same bytes."""
    fs, path = filesystem(url)
    found = fs.find(f"{path}/data", detail=True)
    return {
        name.removeprefix(f"{path}/"): tuple(str(info.get(key)) for key in ("ino", "mtime", "LastModified")) for name, info in found.items()
    }


def table(url: str) -> pa.Table:
    """All rows of the output, shards in the order of their names."""
    return pa.concat_tables([pq.read_table(io.BytesIO(data)) for data in shards(url).values()], promote_options="default")


def control(url: str, name: str) -> pa.Table:
    """All rows of the Parquet files below _control/<name>, or of that file."""
    return pa.concat_tables([pq.read_table(io.BytesIO(data)) for data in files(url, f"_control/{name}").values()])


def document(url: str, name: str) -> dict[str, Any]:
    """A JSON file of the output."""
    fs, path = filesystem(url)
    content: dict[str, Any] = json.loads(fs.cat_file(f"{path}/{name}"))
    return content
