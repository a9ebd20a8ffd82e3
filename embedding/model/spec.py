"""ModelSpec: one small value that says which model turns texts into vectors, and how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from embedding.errors import ModelError
from embedding.model.folder import DenseSpec, FolderSettings, read_settings
from embedding.model.source import ModelFiles, ModelSource, open_model
from embedding.names import ChunkBy, LongText, Pooling, Precision

if TYPE_CHECKING:
    from embedding.config import JobConfig

FingerprintValue: TypeAlias = str | int | bool | Sequence[str] | Sequence[int] | None

POSITIONS_FOLLOW_PADDING = frozenset(
    [
        "camembert",
        "data2vec-text",
        "ibert",
        "longformer",
        "luke",
        "mpnet",
        "roberta",
        "roberta-prelayernorm",
        "xlm-roberta",
        "xlm-roberta-xl",
    ]
)
"""Model types whose first position is padding_idx + 1, so that padding_idx + 1 rows of their position table are never used."""

_READ_AS_SAID = frozenset(["bert", "camembert", "mpnet", "roberta", "xlm-roberta"])
"""Model types of which transformers takes the numbers asked for here as config.json has them, under these names."""
_NUMBERS_ASKED = ("hidden_size", "max_position_embeddings", "pad_token_id")

_TOKENIZER_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_TOKENIZER_VOCABULARIES = (
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "spiece.model",
    "spm.model",
    "tokenizer.model",
)


@dataclass(frozen=True)
class ModelSpec:
    """Everything a worker needs to load the model, and everything that shapes its vectors. Small and picklable."""

    source: ModelSource
    model_type: str
    transformer_path: str
    weight_files: tuple[str, ...]
    weights_sha256: str
    config_sha256: str
    tokenizer_sha256: str
    code_sha256: str | None
    """Digest of the model's own code where it may run (trust_remote_code)."""
    pooling: tuple[Pooling, ...]
    """Several poolings are concatenated."""
    include_prompt: bool
    """False: the prompt's tokens are read by the encoder but left out of pooling."""
    dense: tuple[DenseSpec, ...]
    normalize: bool
    max_tokens: int
    """Tokens of a text that are read, special tokens and prompt included."""
    lower_case: bool
    prompt: str
    full_dimensions: int
    """Length of a vector before truncation."""
    dimensions: int
    """Length of a finished vector."""
    precision: Precision
    trust_remote_code: bool
    further_dimensions: tuple[int, ...] = ()
    """Falling lengths of further vectors of a text, each the beginning of the same one."""

    @property
    def columns(self) -> tuple[int, ...]:
        """Lengths of all vectors of a text, in the order in which they lie side by side."""
        return (self.dimensions, *self.further_dimensions)

    @property
    def transformer_weight_files(self) -> tuple[str, ...]:
        """The `weight_files` without those of the Dense modules, which come last."""
        return self.weight_files[: len(self.weight_files) - len(self.dense)]

    def fingerprint_fields(self) -> dict[str, FingerprintValue]:
        """All that changes a vector, JSON-able, by names that a user understands; the same wherever the files lie."""
        return {
            "model_type": self.model_type,
            "weights_sha256": self.weights_sha256,
            "dense_sha256": [module.sha256 for module in self.dense],
            "config_sha256": self.config_sha256,
            "tokenizer_sha256": self.tokenizer_sha256,
            "code_sha256": self.code_sha256,
            "prompt": self.prompt,
            "include_prompt": self.include_prompt,
            "lower_case": self.lower_case,
            "max_tokens": self.max_tokens,
            "pooling": list(self.pooling),
            "normalize": self.normalize,
            "dimensions": self.dimensions,
            **({"further_dimensions": list(self.further_dimensions)} if self.further_dimensions else {}),
            "precision": self.precision,
        }


@dataclass(frozen=True)
class LongTexts:
    """What becomes of a text that has more than max_tokens tokens."""

    how: LongText = "truncate"
    overlap: int = 0
    """Tokens that a piece shares with the one before it, at most."""
    by: ChunkBy = "words"

    @property
    def cuts(self) -> bool:
        """Whether such a text becomes several pieces."""
        return self.how in ("chunk", "average")


TRUNCATE: Final = LongTexts()


