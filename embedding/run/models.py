"""Models at a URL such as s3://bucket/models/e5: copied once to each machine, then models like those of a folder."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

from embedding.corpus.sources import version_of
from embedding.corpus.storage import Storage, filesystem_of, is_local, open_storage
from embedding.errors import ConfigError, EmbeddingJobError, ModelError, ModelUnreachableError
from embedding.model.host import alone_on_this_machine
from embedding.model.source import SMALL_FILES, ModelFiles, ModelSource
from embedding.model.spec import ModelSpec, resolve_model
from embedding.names import Precision

if TYPE_CHECKING:
    from embedding.config import JobConfig

_WANTED = (*SMALL_FILES, "*.safetensors")


def find_model(config: JobConfig, *, precision: Precision) -> ModelSpec:
    """The model that the options name; one at a URL is copied to this machine for it.

    Raises:
        ModelError: it cannot be found or cannot be run, or an option does not fit it.
        ModelUnreachableError: the hub does not answer.
        AccessError: its store refuses this process.
        StorageError: its store does not answer.
    """
    if "://" not in config.model:
        return resolve_model(config, precision=precision)
    fs, path = filesystem_of(config.model)
    if is_local(fs):
        return resolve_model(config.model_copy(update={"model": path}), precision=precision)
    if config.revision is not None:
        raise ModelError(f"--revision={config.revision} needs a hub id, but --model={config.model} is a URL; leave --revision out")
    folder = _Remote.listed(config.model).copy()
    return resolve_model(config, precision=precision, opened=(ModelSource("url", config.model), ModelFiles(folder)))


def model_folder(spec: ModelSpec, *, weights: bool = True) -> Path:
    """The folder on this machine with all files of the model; what is elsewhere is brought here first, once for all processes.

    Without `weights`, those of a hub are not downloaded for it.

    Raises:
        ModelUnreachableError: this machine cannot reach the model, or is refused.
        ModelError: the model is not on this machine.
    """
    if spec.source.kind != "url":
        return spec.source.folder(spec.weight_files if weights else ())
    try:
        return _Remote.listed(spec.source.name).copy()
    except EmbeddingJobError as error:
        raise ModelUnreachableError(f"model {spec.source.name!r} cannot be copied to this machine: {error}") from error


def cache_folder() -> Path:
    """Where copies are kept: EMBED_CACHE, else $XDG_CACHE_HOME/embed-corpus, else ~/.cache/embed-corpus."""
    if own := os.environ.get("EMBED_CACHE"):
        return Path(own).expanduser() / "models"
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "embed-corpus" / "models"


@dataclass(frozen=True)
class _Remote:
    """The files of a model at a URL as they were listed."""

    storage: Storage
    versions: Mapping[str, str]
    """Of each file, its size and its version."""

    @classmethod
    def listed(cls, url: str) -> _Remote:
        """The root of the model and the folders that its modules.json names: not the checkpoints of a training, nor other formats."""
        storage = open_storage(url)
        found = {name: f"{info['size']} {version_of(info)}" for name, info in storage.details("").items()}
        if not found:
            raise ModelError(f"--model={url} has no files; check the spelling")
        folders = {"", *(_modules(storage) if "modules.json" in found else ())}
        return cls(storage, {name: version for name, version in found.items() if _is_wanted(name, folders)})

    def copy(self) -> Path:
        """The folder here; other files at the URL, or other versions of them, have another one.

        Raises:
            ConfigError: this machine's cache does not take it.
        """
        key = hashlib.sha256(json.dumps([self.storage.url, *sorted(self.versions.items())]).encode()).hexdigest()[:16]
        folder = cache_folder() / f"{self.storage.url.rpartition('/')[2]}-{key}"
        try:
            with alone_on_this_machine(folder.with_name(f"{folder.name}.lock")):
                if not folder.is_dir():
                    self._fetch(folder)
        except OSError as error:
            raise ConfigError(
                f"{self.storage.url} cannot be copied to {folder} ({error}); set EMBED_CACHE to a folder with room for it"
            ) from error
        return folder

    def _fetch(self, folder: Path) -> None:
        """All files into a folder beside the final one, which then gets its name at once: a copy is whole or not there."""
        for left in folder.parent.glob(f"{folder.name}.*.tmp"):  # by a process that died
            shutil.rmtree(left, ignore_errors=True)
        temporary = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}.tmp")
        try:
            for name in self.versions:
                (temporary / name).parent.mkdir(parents=True, exist_ok=True)
                self.storage.download(name, temporary / name)
            if _Remote.listed(self.storage.url).versions != self.versions:
                raise ModelError(
                    f"the model at {self.storage.url} was changed while it was being copied; run again when its upload is complete"
                )
            temporary.replace(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _modules(storage: Storage) -> Iterator[str]:
    """Folders that modules.json names; if it is wrong, reading the copy will tell."""
    try:
        modules = json.loads(storage.read("modules.json") or b"")
    except ValueError:
        return
    for module in modules if isinstance(modules, list) else ():
        if isinstance(module, dict):
            yield str(module.get("path", "")).strip("/")


def _is_wanted(name: str, folders: set[str]) -> bool:
    folder, _, file = name.rpartition("/")
    return ".." not in folder.split("/") and folder in folders and any(fnmatch(file, pattern) for pattern in _WANTED)
