"""Input URIs to source files: what there is to read, and which version of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from glob import has_magic
from typing import Any, BinaryIO, cast

import fsspec
import pyarrow as pa

from embedding.corpus.storage import explained, filesystem_of, is_local, with_retries
from embedding.errors import CorpusError, SourceChangedError, SourceError, StorageError

PARQUET_SUFFIXES = (".parquet", ".parq", ".pq")
_VERSION_KEYS = ("ETag", "etag", "generation", "md5Hash", "content_md5", "mtime", "LastModified", "last_modified", "updated", "created")


@dataclass(frozen=True, slots=True, order=True)
class Source:
    """One Parquet file of the corpus, as it stood when it was listed."""

    path: str
    """Path below the input that matched it, with forward slashes; what shards are named after."""
    uri: str
    size: int
    """Bytes."""
    version: str
    """ETag, generation or modification time: changes whenever the content does."""


def list_sources(inputs: Iterable[str]) -> list[Source]:
    """All source files of the inputs, each once, in the order of their paths.

    Raises:
        CorpusError: an input does not exist or matches no Parquet file.
    """
    sources: dict[str, Source] = {}
    for url in inputs:
        found = list(_list_input(url))
        if not found:
            raise CorpusError(f"--input {url} matches no Parquet file ({', '.join(PARQUET_SUFFIXES)}); check the path")
        for source in found:
            sources.setdefault(source.uri, source)
    return sorted(sources.values())


def _list_input(url: str) -> Iterator[Source]:
    fs, path = filesystem_of(url)
    try:
        with explained(f"listing --input {url}"):
            found, root = with_retries(lambda: _find(fs, path))
    except StorageError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise CorpusError(f"--input {url} does not exist; check the path") from error
        raise
    for file, info in found.items():
        relative = file.removeprefix(root).lstrip("/")
        yield Source(path=relative, uri=str(fs.unstrip_protocol(file)), size=int(info["size"]), version=version_of(info))


def _find(fs: fsspec.AbstractFileSystem, path: str) -> tuple[dict[str, dict[str, Any]], str]:
    """Files with their details, and the folder that their names are relative to."""
    if has_magic(path):
        fixed = path[: min(path.index(char) for char in "*?[" if char in path)]
        found = fs.glob(path, detail=True)
        return {file: info for file, info in found.items() if info["type"] == "file" and not _hidden(file, fixed)}, fixed.rpartition("/")[0]
    info = fs.info(path)
    if info["type"] == "file":
        return {info["name"]: info}, info["name"].rpartition("/")[0]
    root = info["name"].rstrip("/")
    found = fs.find(root, detail=True)
    return {file: info for file, info in found.items() if file.lower().endswith(PARQUET_SUFFIXES) and not _hidden(file, root)}, root


def _hidden(file: str, root: str) -> bool:
    """Whether a part of the path below `root` begins with _ or ., as markers and unfinished files of other tools do.

    A hive segment may begin with an underscore (_year=2025).
    """
    parts = file.removeprefix(root).lstrip("/").split("/")
    return any(part.startswith(".") or (part.startswith("_") and "=" not in part) for part in parts)


def version_of(info: dict[str, Any]) -> str:
    """The version of a file from its file system's details."""
    for key in _VERSION_KEYS:
        if info.get(key) is not None:
            return str(info[key]).strip('"')
    return ""


def open_source(source: Source) -> pa.NativeFile | BinaryIO:
    """The file, open for ranged reads; the caller closes it.

    On S3 every ranged read carries If-Match, so that a replacement in mid-read is noticed there too.

    Raises:
        SourceChangedError: the file is not the one that was listed.
        SourceError: it is gone or cannot be opened.
    """
    fs, path = filesystem_of(source.uri)
    try:
        with explained(f"opening {source.uri}"):
            info = with_retries(lambda: fs.info(path))
            require_unchanged(source, info)
            if is_local(fs):
                return pa.OSFile(path)
            return cast(BinaryIO, fs.open(path, "rb", cache_type="none"))
    except StorageError as error:
        raise SourceError(str(error)) from error


def require_unchanged(source: Source, info: dict[str, Any] | None = None) -> None:
    """Check the file against what was listed.

    Raises:
        SourceChangedError: size or version differ.
    """
    if info is None:
        fs, path = filesystem_of(source.uri)
        with explained(f"checking {source.uri}"):
            info = with_retries(lambda: fs.info(path))
    if (int(info["size"]), version_of(info)) != (source.size, source.version):
        raise SourceChangedError(f"{source.uri} was replaced after it was listed; run again to plan it anew")
