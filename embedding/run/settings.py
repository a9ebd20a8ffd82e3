"""What a run works with: the user's options, the model's facts and the output's earlier choices joined into one."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version

import embedding
from embedding.config import JobConfig, Precision
from embedding.corpus.output import JobSettings
from embedding.corpus.reader import Columns
from embedding.errors import ConfigError
from embedding.model.batching import default_batch_tokens
from embedding.model.spec import ModelSpec

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
    """The settings of this run."""
    return JobSettings(
        vectors={
            **model.fingerprint_fields(),
            "text_column": config.text_column,
            "id_column": config.id_column,
            "keep_columns": list(config.keep_columns),
            "token_columns": config.token_columns,
        },
        kept=kept,
        input=inputs,
        versions=installed_versions(),
    )


def installed_versions() -> dict[str, str]:
    """Versions of what makes the vectors and the shards."""
    return {"embed-corpus": embedding.__version__, **{name: version(name) for name in _LIBRARIES}}
