"""What a folder or a glob holds, by the listings of its file system.

fsspec's own `find` and `glob` take a folder that they may not list for an empty one, and leave out links to files: a corpus that
lacks rows for that would look complete. So on disks the folders are walked here, and globs are matched one level after another.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Collection, Iterable, Iterator
from glob import has_magic
from typing import Any, TypeAlias

import fsspec
from fsspec.spec import AbstractFileSystem
from fsspec.utils import glob_translate

from embedding.corpus.storage import is_local

Info: TypeAlias = dict[str, Any]
"""What a file system says of an entry, and as `real` the path that it has without any links."""
Details: TypeAlias = dict[str, Info]
"""Entries by their path on the file system."""

FILE, FOLDER, BROKEN_LINK = "file", "directory", "link"
"""Types of entries; pipes and the like have others."""
_LEADS_NOWHERE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP})


def is_hidden(path: str) -> bool:
    """Whether a part of the relative path begins with _ or ., as markers and unfinished files of other tools do.

    A hive segment may begin with an underscore (_year=2025).
    """
    return any(part.startswith(".") or (part.startswith("_") and "=" not in part) for part in path.split("/"))


def relative(path: str, folder: str) -> str:
    """The path below the folder that it lies in."""
    return path.removeprefix(folder).lstrip("/")


def files_below(fs: fsspec.AbstractFileSystem, folder: str) -> Details:
    """All files below `folder`, whatever they are called; on disks those behind links too, and links that lead nowhere.

    Raises:
        OSError: a folder cannot be listed.
    """
    if fs.async_impl or type(fs).find is not AbstractFileSystem.find:  # an object store, which lists all of it at once
        found = _with_real(fs, fs.find(folder, detail=True).values(), folder)
    else:
        found = _walk(fs, folder, {os.path.realpath(folder)})
    return {info["name"]: info for info in found if info["type"] in (FILE, BROKEN_LINK)}


def matching(fs: fsspec.AbstractFileSystem, pattern: str) -> Iterator[Info]:
    """The files and folders that match a glob, and with ** the files alone: * ? [] match within a name, ** any number of folders.

    A hidden name matches where its part of the pattern begins like it (_*.parquet), as in a shell.

    Raises:
        OSError: a folder cannot be listed.
        ValueError: ** is not a whole part of the pattern.
    """
    parts = pattern.split("/")
    first = next(place for place, part in enumerate(parts) if has_magic(part))
    yield from _matching(fs, "/".join(parts[:first]) or fs.root_marker, parts[first:])


def _matching(fs: fsspec.AbstractFileSystem, folder: str, parts: list[str]) -> Iterator[Info]:
    part, *rest = parts
    if "**" in part:
        matches = re.compile(glob_translate("/".join(parts))).match
        for file, info in files_below(fs, folder).items():
            if matches(below := relative(file, folder)) and not is_hidden(below):
                yield info
    elif rest and not has_magic(part):
        yield from _matching(fs, f"{folder}/{part}", rest)
    else:
        for info in _entries(fs, folder, part):
            if not rest:
                yield info
            elif info["type"] == FOLDER:
                yield from _matching(fs, info["name"], rest)


def _entries(fs: fsspec.AbstractFileSystem, folder: str, part: str) -> Iterator[Info]:
    """Those of a folder whose names match; none where there is no such folder."""
    begun = re.split(r"[*?[]", part, maxsplit=1)[0]
    matches = re.compile(glob_translate(part)).match
    try:
        if begun and "s3" in fs.protocol:  # which then lists no others
            listed = fs.find(folder, maxdepth=1, withdirs=True, prefix=begun, detail=True).values()
        else:
            listed = fs.ls(folder, detail=True)
    except (FileNotFoundError, NotADirectoryError):
        return
    for info in _with_real(fs, listed, folder):
        above, _, name = info["name"].rstrip("/").rpartition("/")
        if above == folder.rstrip("/") and matches(name) and (part.startswith(name[0]) or not is_hidden(name)):
            yield info


def _walk(fs: fsspec.AbstractFileSystem, folder: str, above: Collection[str]) -> Iterator[Info]:
    """All entries but folders; `above` are the real paths that must not be entered again, where a link leads up."""
    for info in _with_real(fs, fs.ls(folder, detail=True), folder):
        if info["type"] != FOLDER:
            yield info
        elif info["real"] not in above:
            yield from _walk(fs, info["name"], {*above, info["real"]})


def _with_real(fs: fsspec.AbstractFileSystem, listed: Iterable[Info], folder: str) -> Iterator[Info]:
    """The entries of a folder; links as what they lead to, which is what is read later."""
    real = os.path.realpath(folder).rstrip("/") if is_local(fs) else ""
    for info in listed:
        if info.get("islink"):
            yield _followed(fs, info) | {"real": os.path.realpath(info["name"])}
        else:
            yield info | {"real": f"{real}/{info['name'].rpartition('/')[2]}" if is_local(fs) else info["name"]}


def _followed(fs: fsspec.AbstractFileSystem, link: Info) -> Info:
    try:
        return dict(fs.info(link["name"]))
    except OSError as error:
        if error.errno not in _LEADS_NOWHERE:
            raise
        return link | {"type": BROKEN_LINK}