def resolve_model(config: JobConfig, *, precision: Precision, opened: tuple[ModelSource, ModelFiles] | None = None) -> ModelSpec:
    """Find the model (or take the one that is `opened`), read its settings and lay the job's own over them; loads no weights.

    Raises:
        ModelError: the model cannot be found or cannot be run, or an option does not fit it.
    """
    source, files = opened or open_model(config.model, config.revision)
    settings = read_settings(files)
    path = settings.transformer_path
    if not files.has(path + "config.json"):
        raise ModelError(f"--model={config.model} has no {path}config.json; give a folder saved by transformers or sentence-transformers")
    transformer = _transformer_config(files, path, trust_remote_code=config.trust_remote_code)
    weight_files = _weight_files(files, path, config.model)
    pooling = (config.pooling,) if config.pooling != "auto" else settings.pooling or (_default_pooling(transformer),)
    full_dimensions = _full_dimensions(len(pooling) * transformer.hidden_size, settings.dense)
    dimensions = _dimensions(config.dimensions[0] if config.dimensions else settings.dimensions, full_dimensions)
    truncated = dimensions < full_dimensions or len(config.dimensions) > 1
    return ModelSpec(
        source=source,
        model_type=transformer.model_type,
        transformer_path=path,
        weight_files=(*weight_files, *(f"{module.path}/model.safetensors" for module in settings.dense)),
        weights_sha256=files.sha256(weight_files),
        config_sha256=files.sha256([path + "config.json"]),
        tokenizer_sha256=files.sha256(_tokenizer_files(files, path, config.model)),
        code_sha256=_code_sha256(files) if config.trust_remote_code else None,
        pooling=pooling,
        include_prompt=settings.include_prompt,
        dense=settings.dense,
        # A Matryoshka vector is normalized again, unless the user says no.
        normalize=config.normalize == "yes" or (config.normalize == "auto" and (settings.normalize or truncated)),
        max_tokens=_max_tokens(config.max_tokens, settings, files, transformer),
        lower_case=settings.lower_case,
        prompt=_prompt(config, settings),
        full_dimensions=full_dimensions,
        dimensions=dimensions,
        further_dimensions=config.dimensions[1:],
        precision=precision,
        trust_remote_code=config.trust_remote_code,
    )


def check_files(spec: ModelSpec, files: ModelFiles) -> None:
    """Refuse to run on other bytes than the driver saw: machines may hold different files at one path.

    Raises:
        ModelError: weights, tokenizer or configuration differ.
    """
    path = spec.transformer_path
    found = {
        "weight file": (files.sha256(spec.transformer_weight_files), spec.weights_sha256),
        "configuration": (files.sha256([path + "config.json"]), spec.config_sha256),
        "tokenizer": (files.sha256(_tokenizer_files(files, path, spec.source.name)), spec.tokenizer_sha256),
        **{f"weight file {module.path}": (files.sha256([f"{module.path}/model.safetensors"]), module.sha256) for module in spec.dense},
    }
    if changed := [name for name, (here, planned) in found.items() if here != planned]:
        raise ModelError(
            f"the {changed[0]} of model {spec.source.name!r} on this machine differs from what the job was planned with; "
            "put the same files on every machine"
        )


