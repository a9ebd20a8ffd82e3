"""What a run works with: the user's options, the model's facts and the output's earlier choices joined into one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from glob import has_magic
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from fsspec.utils import glob_translate

import embedding
from embedding.corpus.columns import Columns
from embedding.corpus.formats.jsonl import schema_from_json, schema_to_json
from embedding.corpus.formats.names import Format, format_of
from embedding.corpus.output import JobSettings
from embedding.corpus.reader import settle_columns
from embedding.corpus.shards.chosen import shard_form
from embedding.corpus.shards.form import ShardForm
from embedding.corpus.sources import Source, absolute
from embedding.corpus.storage import filesystem_of
from embedding.corpus.vectors import Calibration, VectorColumns, digest
from embedding.errors import ConfigError
from embedding.model.batching import default_batch_tokens
from embedding.model.spec import LongTexts, ModelSpec
from embedding.names import Precision

if TYPE_CHECKING:
    from embedding.config import JobConfig

_LIBRARIES = ("ray", "torch", "transformers", "tokenizers", "pyarrow")
_UNIT_ROWS = {"cuda": 65_536, "cpu": 2_048}


def default_unit_rows(device: str) -> int:
    """Rows of a unit where nothing was measured: seconds of work for a small encoder."""
    return _UNIT_ROWS[device]


def precision_of(config: JobConfig, auto: Precision) -> Precision:
    """The user's precision, else this one."""
    return auto if config.precision == "auto" else config.precision


def _columns_of(config: JobConfig, kind: Format) -> Columns:
    """The columns that the job reads of files of that format."""
    copied = (*([config.id_column] if config.id_column else []), *config.keep_columns)
    return Columns(config.text_column, copied, config.text_template, kind, id=config.id_column)


def columns_asked(config: JobConfig) -> tuple[str, ...]:
    """Every column that the job reads, whatever the format."""
    return _columns_of(config, Format.PARQUET).all


def columns_of_corpus(config: JobConfig, sources: Sequence[Source], settings: Callable[[], JobSettings | None]) -> Columns:
    """The columns that the job reads of these files; `settings` tells what the output was begun with, where that matters.

    Raises:
        CorpusError: the first files do not have them.
    """
    columns = _columns_of(config, format_of((source.uri for source in sources), config.input_format))
    if columns.format is not Format.JSONL:
        return columns
    existing = settings()
    return settle_columns(sources, columns, existing and columns_of_output(existing).schema)


def columns_of_output(settings: JobSettings) -> Columns:
    """The columns that the shards of an output were made from."""
    vectors = settings.vectors
    copied = (*([vectors["id_column"]] if vectors["id_column"] is not None else []), *vectors["keep_columns"])
    kind, types = Format(vectors.get("input_format", Format.PARQUET)), vectors.get("column_types")
    schema = None if types is None else schema_from_json(types)
    return Columns(vectors["text_column"] or "", copied, vectors.get("text_template"), kind, schema, vectors["id_column"])


def first_choices(config: JobConfig, model: ModelSpec, device: str) -> dict[str, int]:
    """What shapes units and batches, chosen for a new output; later runs keep it.

    Raises:
        ConfigError: a batch could not hold one text of the model's max_tokens.
    """
    if config.batch_tokens != "auto" and config.batch_tokens < model.max_tokens:
        rule = f"--batch-tokens={config.batch_tokens} is below the model's max_tokens={model.max_tokens}"
        raise ConfigError(f"{rule}; raise it or lower --max-tokens")
    return {
        "unit_rows": default_unit_rows(device) if config.unit_rows == "auto" else config.unit_rows,
        "batch_tokens": default_batch_tokens(device, model.max_tokens) if config.batch_tokens == "auto" else config.batch_tokens,
    }


def job_settings(
    config: JobConfig,
    model: ModelSpec,
    kept: dict[str, int],
    inputs: tuple[str, ...],
    columns: Columns,
    calibration: Calibration | None = None,
) -> JobSettings:
    """The settings of this run; int8 without a calibration is one that is to be measured.

    Raises:
        ConfigError: the windows of a long text could not overlap as asked.
    """
    return JobSettings(
        vectors={
            **model.fingerprint_fields(),
            **_how_it_is_read(columns),
            "id_column": config.id_column,
            "keep_columns": list(config.keep_columns),
            "token_columns": config.token_columns,
            **_long_text_settings(config, model),
            **({} if config.output_dtype == "float32" else {"output_dtype": config.output_dtype}),
            **({"calibration": digest(calibration or {})} if config.output_dtype == "int8" else {}),
            **({"byte_stream_split": True} if config.byte_stream_split else {}),
            **({} if config.output_format == "parquet" else {"output_format": config.output_format}),
        },
        kept=kept,
        input=inputs,
        versions=installed_versions(shards_asked(config)),
        calibration=calibration or {},
    )


