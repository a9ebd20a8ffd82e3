"""What a run works with: the user's options, the model's facts and the output's earlier choices joined into one."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import embedding
from embedding.config import JobConfig, Precision
from embedding.corpus.output import JobSettings
from embedding.corpus.reader import Columns
from embedding.errors import ConfigError
from embedding.model.batching import default_batch_tokens
from embedding.model.spec import LongTexts, ModelSpec

_LIBRARIES = ("ray", "torch", "transformers", "tokenizers", "pyarrow")


@dataclass(frozen=True, slots=True)
class _Defaults:
    precision: Precision
    unit_rows: int


_DEFAULTS = {
    "cuda": _Defaults("bf16", unit_rows=65_536),
    "cpu": _Defaults("fp32", unit_rows=2_048),
}


def first_precision(config: JobConfig, device: str) -> Precision:
    """The user's precision, else the one that suits the device."""
    return _DEFAULTS[device].precision if config.precision == "auto" else config.precision


def columns_of(config: JobConfig) -> Columns:
    """The columns that the job reads."""
    return Columns(config.text_column, (*([config.id_column] if config.id_column else []), *config.keep_columns))


def columns_of_output(settings: JobSettings) -> Columns:
    """The columns that the shards of an output were made from."""
    vectors = settings.vectors
    copied = (*([vectors["id_column"]] if vectors["id_column"] is not None else []), *vectors["keep_columns"])
    return Columns(vectors["text_column"], copied)


def first_choices(config: JobConfig, model: ModelSpec, device: str) -> dict[str, int]:
    """What shapes units and batches, chosen for a new output; later runs keep it.

    Raises:
        ConfigError: a batch could not hold one text of the model's max_tokens.
    """
    if config.batch_tokens != "auto" and config.batch_tokens < model.max_tokens:
        rule = f"--batch-tokens={config.batch_tokens} is below the model's max_tokens={model.max_tokens}"
        raise ConfigError(f"{rule}; raise it or give a lower --max-tokens")
    return {
        "unit_rows": _DEFAULTS[device].unit_rows if config.unit_rows == "auto" else config.unit_rows,
        "batch_tokens": default_batch_tokens(device, model.max_tokens) if config.batch_tokens == "auto" else config.batch_tokens,
    }


def job_settings(config: JobConfig, model: ModelSpec, kept: dict[str, int], inputs: tuple[str, ...]) -> JobSettings:
    """The settings of this run.

    Raises:
        ConfigError: the windows of a long text could not overlap as asked.
    """
    return JobSettings(
        vectors={
            **model.fingerprint_fields(),
            "text_column": config.text_column,
            "id_column": config.id_column,
            "keep_columns": list(config.keep_columns),
            "token_columns": config.token_columns,
            **_long_text_settings(config, model),
            **({} if config.output_dtype == "float32" else {"output_dtype": config.output_dtype}),
            **({"byte_stream_split": True} if config.byte_stream_split else {}),
        },
        kept=kept,
        input=inputs,
        versions=installed_versions(),
    )


def long_texts_of(config: JobConfig) -> LongTexts:
    """What the job does with texts that are too long."""
    return LongTexts(config.long_text, config.chunk_overlap, config.chunk_by)


def long_texts_of_output(settings: JobSettings) -> LongTexts:
    """What the vectors of an output were made with; outputs that truncate do not say it."""
    vectors = settings.vectors
    return LongTexts(vectors.get("long_text", "truncate"), vectors.get("chunk_overlap", 0), vectors.get("chunk_by", "words"))


def _long_text_settings(config: JobConfig, model: ModelSpec) -> dict[str, Any]:
    """Nothing where texts are truncated, so that outputs of the time before there was a choice stay what they are."""
    long = long_texts_of(config)
    if 2 * long.overlap > model.max_tokens:
        rule = f"--chunk-overlap={long.overlap} is more than half of the model's max_tokens={model.max_tokens}"
        raise ConfigError(f"{rule}; lower it, so that a window has something new")
    if long.cuts:
        return {"long_text": long.how, "chunk_overlap": long.overlap, "chunk_by": long.by}
    return {} if long.how == "truncate" else {"long_text": long.how}


def what_was_asked(config: JobConfig, model: ModelSpec) -> dict[str, Any]:
    """Where this run's model is, and how much of the corpus it was to embed: what a proof of the output must know, and no more."""
    name = model.source.name if model.source.kind == "folder" else config.model
    return {"model": name, "revision": model.source.commit, "limit_rows": config.limit_rows}


def model_options(settings: JobSettings, output: str, model: str | None, *, trust_remote_code: bool) -> JobConfig:
    """The options that ask for the model of an output's vectors; `model` stands for the place that the output remembers.

    Raises:
        ConfigError: the output does not remember where its model is, and `model` does not say it either.
    """
    vectors = settings.vectors
    place = {"model": model} if model else {key: settings.asked.get(key) for key in ("model", "revision")}
    if not place["model"]:
        raise ConfigError(f"{output} does not remember where its model is; say --model, or --sample 0 to compare no vectors")
    return JobConfig.build(
        input=settings.input,
        output=output,
        **place,
        **{key: vectors[key] for key in ("prompt", "max_tokens", "dimensions")},
        pooling=vectors["pooling"][0] if len(vectors["pooling"]) == 1 else "auto",
        normalize="yes" if vectors["normalize"] else "no",
        trust_remote_code=trust_remote_code,
    )


def installed_versions() -> dict[str, str]:
    """Versions of what makes the vectors and the shards."""
    return {"embed-corpus": embedding.__version__, **{name: version(name) for name in _LIBRARIES}}
