"""What a model folder says about itself, in the files that sentence-transformers writes and reads.

Formats: sentence-transformers 2 to 6 (`base/model.py`, `base/modules/*.py`, `sentence_transformer/modules/pooling.py` of 6.2).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from embedding.errors import ModelError
from embedding.model.source import ModelFiles
from embedding.names import Pooling

_POOLING_NAMES: Mapping[str, Pooling] = {
    "cls": "cls",
    "max": "max",
    "mean": "mean",
    "mean_sqrt_len_tokens": "mean_sqrt_len",
    "weightedmean": "weightedmean",
    "lasttoken": "lasttoken",
}
_POOLING_FLAGS: Mapping[str, Pooling] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""The form before version 6, in the order in which sentence-transformers concatenates several of them."""

_TRANSFORMER_CONFIGS = tuple(
    f"sentence_{kind}_config.json" for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
_HARMLESS_TOKENIZER_OPTIONS = {"padding_side", "model_max_length"}
_HARMLESS_MODEL_OPTIONS = {"dtype", "torch_dtype", "attn_implementation"}


@dataclass(frozen=True)
class DenseSpec:
    """One Dense module: `activation(x W^T + b)`, plus x itself (projected where the widths differ) with `residual`."""

    path: str
    """Its folder inside the model's folder, which holds model.safetensors."""
    in_features: int
    out_features: int
    bias: bool
    activation: str
    """Import path of a torch.nn.Module class."""
    residual: bool
    sha256: str
    """Digest of its weights."""


@dataclass(frozen=True)
class FolderSettings:
    """Everything a folder says beyond transformers' own config; the defaults are those of a bare transformers folder."""

    transformer_path: str = ""
    """Folder of the transformer inside the model's folder, "" or ending in "/"."""
    pooling: tuple[Pooling, ...] | None = None
    include_prompt: bool = True
    dense: tuple[DenseSpec, ...] = ()
    normalize: bool = False
    max_tokens: int | None = None
    lower_case: bool = False
    prompts: tuple[tuple[str, str], ...] = ()
    default_prompt_name: str | None = None
    dimensions: int | None = None


def read_settings(files: ModelFiles) -> FolderSettings:
    """Read modules.json and the files that it names.

    Raises:
        ModelError: the folder asks for something that this package does not compute.
    """
    modules = files.json("modules.json")
    if not modules:
        return FolderSettings()
    kinds = [_module_kind(module["type"]) for module in modules]
    paths = [module["path"] for module in modules]
    _check_order(kinds)
    transformer_path = f"{paths[0]}/" if paths[0] else ""
    transformer = _read_transformer(files, transformer_path)
    pooling = files.json(f"{paths[1]}/config.json")
    if "Normalize" in kinds:
        _check_target(files.json(f"{paths[kinds.index('Normalize')]}/config.json"), "Normalize")
    job = files.json("config_sentence_transformers.json")
    return FolderSettings(
        transformer_path=transformer_path,
        pooling=_pooling_modes(pooling),
        include_prompt=pooling.get("include_prompt", True),
        dense=tuple(_read_dense(files, path) for kind, path in zip(kinds, paths, strict=True) if kind == "Dense"),
        normalize="Normalize" in kinds,
        max_tokens=transformer.get("max_seq_length"),
        lower_case=transformer.get("do_lower_case", False),
        prompts=tuple((name, text or "") for name, text in job.get("prompts", {}).items()),
        default_prompt_name=job.get("default_prompt_name"),
        dimensions=job.get("truncate_dim"),
    )


def _module_kind(reference: str) -> str:
    """The class name of a module that sentence-transformers itself brings, else the whole reference."""
    return reference.rpartition(".")[2] if reference.startswith("sentence_transformers.") else reference


def _check_order(kinds: list[str]) -> None:
    order = ["Transformer", "Pooling", *["Dense"] * kinds.count("Dense"), *["Normalize"] * ("Normalize" in kinds)]
    if [kind for kind in kinds if kind != "Dropout"] != order or kinds[:2] != order[:2]:
        raise ModelError(
            f"modules.json lists {' -> '.join(kinds)}, but only Transformer -> Pooling -> Dense (any number) -> Normalize "
            "can be run; choose another model"
        )


def _read_transformer(files: ModelFiles, path: str) -> dict[str, Any]:
    config: dict[str, Any] = next((found for name in _TRANSFORMER_CONFIGS if (found := files.json(path + name))), {})
    tokenizer_options = config.get("processor_kwargs") or config.get("tokenizer_args") or {}
    model_options = config.get("model_kwargs") or config.get("model_args") or {}
    text = config.get("modality_config", {}).get("text", {"method": "forward", "method_output_name": "last_hidden_state"})
    foreign = {
        "transformer_task": config.get("transformer_task", "feature-extraction") != "feature-extraction",
        "module_output_name": config.get("module_output_name", "token_embeddings") != "token_embeddings",
        "modality_config": "message" in config.get("modality_config", {})
        or (text["method"], text["method_output_name"]) != ("forward", "last_hidden_state"),
        "processing_kwargs": bool(config.get("processing_kwargs")),
        "tokenizer_args": not _HARMLESS_TOKENIZER_OPTIONS.issuperset(tokenizer_options),
        "model_args": not _HARMLESS_MODEL_OPTIONS.issuperset(model_options),
    }
    if asked := [name for name, is_foreign in foreign.items() if is_foreign]:
        raise ModelError(
            f"the model's {path}sentence_bert_config.json sets {asked[0]} to a value that this job does not support; choose a plain encoder"
        )
    return {"max_seq_length": tokenizer_options.get("model_max_length")} | config


def _pooling_modes(config: Mapping[str, Any]) -> tuple[Pooling, ...]:
    if "pooling_mode" not in config:
        return tuple(mode for flag, mode in _POOLING_FLAGS.items() if config.get(flag)) or ("mean",)
    named = config["pooling_mode"]
    names = [named] if isinstance(named, str) else named
    if unknown := [name for name in names if name not in _POOLING_NAMES]:
        raise ModelError(f"the model uses the pooling {unknown[0]!r}, which is not one of {', '.join(_POOLING_NAMES)}; set --pooling")
    return tuple(_POOLING_NAMES[name] for name in names)


def _read_dense(files: ModelFiles, path: str) -> DenseSpec:
    config = files.json(f"{path}/config.json")
    _check_target(config, "Dense")
    activation = config.get("activation_function", "torch.nn.modules.activation.Tanh")
    if not activation.startswith("torch.nn."):
        raise ModelError(
            f"Dense module {path!r} uses the activation {activation!r}, but only classes of torch.nn are supported; choose another model"
        )
    weights = f"{path}/model.safetensors"
    if not files.has(weights):
        raise ModelError(f"Dense module {path!r} has no model.safetensors; load the model with sentence-transformers and save it again")
    return DenseSpec(
        path=path,
        in_features=config["in_features"],
        out_features=config["out_features"],
        bias=config.get("bias", True),
        activation=activation,
        residual=config.get("use_residual", False),
        sha256=files.sha256([weights]),
    )


def _check_target(config: Mapping[str, Any], kind: str) -> None:
    """Modules that work on single tokens (late interaction) give no vector per text."""
    reads = config.get("module_input_name") or "sentence_embedding"
    writes = config.get("module_output_name") or reads
    if (reads, writes) != ("sentence_embedding", "sentence_embedding"):
        raise ModelError(
            f"the model's {kind} module turns {reads} into {writes} instead of one text vector into another; choose another model"
        )
