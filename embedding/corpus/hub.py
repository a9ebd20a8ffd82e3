"""Datasets of the Hugging Face hub as a corpus: listed at one commit, and read at that commit, whatever is pushed meanwhile.

huggingface_hub lists them; its file object asks for the listing of a file's folder before each range, in every process, so ranges
are read here. The token is looked for by the library (HF_TOKEN, or a login of this machine), in every process anew.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

from huggingface_hub import HfApi, constants, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HfUriError,
    HFValidationError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff, parse_hf_uri  # type: ignore[attr-defined]

from embedding.corpus.requests import explained, with_retries
from embedding.errors import AccessError, ConfigError, CorpusError, SourceChangedError, first_line

_DATASETS = "hf://datasets/"
_NO_ANSWER = cast(type[Exception], next(kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError"))
"""What a connection that fails raises: of httpx or httpx2, whichever the installed huggingface_hub asks by."""


@dataclass(frozen=True)
class Pinned:
    """An input on the hub, at the commit that its branch or tag names now."""

    dataset: str
    commit: str
    path: str
    """In the repository: a file, a folder or a glob; empty for all of it."""

    @property
    def url(self) -> str:
        """What the hub's file system is asked for."""
        return f"{_DATASETS}{self.dataset}@{self.commit}/{self.path}".rstrip("/")

    def unpinned(self, url: str) -> str:
        """The URL of one of its files without the commit: a file that a commit leaves as it is keeps its name."""
        return url.replace(f"{self.dataset}@{self.commit}/", f"{self.dataset}/", 1)


def pin(url: str) -> Pinned:
    """Look up the commit of an input on the hub.

    Raises:
        CorpusError: it is no dataset that the hub shows this process.
        StorageError: the hub does not answer.
    """
    given = f"--input {url}"
    try:
        uri = parse_hf_uri(url)
    except HfUriError as error:
        raise CorpusError(f"{given} is not a dataset on the hub; write hf://datasets/owner/name, followed by a path if needed") from error
    if uri.type != "dataset":
        raise CorpusError(f"{given} names a {uri.type} on the hub, but only datasets can be read; write hf://datasets/owner/name")
    with explained(f"asking the hub for {given}"):
        return Pinned(uri.id, with_retries(lambda: _commit(given, uri.id, uri.revision)), uri.path_in_repo)


def _commit(given: str, dataset: str, revision: str | None) -> str:
    try:
        with as_of_a_store(given):
            return str(HfApi().dataset_info(dataset, revision=revision, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT).sha)
    except (FileNotFoundError, HFValidationError) as error:
        said = "is not a dataset that the hub shows you; check the spelling, or set HF_TOKEN if it is private"
        if isinstance(error.__cause__, RevisionNotFoundError):
            said = f"has no revision {revision!r}; name a branch, tag or commit of the dataset"
        raise CorpusError(f"{given} {said}") from error


@contextmanager
def as_of_a_store(what: str) -> Iterator[None]:
    """Raises the hub's errors about `what` as those that every store raises, so that they are tried again and explained alike.

    Raises:
        ConfigError: this process is told not to ask the hub.
        AccessError: the dataset is gated.
        FileNotFoundError: there is no such dataset, revision or file, or not for this process.
        PermissionError: the hub refuses it.
        OSError: the hub does not answer.
    """
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise ConfigError(f"{what} is on the hub, but HF_HUB_OFFLINE forbids access to it; unset that variable") from error
    except GatedRepoError as error:
        raise AccessError(f"{what} is gated; accept the terms of the dataset on the hub, and set HF_TOKEN on every machine") from error
    except (RepositoryNotFoundError, RevisionNotFoundError, RemoteEntryNotFoundError) as error:
        raise FileNotFoundError(first_line(error)) from error
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise PermissionError(first_line(error)) from error
        raise
    except _NO_ANSWER as error:
        raise ConnectionError(first_line(error)) from error


def open_at(url: str, size: int) -> io.RawIOBase:
    """The file of `size` bytes at a pinned URL, open for ranged reads: one request each, and none to open it."""
    uri = parse_hf_uri(url)
    return _File(hf_hub_url(uri.id, uri.path_in_repo, repo_type="dataset", revision=uri.revision), url, size)


class _File(io.RawIOBase):
    def __init__(self, address: str, url: str, size: int) -> None:
        self._address = address
        self._url = url
        self._size = size
        self._place = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence])
        return self._place

    def readall(self) -> bytes:
        return self.read(self._size - self._place) or b""  # in one request: the class above asks for 8 KiB at a time

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), self._size - self._place)
        if wanted <= 0:
            return 0
        buffer[:wanted] = self._range(self._place, self._place + wanted)
        self._place += wanted
        return wanted

    def _range(self, start: int, stop: int) -> bytes:
        """Bytes of the file; the whole of it, or a part that is too short, is a damaged answer, which the caller tries again.

        Raises:
            SourceChangedError: the dataset, its commit or the file is gone.
        """
        headers = {**build_hf_headers(), "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        try:
            with as_of_a_store(self._url):
                answer = http_backoff("GET", self._address, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)
                hf_raise_for_status(answer)
        except FileNotFoundError as error:
            said = (
                "is no longer on the hub, or hidden from this machine; set HF_TOKEN on every machine, or run again to read the new version"
            )
            raise SourceChangedError(f"{self._url} {said}") from error
        if len(answer.content) != stop - start:
            raise ConnectionError(f"{self._url}: the hub sent {len(answer.content)} bytes instead of {stop - start}")
        return bytes(answer.content)