def _how_it_is_read(columns: Columns) -> dict[str, Any]:
    """Keys that did not exist when the first outputs were made are left out where they do not apply: Parquet corpora, no template."""
    template = {} if columns.template is None else {"text_template": columns.template}
    kind = {} if columns.format is Format.PARQUET else {"input_format": str(columns.format)}
    types = {} if columns.schema is None else {"column_types": schema_to_json(columns.schema)}
    return {"text_column": columns.text if columns.template is None else None, **template, **kind, **types}


def vectors_of_output(settings: JobSettings) -> VectorColumns:
    """The columns that the vectors of an output are in."""
    vectors = settings.vectors
    return VectorColumns(_dimensions_of(vectors), vectors.get("output_dtype", "float32"), settings.calibration)


def _dimensions_of(vectors: Mapping[str, Any]) -> tuple[int, ...]:
    return (vectors["dimensions"], *vectors.get("further_dimensions", ()))


def shards_asked(config: JobConfig) -> ShardForm:
    """How the job writes shards.

    Raises:
        ConfigError: what writes them is not installed here.
    """
    form = shard_form(config.output_format, byte_stream_split=config.byte_stream_split)
    form.require()
    return form


def shards_of_output(settings: JobSettings) -> ShardForm:
    """How the shards of an output are written."""
    vectors = settings.vectors
    return shard_form(vectors.get("output_format", "parquet"), byte_stream_split=vectors.get("byte_stream_split", False))


def long_texts_of(config: JobConfig) -> LongTexts:
    """What the job does with texts that are too long."""
    return LongTexts(config.long_text, config.chunk_overlap, config.chunk_by)


def long_texts_of_output(settings: JobSettings) -> LongTexts:
    """What the vectors of an output were made with; outputs that truncate do not say it."""
    vectors = settings.vectors
    return LongTexts(vectors.get("long_text", "truncate"), vectors.get("chunk_overlap", 0), vectors.get("chunk_by", "words"))


def _long_text_settings(config: JobConfig, model: ModelSpec) -> dict[str, Any]:
    """Nothing where texts are truncated, so that outputs from before this option existed keep their fingerprint."""
    long = long_texts_of(config)
    if 2 * long.overlap > model.max_tokens:
        rule = f"--chunk-overlap={long.overlap} is more than half of the model's max_tokens={model.max_tokens}"
        raise ConfigError(f"{rule}; lower it, so that each window has enough new text")
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
        raise ConfigError(f"{output} does not record where its model is; set --model, or use --sample 0 to compare no vectors")
    from embedding.config import JobConfig  # workers import this module too, and need not load what checks options

    return JobConfig.build(
        input=settings.input,
        output=output,
        **place,
        **{key: vectors[key] for key in ("prompt", "max_tokens")},
        dimensions=_dimensions_of(vectors),
        pooling=vectors["pooling"][0] if len(vectors["pooling"]) == 1 else "auto",
        normalize="yes" if vectors["normalize"] else "no",
        trust_remote_code=trust_remote_code,
    )


def installed_versions(shards: ShardForm) -> dict[str, str]:
    """Versions of what makes the vectors and the shards."""
    return {"embed-corpus": embedding.__version__, **{name: version(name) for name in (*_LIBRARIES, *shards.libraries)}}


def require_apart(config: JobConfig) -> None:
    """Check that the output would not be read as corpus, nor the corpus lie where shards go.

    Raises:
        ConfigError: it would.
    """
    target_fs, target = filesystem_of(config.output)
    target = target.rstrip("/")
    for url in config.input:
        fs, path = filesystem_of(url)
        if type(fs) is not type(target_fs):
            continue
        searched = path.partition("**")[0].rstrip("/") if "**" in path else path.rstrip("/")
        if f"{target}/".startswith(f"{searched}/") or _matches_upwards(path, f"{target}/data"):
            raise ConfigError(f"--output {config.output} lies inside --input {url} and would be read as corpus; choose a folder outside it")
        if f"{searched}/".startswith(f"{target}/data/"):
            raise ConfigError(f"--input {url} lies where --output {config.output} puts its shards (data/); choose another --output")


def _matches_upwards(path: str, folder: str) -> bool:
    """Whether a glob matches the folder or one above it; those are read to the bottom."""
    if not has_magic(path) or "**" in path:
        return False
    matches = re.compile(glob_translate(path)).match
    parts = folder.split("/")
    return any(matches("/".join(parts[:depth])) for depth in range(1, len(parts) + 1))


def require_not_of_output(sources: Iterable[Source], config: JobConfig) -> None:
    """Check that no source lies among the shards, which a glob with more parts than the output's path may match.

    Raises:
        ConfigError: one does.
    """
    shards = f"{absolute(config.output).rstrip('/')}/data/"
    for source in sources:
        if source.uri.removeprefix("file://").startswith(shards):
            remedy = "choose an --output outside of what --input matches"
            raise ConfigError(f"{source.uri} lies where --output {config.output} puts its shards and would be read as corpus; {remedy}")
