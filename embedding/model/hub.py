"""Models of the Hugging Face hub: which commit a name stands for, and its files in this machine's cache.

Imported where a hub model is asked for alone: the library takes a third of a second to import.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, cast

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

from embedding.errors import EmbeddingJobError, ModelError, ModelUnreachableError, first_line
from embedding.model.host import alone_on_this_machine

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


class HubModel(NamedTuple):
    """A model as the hub, or its cache, has it."""

    commit: str
    root: Path
    """The snapshot in the cache, with the small files."""
    sha256: Mapping[str, str]
    """Digests of its large files, by path; empty where the cache had to answer."""


def download(name: str, commit: str | None, patterns: Sequence[str]) -> Path:
    """The folder in the hub's cache with the files that match.

    Raises:
        ModelUnreachableError: this machine cannot reach the hub, or is refused by it.
    """
    try:
        return _from_hub(name, commit, patterns)
    except _NO_ANSWER as error:
        reason = first_line(error)
        raise ModelUnreachableError(
            f"hub model {name!r} cannot be downloaded to this machine ({reason}); run the same command again, or use a folder"
        ) from error


def look_up(name: str, revision: str | None, small_files: Sequence[str]) -> HubModel:
    """Ask the hub for the commit and the digests of large files; where it cannot be reached, use its cache.

    Raises:
        ModelError: it is no model of the hub, or refused to this process.
        ModelUnreachableError: the hub does not answer, and its cache does not have the model.
    """
    neither = f"--model={name} is neither a folder nor"
    try:
        ask = partial(HfApi().model_info, revision=revision, files_metadata=True, timeout=_HUB_TIMEOUT_SECONDS)
        info = _patiently(_ANSWER_PATIENCE_SECONDS)(ask, name)
        root = _from_hub(name, revision, small_files)  # under the name that was asked for, which the cache must know when the hub is silent
        if root.name != info.sha:  # it moved on between the two questions
            root = _from_hub(name, info.sha, small_files)
    except HFValidationError as error:
        raise ModelError(f"{neither} a hub id of the form owner/name; check the spelling") from error
    except GatedRepoError as error:
        raise ModelError(f"hub model {name!r} is gated; accept its terms on the hub and set HF_TOKEN") from error
    except RevisionNotFoundError as error:
        raise ModelError(f"hub model {name!r} has no revision {revision!r}; name one of its branches, tags or commits") from error
    except RepositoryNotFoundError as error:
        raise ModelError(f"{neither} a model that the hub shows you; check the spelling, or set HF_TOKEN if it is private") from error
    except _NO_ANSWER as error:
        return _in_cache(name, revision, small_files, error)
    return HubModel(str(info.sha), root, {file.rfilename: file.lfs.sha256 for file in info.siblings or () if file.lfs is not None})


def _in_cache(name: str, revision: str | None, small_files: Sequence[str], failure: Exception) -> HubModel:
    """The model as the cache has it, after the hub failed with `failure`."""
    try:
        root = Path(snapshot_download(name, revision=revision, allow_patterns=[*small_files], local_files_only=True))
    except (OSError, ValueError):
        raise _no_answer(name, failure) from failure
    return HubModel(root.name, root, {})  # the cache names a snapshot's folder by its commit


def _no_answer(name: str, failure: Exception) -> EmbeddingJobError:
    """The error for a hub without a usable answer: temporary, unless this process may not ask, or the hub refused."""
    not_here = f"--model={name} is neither a folder nor a model in the hub's cache"
    if isinstance(failure, OfflineModeIsEnabled):
        return ModelError(f"{not_here}, and HF_HUB_OFFLINE forbids asking the hub; check the spelling, or unset that variable")
    if 400 <= (_status(failure) or 0) < 500 and not _is_busy(failure):
        return ModelError(f"{not_here}, and the hub refuses it ({first_line(failure)}); check the spelling and HF_TOKEN")
    what = f"{not_here}, and the hub cannot be reached ({first_line(failure)})"
    return ModelUnreachableError(f"{what}; check the path and the network, then run the same command again")


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
