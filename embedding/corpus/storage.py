"""A folder on a local disk or an object store: whole-object puts, conditional puts, listings.

Nothing here streams into a final name. A shard, a record, a manifest is first complete in memory, then put whole, so that
no reader ever sees a part of it: object stores make one PUT visible at once, a local disk does so for a rename.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec
from fsspec.core import split_protocol

from embedding.corpus.requests import explained, with_retries
from embedding.errors import ConfigError

TEMPORARY = "_control/tmp"
"""Where an output keeps what is not finished; emptied when a run completes."""

_SINGLE_PUT_BYTES = 2**31
"""s3fs cuts larger values into parts; below this one PUT makes the object visible, and nothing is left behind by a death."""

DELETIONS = 1000
"""So many objects are deleted in one request, S3's limit."""

_SHOWN_TYPES = {".html": "text/html; charset=utf-8", ".json": "application/json"}
"""What a browser is told of an object, so that it shows it: without a type it saves it as a file."""


def filesystem_of(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a local path or fsspec URL, and the path on it (absolute and free of `..` and `//` for a local one).

    Credentials and endpoints come from where the protocol's library looks for them (for S3: AWS_* variables, profiles,
    instance roles), in every process anew, so that no secret travels with a unit.

    Raises:
        ConfigError: the protocol is unknown or its library is not installed.
    """
    protocol = split_protocol(url)[0] or "file"
    options: dict[str, Any] = {"use_listings_cache": False}
    if protocol in ("s3", "s3a"):
        from embedding.corpus import s3

        options["config_kwargs"] = s3.client_options(fsspec.config.conf.get("s3", {}).get("config_kwargs", {}))
    try:
        kind = fsspec.get_filesystem_class(protocol)  # not `url_to_fs`, for which :: in a name begins another URL
        fs = kind(**kind._get_kwargs_from_urls(url), **options)
        path = kind._strip_protocol(url)
    except (ValueError, ImportError) as error:
        raise ConfigError(f"{url} cannot be opened: {error}") from error
    if protocol in ("s3", "s3a"):
        fs.retries = 1  # s3fs' own tries would multiply with botocore's and ours
    return fs, os.path.normpath(path) if is_local(fs) else str(path)


def is_local(fs: fsspec.AbstractFileSystem) -> bool:
    """Whether the file system is this machine's own (a mounted network disk included)."""
    protocols = (fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol
    return "file" in protocols


def open_storage(url: str, *, temporary_folder: str | None = None) -> Storage:
    """The folder `url` names.

    On a local disk, files are completed in `temporary_folder` (relative to it; else beside their final name) and then renamed.

    Raises:
        ConfigError: the protocol is unknown or its library is not installed.
    """
    fs, path = filesystem_of(url)
    return LocalStorage(fs, path, temporary_folder) if is_local(fs) else Storage(fs, path)


class Storage:
    """A folder on an object store. Names are relative to it, with forward slashes."""

    def __init__(self, fs: fsspec.AbstractFileSystem, root: str) -> None:
        self._fs = fs
        self._root = root.rstrip("/")

    @property
    def url(self) -> str:
        """The folder's full URL (s3://bucket/out, or a plain path on a local disk)."""
        return str(self._fs.unstrip_protocol(self._root)).removeprefix("file://")

    @property
    def _is_s3(self) -> bool:
        return "s3" in self._fs.protocol

    def path(self, name: str) -> str:
        """The name's path on the file system."""
        return f"{self._root}/{name}"

    def list(self, prefix: str) -> dict[str, int]:
        """Names and sizes in bytes of everything below the folder `prefix`, sorted by name; empty where there is no such folder."""
        return {name: info["size"] for name, info in self.details(prefix).items()}

    def details(self, prefix: str) -> dict[str, dict[str, Any]]:
        """The same with all that the file system says of each."""
        with explained(f"listing {self.url}/{prefix}"):
            found = with_retries(lambda: self._fs.find(self.path(prefix), detail=True))
        start = len(self._root) + 1
        return {path[start:]: info for path, info in sorted(found.items()) if info["type"] == "file"}

    def exists(self, name: str) -> bool:
        """Whether there is such an object."""
        with explained(f"looking for {self.url}/{name}"):
            return bool(with_retries(lambda: self._fs.exists(self.path(name))))

    def read(self, name: str) -> bytes | None:
        """The object's bytes, None where there is none."""
        with explained(f"reading {self.url}/{name}"):
            try:
                return bytes(with_retries(lambda: self._fs.cat_file(self.path(name))))
            except (FileNotFoundError, NotADirectoryError):
                return None

    def open(self, name: str) -> BinaryIO:
        """The object, open for ranged reads: nothing is read ahead."""
        options = {"cache_type": "none"} if self._is_s3 else {}
        with explained(f"opening {self.url}/{name}"):
            return cast(BinaryIO, with_retries(lambda: self._fs.open(self.path(name), "rb", **options)))

    def download(self, name: str, file: Path) -> None:
        """Write the object's bytes into a local file, a piece at a time."""
        with explained(f"reading {self.url}/{name}"):
            with_retries(lambda: self._fs.get_file(self.path(name), str(file)))

    def put(self, name: str, data: bytes) -> None:
        """Make the object visible whole, replacing any earlier one."""
        with explained(f"writing {self.url}/{name}"):
            with_retries(lambda: self._fs.pipe_file(self.path(name), data, **self._put_options(name)))

    def put_if_absent(self, name: str, data: bytes) -> bool:
        """Put the object unless one is there; whether this call's bytes are the ones that stand there now.

        A lost reply makes the store answer "already there" to the retry of a put that won, so the answer is read back:
        callers put bytes that only they could have written where the difference matters.
        """
        with explained(f"writing {self.url}/{name}"):
            return self._conditional_put(name, data, {"mode": "create"})

    def read_version(self, name: str) -> tuple[bytes, str] | None:
        """The object's bytes and a version that is never newer than them, None where there is none."""
        with explained(f"reading {self.url}/{name}"):
            try:
                info = with_retries(lambda: self._fs.info(self.path(name)))
                data = with_retries(lambda: self._fs.cat_file(self.path(name)))
            except FileNotFoundError:
                return None
        return bytes(data), str(info.get("ETag") or info.get("etag") or hashlib.sha256(data).hexdigest())

    def put_if_version(self, name: str, data: bytes, version: str) -> bool:
        """Replace the object if it still has `version`; whether this call's bytes are the ones that stand there now."""
        with explained(f"writing {self.url}/{name}"):
            try:
                return self._conditional_put(name, data, {"IfMatch": version})
            except FileNotFoundError:
                return False

    def honours_conditional_puts(self, probe: str) -> bool:
        """Whether a second put-if-absent of the name `probe` is refused; some stores accept the condition and ignore it.

        Never so on stores other than S3 and local disks, where the condition is only looked at before the put.
        """
        if not (self._is_s3 or is_local(self._fs)):
            return False
        self.put_if_absent(probe, b"first")
        honoured = not self.put_if_absent(probe, b"second")
        self.delete([probe])
        return honoured

    def require_writable(self, probe: str) -> None:
        """Look whether objects can be put, leaving nothing: on S3 by a put of the name `probe` on a condition that cannot hold.

        Other object stores are not asked.

        Raises:
            AccessError: this process may not write here.
            ConfigError: there is no such place.
        """
        if not self._is_s3:
            return
        bucket = self._root.partition("/")[0]
        with explained(f"writing {self.url}"):
            if not with_retries(lambda: self._fs.exists(bucket)):
                raise FileNotFoundError(f"there is no bucket {bucket}")
            with suppress(FileNotFoundError):  # the condition does not hold
                if self._conditional_put(probe, b"", {"IfMatch": "0" * 32}):
                    self.delete([probe])  # a store that ignores conditions

    def delete(self, names: Sequence[str]) -> None:
        """Delete objects; those already gone are no error."""
        for start in range(0, len(names), DELETIONS):
            some = names[start : start + DELETIONS]
            with explained(f"deleting {self.url}/{some[0]}"):
                with_retries(partial(self._delete_some, [self.path(name) for name in some]))

    def _delete_some(self, paths: Sequence[str]) -> None:
        if not self._is_s3:
            self._fs.rm(paths)
            return
        bucket = paths[0].partition("/")[0]
        keys = [{"Key": path.partition("/")[2]} for path in paths]
        answer = self._fs.call_s3("delete_objects", Bucket=bucket, Delete={"Objects": keys, "Quiet": True})
        for error in answer.get("Errors", ()):  # of single keys, which s3fs' `rm` leaves out: the request as a whole has succeeded
            if (code := error.get("Code")) != "NoSuchKey":
                kind = PermissionError if code == "AccessDenied" else OSError
                raise kind(f"{bucket}/{error.get('Key')}: {error.get('Message') or code}")

    def _conditional_put(self, name: str, data: bytes, condition: dict[str, str]) -> bool:
        if not self._is_s3:  # other libraries offer no condition by version: look, then put
            seen = self.read_version(name)
            if (seen and seen[1]) != condition.get("IfMatch"):
                return seen is not None and seen[0] == data
            self.put(name, data)
            return True
        from embedding.corpus import s3

        try:
            with_retries(lambda: self._fs.pipe_file(self.path(name), data, **condition))  # a 409 counts as passing, as S3 wants it
        except OSError as error:
            if not (isinstance(error, FileExistsError) or s3.code_of(error) == "PreconditionFailed"):
                raise
            return self.read(name) == data
        return True

    def _put_options(self, name: str) -> dict[str, Any]:
        if not self._is_s3:
            return {}
        content_type = _SHOWN_TYPES.get(f".{name.rpartition('.')[2]}")
        return {"chunksize": _SINGLE_PUT_BYTES, **({"ContentType": content_type} if content_type else {})}


class LocalStorage(Storage):
    """A folder on a local or mounted disk: complete temporary file first, then one atomic rename or link."""

    def __init__(self, fs: fsspec.AbstractFileSystem, root: str, temporary_folder: str | None = None) -> None:
        super().__init__(fs, root)
        self._temporary_folder = temporary_folder

    def list(self, prefix: str) -> dict[str, int]:
        """See Storage.list."""
        with explained(f"listing {self.url}/{prefix}"):
            return dict(sorted(_files_below(Path(self._root), prefix)))

    def put(self, name: str, data: bytes) -> None:
        """See Storage.put."""
        with explained(f"writing {self.url}/{name}"), self._temporary(name, data) as temporary:
            temporary.replace(self.path(name))

    def put_if_absent(self, name: str, data: bytes) -> bool:
        """See Storage.put_if_absent; a hard link fails where the name exists."""
        with explained(f"writing {self.url}/{name}"), self._temporary(name, data) as temporary:
            try:
                os.link(temporary, self.path(name))
            except FileExistsError:
                return self.read(name) == data
            return True

    def read_version(self, name: str) -> tuple[bytes, str] | None:
        """See Storage.read_version; the version is the content's hash."""
        data = self.read(name)
        return None if data is None else (data, hashlib.sha256(data).hexdigest())

    def put_if_version(self, name: str, data: bytes, version: str) -> bool:
        """See Storage.put_if_version; a file lock stands for the store's conditional put."""
        with explained(f"writing {self.url}/{name}"), self._temporary(name, data) as temporary:
            try:
                with self._locked(name):
                    current = self.read_version(name)
                    if current is None or current[1] != version:
                        return current is not None and current[0] == data
                    temporary.replace(self.path(name))
                    return True
            except FileNotFoundError:
                return False

    def require_writable(self, probe: str) -> None:
        """See Storage.require_writable; looks at the permissions of the folder, or of the nearest one above that there is."""
        del probe
        folder = Path(self._root)
        with explained(f"writing {self.url}"):
            while not folder.exists():
                folder = folder.parent
            if not folder.is_dir():
                raise NotADirectoryError(f"{folder} is not a folder")
            if not os.access(folder, os.W_OK | os.X_OK, effective_ids=True):
                raise PermissionError(f"{folder} is not writable")

    def delete(self, names: Sequence[str]) -> None:
        """See Storage.delete. Empty folders stay: another process may be about to put something into them."""
        with explained(f"deleting {self.url}/{names[0] if names else ''}"):
            for name in names:
                Path(self.path(name)).unlink(missing_ok=True)

    @contextmanager
    def _temporary(self, name: str, data: bytes) -> Iterator[Path]:
        """A complete, synced file beside the final name, removed if it was not renamed."""
        path = Path(self.path(name))
        folder = path.parent if self._temporary_folder is None else Path(self.path(self._temporary_folder))
        for needed in (path.parent, folder):
            needed.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".{path.name}.{secrets.token_hex(4)}.tmp"
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())  # a power cut must not leave a renamed but empty shard
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        with Path(self.path(name)).open("r+b") as file:  # writable: network disks lock by fcntl, which asks for it
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _files_below(root: Path, prefix: str) -> Iterator[tuple[str, int]]:
    """Names relative to `root` and sizes; files and folders that vanish meanwhile are left out, unreadable ones are an error."""

    def unless_gone(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise error

    for folder, _, names in os.walk(root / prefix, onerror=unless_gone):
        for name in names:
            path = Path(folder, name)
            with suppress(FileNotFoundError):
                yield path.relative_to(root).as_posix(), path.stat().st_size
