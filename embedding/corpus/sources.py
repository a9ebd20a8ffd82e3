"""Input URIs to source files: what there is to read, and which version of it."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from glob import has_magic
from itertools import islice
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import fsspec
import pyarrow as pa

from embedding.corpus.formats.names import AUTO, Format, format_by_name, format_of
from embedding.corpus.listing import BROKEN_LINK, FILE, FOLDER, Details, files_below, is_hidden, matching, relative
from embedding.corpus.requests import WRONG_PATH, explained, with_retries
from embedding.corpus.storage import filesystem_of, is_local
from embedding.corpus.tables.found import is_metadata, refuse_below, refuse_inside, tables_in, up_to_a_table, url_of
from embedding.corpus.tables.read import read_table
from embedding.corpus.tables.table import REWRITE, Kind, Table
from embedding.errors import CorpusError, SourceChangedError, count

if TYPE_CHECKING:
    from embedding.corpus.hub import Pinned

log = logging.getLogger(__name__)

_VERSION_KEYS = (
    *("ETag", "etag", "generation", "md5Hash", "content_md5", "mtime", "LastModified", "last_modified", "updated", "created"),
    "blob_id",
)

_HUB = "hf://"
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
    """ETag, generation, modification time or hash: changes whenever the content does."""
    at: str = ""
    """Where exactly this version can be read whatever becomes of `uri`: a hub's URL with the commit; empty on other stores."""


@dataclass(frozen=True)
class Listing:
    """What the inputs hold."""

    sources: list[Source]
    versions: dict[str, str] = field(default_factory=dict)
    """By input, those that have a version as a whole: tables, and datasets of the hub."""


def absolute(url: str) -> str:
    """The URL or path with nothing left that depends on where the process runs."""
    fs, path = filesystem_of(url)
    return str(fs.unstrip_protocol(path)).removeprefix("file://")


@dataclass(frozen=True)
class _Listed:
    source: Source
    named: bool
    """By the input itself, a glob or a table's log, and not found in a folder: taken whatever its suffix."""
    content: str
    """The same for all names of a file: on a disk its path without links, on a store its URI."""
    is_link: bool
    """Reached by a link below the input."""


@dataclass(frozen=True)
class _Found:
    """What an input matches, by the file system's listings."""

    root: str
    """The folder that names are relative to."""
    files: Details
    """Those that are named."""
    folders: dict[str, Details]
    """Every folder with all files in it."""
    around: tuple[str, ...]
    """Folders that would be tables if what was found were part of one."""
    metadata: str | None = None
    """The metadata file of an Iceberg table, where the input names that instead of the folder."""


def list_sources(inputs: Iterable[str], asked: str = AUTO) -> list[Source]:
    """The sources of `list_inputs`."""
    return list_inputs(inputs, asked).sources


def list_inputs(inputs: Iterable[str], asked: str = AUTO, needed: Collection[str] = ()) -> Listing:
    """All source files of the inputs, each once, in the order of their paths.

    Of a folder, these are the files of the format that was asked for, or that `format_of` finds; of a table those that are in its
    newest version, where `needed` says which columns are read of it (all of them, where empty).

    Raises:
        CorpusError: an input does not exist or matches no file of the format, there are several formats, or it is a table that is not read.
        ConfigError: it is a table whose library is not installed.
    """
    versions: dict[str, str] = {}
    listed = {url: sorted(_list_input(url, needed, versions), key=lambda each: (each.is_link, each.source.path)) for url in inputs}
    wanted = format_of((each.source.uri for found in listed.values() for each in found), asked)
    sources: dict[str, Source] = {}
    links = 0
    for url, found in listed.items():
        taken = [each for each in found if each.named or format_by_name(each.source.path) == wanted]
        if not taken:
            others = f", or set --input-format to {format_by_name(found[0].source.path)}" if found else ""
            sought = f"{wanted.label} file ({', '.join(wanted.suffixes)})" if asked != AUTO or any(listed.values()) else _ANY
            raise CorpusError(f"--input {url} matches no {'file' if _is_pattern(url) else sought}; check the path{others}")
        for each in taken:
            source = each.source
            first = sources.setdefault(each.content, source)
            links += first.uri != source.uri
            if first.version != source.version:
                raise CorpusError(
                    f"--input {url} names {source.uri} in a different version than an earlier input does; use one revision of it"
                )
    if links:
        log.info("left out %s to files that are read by another name", count(links, "link"))
    return Listing(sorted(sources.values()), versions)


def _is_pattern(url: str) -> bool:
    """Whether it takes files of any name, as a glob does where no file has its name."""
    fs, path = filesystem_of(url)
    return has_magic(path) and not fs.exists(path)


