"""Input URIs to source files: what there is to read, and which version of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from glob import has_magic
from typing import Any, BinaryIO, cast

import fsspec
import pyarrow as pa

from embedding.corpus.formats.names import AUTO, Format, format_by_name, format_of
from embedding.corpus.requests import WRONG_PATH, explained, with_retries
from embedding.corpus.storage import filesystem_of, is_local
from embedding.errors import CorpusError, SourceChangedError

_VERSION_KEYS = ("ETag", "etag", "generation", "md5Hash", "content_md5", "mtime", "LastModified", "last_modified", "updated", "created")


_ANY = f"file that ends in {', '.join(suffix for kind in Format for suffix in kind.suffixes)}"


@dataclass(frozen=True, slots=True, order=True)
class Source:
    """One file of the corpus, as it stood when it was listed."""

    path: str
    """Path below the input that matched it, with forward slashes; what shards are named after."""
    uri: str
    size: int
    """Bytes."""
    version: str
    """ETag, generation or modification time: changes whenever the content does."""


def absolute(url: str) -> str:
    """The URL or path with nothing left that depends on where the process runs."""
    fs, path = filesystem_of(url)
    return str(fs.unstrip_protocol(path)).removeprefix("file://")


@dataclass(frozen=True, slots=True)
class _Listed:
    source: Source
    named: bool
    """By the input itself or a glob, and not found in a folder: taken whatever its suffix."""


def list_sources(inputs: Iterable[str], asked: str = AUTO) -> list[Source]:
    """All source files of the inputs, each once, in the order of their paths.

    Of a folder, these are the files of the format that was asked for, or that `format_of` finds.

    Raises:
        CorpusError: an input does not exist or matches no file of the format, or there are several formats.
    """
    listed = {url: list(_list_input(url)) for url in inputs}
    wanted = format_of((each.source.uri for found in listed.values() for each in found), asked)
    sources: dict[str, Source] = {}
    for url, found in listed.items():
        taken = [each.source for each in found if each.named or format_by_name(each.source.path) == wanted]
        if not taken:
            others = f", or say --input-format {format_by_name(found[0].source.path)}" if found else ""
            sought = f"{wanted.label} file ({', '.join(wanted.suffixes)})" if asked != AUTO or any(listed.values()) else _ANY
            raise CorpusError(f"--input {url} matches no {'file' if _is_pattern(url) else sought}; check the path{others}")
        for source in taken:
            sources.setdefault(source.uri, source)
    return sorted(sources.values())


def _is_pattern(url: str) -> bool:
    """Whether it takes files of any name, as a glob does where no file has its name."""
    fs, path = filesystem_of(url)
    return has_magic(path) and not fs.exists(path)


def _list_input(url: str) -> Iterator[_Listed]:
    fs, path = filesystem_of(url)
    with explained(f"listing --input {url}"):
        try:
            found, root, named = with_retries(lambda: _find(fs, path))
        except WRONG_PATH as error:
            raise CorpusError(f"--input {url} does not exist; check the path") from error
    for file, info in found.items():
        uri = str(fs.unstrip_protocol(file))
        try:
            uri.encode()
        except UnicodeEncodeError:
            raise CorpusError(f"{uri!a} has a name that is not UTF-8; rename the file") from None
        source = Source(path=file.removeprefix(root).lstrip("/"), uri=uri, size=int(info["size"]), version=version_of(info))
        yield _Listed(source, file in named)


def _find(fs: fsspec.AbstractFileSystem, path: str) -> tuple[dict[str, dict[str, Any]], str, set[str]]:
    """Files with their details, the folder that their names are relative to, and those that were named and not found in a folder."""
    try:
        info = fs.info(path)
    except FileNotFoundError:
        if not has_magic(path):
            raise
        return _glob(fs, path)
    if info["type"] == "file":
        return {info["name"]: info}, info["name"].rpartition("/")[0], {info["name"]}
    root = info["name"].rstrip("/")
    return _below(fs, root, root), root, set()


def _glob(fs: fsspec.AbstractFileSystem, pattern: str) -> tuple[dict[str, dict[str, Any]], str, set[str]]:
    """The files that match, whatever their suffix, and the files of known formats below the folders that match."""
    fixed = pattern[: min(pattern.index(char) for char in "*?[" if char in pattern)]
    found: dict[str, dict[str, Any]] = {}
    named: set[str] = set()
    for path, info in fs.glob(pattern, detail=True).items():
        if not _hidden(path, fixed):
            if info["type"] == "file":
                found[path] = info
                named.add(path)
            elif "**" not in pattern:  # which matches the files below as well
                found |= _below(fs, path, fixed)
    return found, fixed.rpartition("/")[0], named


def _below(fs: fsspec.AbstractFileSystem, folder: str, root: str) -> dict[str, dict[str, Any]]:
    """The files of known formats below `folder`."""
    found = _walk(fs, folder) if is_local(fs) else fs.find(folder, detail=True).values()
    return {
        info["name"]: info
        for info in found
        if info["type"] == "file" and format_by_name(info["name"]) is not None and not _hidden(info["name"], root)
    }


def _walk(fs: fsspec.AbstractFileSystem, folder: str) -> Iterator[dict[str, Any]]:
    """Like fsspec's `find`, which leaves out a local folder that can not be read, and its rows with it."""
    for info in fs.ls(folder, detail=True):
        if info["type"] == "directory":
            yield from _walk(fs, info["name"])
        else:
            yield info


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
        SourceChangedError: the file is not the one that was listed, or gone.
        StorageError: the store does not answer.
    """
    fs, path = filesystem_of(source.uri)
    require_unchanged(source)
    with explained(f"opening {source.uri}"):
        if is_local(fs):
            return pa.OSFile(path)
        return cast(BinaryIO, with_retries(lambda: fs.open(path, "rb", cache_type="none")))


def require_unchanged(source: Source) -> None:
    """Check the file against what was listed.

    Raises:
        SourceChangedError: size or version differ, or it is gone.
        StorageError: the store does not answer.
    """
    fs, path = filesystem_of(source.uri)
    with explained(f"checking {source.uri}"):
        try:
            info = with_retries(lambda: fs.info(path))
        except FileNotFoundError as error:
            raise SourceChangedError(f"{source.uri} was removed after it was listed; run again to plan it anew") from error
    if (int(info["size"]), version_of(info)) != (source.size, source.version):
        raise SourceChangedError(f"{source.uri} was replaced after it was listed; run again to plan it anew")