def read_config(folder: Path, *, trust_remote_code: bool) -> Any:
    """The configuration of the transformer in that folder, as transformers reads it.

    Raises:
        ModelError: it cannot be read.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig  # brings torch, half of the driver's start-up time, which the most common models need not spend

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        remedy = "" if trust_remote_code else "; a model that brings its own code needs --trust-remote-code"
        raise ModelError(f"{folder}/config.json is not a configuration that transformers can read{remedy}") from error


def _transformer_config(files: ModelFiles, path: str, *, trust_remote_code: bool) -> Any:
    if (found := _as_said(files.json(path + "config.json"))) is not None:
        return found
    config = read_config(files.root / path, trust_remote_code=trust_remote_code)
    if not isinstance(getattr(config, "hidden_size", None), int):
        raise ModelError(
            f"model type {config.model_type!r} does not have a single hidden size, as plain text encoders do; choose another model"
        )
    return config


def _as_said(said: Any) -> SimpleNamespace | None:
    """The configuration of one of the most common model types, where transformers would add nothing that is asked for here."""
    if not isinstance(said, dict) or said.get("model_type") not in _READ_AS_SAID or "auto_map" in said:
        return None
    return SimpleNamespace(**said) if all(type(said.get(name)) is int for name in _NUMBERS_ASKED) else None


def _weight_files(files: ModelFiles, path: str, model: str) -> tuple[str, ...]:
    """Safetensors only: the other formats run code while they are read."""
    if files.has(path + "model.safetensors"):
        return (path + "model.safetensors",)
    index = files.json(path + "model.safetensors.index.json")
    if index:
        return tuple(path + name for name in sorted(set(index["weight_map"].values())))
    if files.has(path + "pytorch_model.bin") or files.has(path + "pytorch_model.bin.index.json"):
        raise ModelError(
            f"--model={model} has its weights in pytorch_model.bin only; convert them once with "
            "AutoModel.from_pretrained(folder).save_pretrained(folder)"
        )
    raise ModelError(f"--model={model} has no model.safetensors; give a folder or hub id with safetensors weights")


def _tokenizer_files(files: ModelFiles, path: str, model: str) -> list[str]:
    """The files that decide how text is cut; vocabularies are not read where tokenizer.json holds everything."""
    vocabularies = ("tokenizer.json",) if files.has(path + "tokenizer.json") else _TOKENIZER_VOCABULARIES
    found = [path + name for name in (*vocabularies, *_TOKENIZER_SETTINGS) if files.has(path + name)]
    if not found:
        raise ModelError(f"--model={model} has no tokenizer.json; save the model's tokenizer next to its weights")
    return found


def _code_sha256(files: ModelFiles) -> str:
    return files.sha256(sorted(str(file.relative_to(files.root)) for file in files.root.rglob("*.py")) or ["config.json"])


def _default_pooling(transformer: Any) -> Pooling:
    """As sentence-transformers chooses for a bare folder: the last token of a causal language model, else the mean."""
    architectures: Sequence[str] = getattr(transformer, "architectures", None) or [""]
    return "lasttoken" if architectures[0].endswith("ForCausalLM") and getattr(transformer, "is_causal", True) else "mean"


def _full_dimensions(width: int, dense: tuple[DenseSpec, ...]) -> int:
    for module in dense:
        if module.in_features != width:
            raise ModelError(f"Dense module {module.path!r} reads {module.in_features} numbers but gets {width}; leave --pooling out")
        width = module.out_features
    return width


def _dimensions(asked: int | None, full: int) -> int:
    if asked is not None and asked > full:
        raise ModelError(f"--dimensions={asked} is above the model's {full}; lower it or leave it out")
    return asked or full


def _max_tokens(asked: int | None, settings: FolderSettings, files: ModelFiles, transformer: Any) -> int:
    """The job's, else the folder's, else the tokenizer's, and never more than the position table holds."""
    table: int = getattr(transformer, "max_position_embeddings", None) or -1  # -1: no table, as in XLNet
    offset = (transformer.pad_token_id or 0) + 1 if transformer.model_type in POSITIONS_FOLLOW_PADDING else 0
    positions = table - offset if table > 0 else None
    if asked is not None:
        if positions is not None and asked > positions:
            raise ModelError(f"--max-tokens={asked} is above the model's {positions} positions; lower it or leave it out")
        return asked
    tokenizer_limit = files.json(settings.transformer_path + "tokenizer_config.json").get("model_max_length")
    limits = [limit for limit in (settings.max_tokens or tokenizer_limit, positions) if limit is not None]
    limit = min(limits, default=None)
    if limit is None or limit > 1_000_000:  # transformers writes 1e30 for "unknown"
        raise ModelError("the model does not say how many tokens it reads; set --max-tokens")
    return int(limit)


def _prompt(config: JobConfig, settings: FolderSettings) -> str:
    if config.prompt is not None:
        return config.prompt
    name = config.prompt_name or settings.default_prompt_name
    if name is None:
        return ""
    prompts = dict(settings.prompts)
    if name not in prompts:
        remedy = f"use one of {', '.join(map(repr, prompts))}, or --prompt" if prompts else "use --prompt"
        raise ModelError(f"--prompt-name={name} is not a prompt of the model, which has {len(prompts) or 'none'}; {remedy}")
    return prompts[name]