def _list_input(url: str, needed: Collection[str], versions: dict[str, str]) -> Iterator[_Listed]:
    pinned = _pinned(url)
    fs, path = filesystem_of(pinned.url if pinned else url)
    with explained(f"listing --input {url}"):
        try:
            found = with_retries(lambda: _found_on_hub(fs, path, url) if pinned else _found(fs, path, url))
        except WRONG_PATH as error:
            raise CorpusError(f"--input {url} does not exist; check the path") from error
    if pinned:
        versions[url] = f"commit {pinned.commit}"
    named = dict(found.files)
    others: Details = {}
    root = os.path.realpath(found.root).rstrip("/")
    for folder, files in found.folders.items():
        tables = {folder: Kind.ICEBERG} if found.metadata else tables_in(files)
        if folder in tables:
            given = url if len(found.folders) == 1 else url_of(fs, folder)
            named |= _live_files(fs, Table(given, tables[folder], folder, found.metadata), files, needed, versions)
        else:  # a table in a hidden folder is left out like everything there
            refuse_below(url, fs, {table: kind for table, kind in tables.items() if not is_hidden(relative(table, folder))})
            seen = {file: info for file, info in files.items() if not is_hidden(relative(file, folder))}
            others |= {file: info for file, info in seen.items() if format_by_name(file) is not None}
    for file, info in {**others, **named}.items():
        uri = str(fs.unstrip_protocol(file))
        try:
            uri.encode()
        except UnicodeEncodeError:
            raise CorpusError(f"{uri!a} has a name that is not UTF-8; rename the file") from None
        if info["type"] == BROKEN_LINK:
            raise CorpusError(f"{uri} is a link to {info['destination']}, which does not exist; fetch that file, or remove the link")
        place = (pinned.unpinned(uri), uri) if pinned else (uri, "")
        source = Source(relative(file, found.root), place[0], int(info["size"]), version_of(info), place[1])
        content = info.get("real") or os.path.realpath(file) if is_local(fs) else place[0]
        yield _Listed(source, file in named, content, is_link=is_local(fs) and content != f"{root}/{source.path}")
    if pinned:
        fs.invalidate_cache()  # the library keeps listings, and copies them for every thread


def _live_files(
    fs: fsspec.AbstractFileSystem, table: Table, listed: Details, needed: Collection[str], versions: dict[str, str]
) -> dict[str, dict[str, Any]]:
    """The files of a table that are in its newest version, which is noted; those that came since it was listed are looked up."""
    live = read_table(table, fs, listed, needed)
    url = url_of(fs, table.folder)
    versions[url] = f"{table.kind} {live.version}"
    files = {file: listed.get(file) or _details(fs, file, table.given) for file in live.files}
    log.info("reading %s at %s, which has %s", url, versions[url], count(len(files), "file"))
    return files


def _details(fs: fsspec.AbstractFileSystem, file: str, given: str) -> dict[str, Any]:
    with explained(f"listing --input {given}"):
        try:
            return cast(dict[str, Any], with_retries(lambda: fs.info(file)))
        except FileNotFoundError as error:
            raise CorpusError(
                f"--input {given} lists {file}, which does not exist, perhaps because it belongs to another table; {REWRITE}"
            ) from error


def _pinned(url: str) -> Pinned | None:
    """An input on the hub, at the commit of now; None for any other input."""
    if not url.startswith(_HUB):
        return None
    from embedding.corpus import hub  # its library takes a third of a second to import

    return hub.pin(url)


def _found_on_hub(fs: fsspec.AbstractFileSystem, path: str, given: str) -> _Found:
    from embedding.corpus import hub

    with hub.as_of_a_store(f"--input {given}"):
        return _found(fs, path, given)


def _found(fs: fsspec.AbstractFileSystem, path: str, given: str) -> _Found:
    found = _find(fs, path, given)
    refuse_inside(given, fs, found.around)
    return found


def _find(fs: fsspec.AbstractFileSystem, path: str, given: str) -> _Found:
    try:
        info = fs.info(path)
    except FileNotFoundError:
        if not has_magic(path):
            raise
        if part := next((part for part in path.split("/") if "**" in part and part != "**"), ""):
            raise CorpusError(f"--input {given} has {part!r}, but ** stands for folders alone; write **/ before the rest") from None
        return _glob(fs, path)
    name = info["name"].rstrip("/")
    if info["type"] != "file":
        return _Found(name, {}, {name: files_below(fs, name)}, tuple(islice(up_to_a_table(name), 1, None)))
    if is_metadata(name):
        table = name.rpartition("/metadata/")[0]
        return _Found(table, {}, {table: files_below(fs, table)}, (), name)
    return _Found(name.rpartition("/")[0], {name: info}, {}, ())


def _glob(fs: fsspec.AbstractFileSystem, pattern: str) -> _Found:
    """The files that match, whatever their suffix, and the folders that match."""
    root = pattern[: min(pattern.index(char) for char in "*?[" if char in pattern)].rpartition("/")[0]
    files: Details = {}
    folders: dict[str, Details] = {}
    for info in matching(fs, pattern):
        if info["type"] in (FILE, BROKEN_LINK):
            files[info["name"]] = info
        elif info["type"] == FOLDER:
            folders[info["name"]] = files_below(fs, info["name"])
    first = (path.rpartition("/")[0] for path in islice(files, 1))
    around = dict.fromkeys(folder for start in (root, *first) for folder in up_to_a_table(start))
    return _Found(root, files, folders, tuple(around))


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
    if source.at:
        from embedding.corpus import hub

        return cast(BinaryIO, hub.open_at(source.at, source.size))
    fs, path = filesystem_of(source.uri)
    require_unchanged(source)
    with explained(f"opening {source.uri}"):
        if is_local(fs):
            return pa.OSFile(path)
        return cast(BinaryIO, with_retries(lambda: fs.open(path, "rb", cache_type="none")))


def require_unchanged(source: Source) -> None:
    """Check the file against what was listed; where that can be read whatever happens, there is nothing to check.

    Raises:
        SourceChangedError: size or version differ, or it is gone.
        StorageError: the store does not answer.
    """
    if source.at:
        return
    fs, path = filesystem_of(source.uri)
    with explained(f"checking {source.uri}"):
        try:
            info = with_retries(lambda: fs.info(path))
        except FileNotFoundError as error:
            raise SourceChangedError(f"{source.uri} was removed after it was listed; run again to continue without it") from error
    if (int(info["size"]), version_of(info)) != (source.size, source.version):
        raise SourceChangedError(f"{source.uri} was replaced after it was listed; run again to read the new version")
