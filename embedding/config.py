"""The one configuration of a job: validated, frozen, fed by the command line, a YAML file or the environment.

Each field is an option: `batch_tokens` is `--batch-tokens`, the key `batch_tokens` of a `--config` file and the variable
`EMBED_BATCH_TOKENS`. Its description is the option's help text and the option table of docs/options.md.
"""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Annotated, Literal, Self, TypeAlias

from cyclopts import Group, Parameter
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator, model_validator

from embedding.names import (
    CHUNK_COLUMNS,
    DEFAULT_MODEL,
    RESERVED_COLUMNS,
    BadRows,
    ChunkBy,
    InputFormat,
    LongText,
    OutputDtype,
    OutputFormat,
    Pooling,
    Precision,
    ProgressStyle,
    vector_columns,
)
from embedding.rules import Config, refuse_secrets

_Item: TypeAlias = Annotated[str, Field(min_length=1)]
_CORPUS = Parameter(group=Group("Corpus", sort_key=1))
_OUTPUT = Parameter(group=Group("Output", sort_key=2))
_MODEL = Parameter(group=Group("Model", sort_key=3))
_SPEED = Parameter(group=Group("Speed and placement", sort_key=4))
_RUN = Parameter(group=Group("Run", sort_key=5))
_LIST = Parameter(consume_multiple=True, negative="", show_default=False)
_FLAG = Parameter(negative="", show_default=False)
_AUTO_OR_NUMBER = Parameter(metavar="auto|N", show_choices=False)
_ONE_OF = Parameter(metavar="CHOICE")
_NAME = Parameter(metavar="NAME")
_TEXT = Parameter(metavar="TEXT")
_NUMBER = Parameter(metavar="N")
_PLACE = Parameter(metavar="PATH|URL")


class JobConfig(Config):
    """Everything a user can say about a job. `input`, `keep_columns` and `dimensions` take a single value too, and any list or tuple.

    Raises:
        ConfigError: an option is unknown, a value is out of its range, or it does not fit another one; not pydantic's ValidationError.
    """

    input: Annotated[tuple[_Item, ...], _CORPUS, _LIST, _PLACE] = Field(
        min_length=1,
        description="File, folder (read recursively), table or glob; a local path or a URL such as s3://bucket/corpus or "
        "hf://datasets/owner/name. Accepts several.",
    )
    input_format: Annotated[InputFormat, _CORPUS] = Field(
        "auto",
        description="Format of the files; auto: by their suffixes, Parquet if there are any such files.",
    )
    text_column: Annotated[str, _CORPUS, _NAME] = Field(
        "text", min_length=1, description="Column that holds the text; a dotted path reaches a nested field (doc.body)."
    )
    text_template: Annotated[str | None, _CORPUS, _TEXT] = Field(
        None,
        min_length=1,
        description="Builds the text from several columns, instead of --text-column: '{title}\\n\\n{body}'; {{ and }} are literal braces.",
    )
    id_column: Annotated[str | None, _CORPUS, _NAME] = Field(
        None, min_length=1, description="Column copied to every shard as the row's identity; without it, shards have source and row_index."
    )
    keep_columns: Annotated[tuple[_Item, ...], _CORPUS, _LIST, _NAME] = Field(
        (), description="More columns copied to every shard, types unchanged."
    )
    limit_rows: Annotated[PositiveInt | None, _CORPUS, _NUMBER] = Field(None, description="Embed only the first N rows of the corpus.")

    output: Annotated[str, _OUTPUT, _PLACE] = Field(min_length=1, description="Folder for the shards; a local path or an fsspec URL.")
    output_format: Annotated[OutputFormat, _OUTPUT] = Field(
        "parquet",
        description="Format of the shards: parquet, or lance, which makes the completed output a Lance dataset (needs pylance).",
    )
    output_dtype: Annotated[OutputDtype, _OUTPUT] = Field(
        "float32",
        description="Number type of the embedding columns: float32, float16, int8 (255 steps over each dimension's range: --calibration) "
        "or one bit per number, packed as in sentence-transformers: binary (int8) or ubinary (uint8).",
    )
    calibration: Annotated[str | None, _OUTPUT, _PLACE] = Field(
        None,
        min_length=1,
        description="Ranges for --output-dtype int8: a .npy file (minimum and maximum of each dimension) or another output's folder; "
        "default: measured on a sample of the corpus by the first run.",
    )
    byte_stream_split: Annotated[bool, _OUTPUT, _FLAG] = Field(
        False, description="Encode the embedding column as BYTE_STREAM_SPLIT: smaller, but Spark 3.5 and fastparquet cannot read it."
    )
    token_columns: Annotated[bool, _OUTPUT, _FLAG] = Field(False, description="Add the columns num_tokens and truncated to every shard.")
    restart: Annotated[bool, _OUTPUT, _FLAG] = Field(
        False, description="Delete what is in this output and start over; asks first, and needs --yes if there is no terminal to ask on."
    )
    yes: Annotated[bool, _OUTPUT, _FLAG] = Field(
        False, description="Confirm deletions: by --restart, and of shards whose input or rows are no longer asked for."
    )

    model: Annotated[str, _MODEL, Parameter(metavar="PATH|URL|ID")] = Field(
        DEFAULT_MODEL,
        min_length=1,
        description="Folder, fsspec URL or hub id of a transformers or sentence-transformers encoder with safetensors weights.",
    )
    revision: Annotated[str | None, _MODEL, _NAME] = Field(None, min_length=1, description="Branch, tag or commit of a hub model.")
    trust_remote_code: Annotated[bool, _MODEL, _FLAG] = Field(False, description="Run Python code from the model folder.")
    prompt: Annotated[str | None, _MODEL, _TEXT] = Field(None, description="Prefix for every text, such as 'passage: '.")
    prompt_name: Annotated[str | None, _MODEL, _NAME] = Field(
        None, min_length=1, description="Name of a prompt in the model's own sentence-transformers configuration."
    )
    pooling: Annotated[Literal["auto"] | Pooling, _MODEL, _ONE_OF] = Field(
        "auto",
        description="How token vectors are combined; auto: as the model folder says, else mean (causal language models: lasttoken).",
    )
    normalize: Annotated[Literal["auto", "yes", "no"], _MODEL] = Field(
        "auto", description="Scale vectors to length 1; auto: as the model folder says, else no."
    )
    max_tokens: Annotated[PositiveInt | None, _MODEL, _NUMBER] = Field(
        None,
        description="Most tokens read from a text, or from one of its windows (--long-text), including special tokens and prompt; "
        "default: as the model folder says.",
    )
    long_text: Annotated[LongText, _MODEL] = Field(
        "truncate",
        description="What happens to a text longer than --max-tokens: truncate reads its beginning; chunk writes one row per window; "
        "average writes one vector, the average of its windows weighted by tokens; reject lists the row as rejected.",
    )
    chunk_overlap: Annotated[NonNegativeInt, _MODEL, _NUMBER] = Field(
        0, description="Most tokens that a window repeats from the previous window, in whole words or sentences."
    )
    chunk_by: Annotated[ChunkBy, _MODEL] = Field(
        "words", description="Where windows begin and end: at words, or at sentences if a sentence fits in a window."
    )
    dimensions: Annotated[tuple[PositiveInt, ...], _MODEL, _LIST, _NUMBER] = Field(
        (),
        description="Keep only the first N dimensions (Matryoshka) and normalize again unless --normalize is no; each additional, "
        "smaller N gets its own column, embedding_N.",
    )
    precision: Annotated[Literal["auto"] | Precision, _MODEL, _ONE_OF] = Field(
        "auto",
        description="Arithmetic precision of the encoder; auto: bf16 on GPUs (fp16 on T4 and V100), fp32 on CPUs. fp8, for GPUs from "
        "Hopper on, is refused where it turns a vector of a sample of the corpus below a cosine of 0.999 to fp32.",
    )

    batch_tokens: Annotated[Literal["auto"] | PositiveInt, _SPEED, _AUTO_OR_NUMBER] = Field(
        "auto",
        description="Tokens per batch; auto: measured before the first run on a large corpus, else 131072 on GPUs, 1024 on CPUs. "
        "The output keeps the first run's choice.",
    )
    unit_rows: Annotated[Literal["auto"] | PositiveInt, _SPEED, _AUTO_OR_NUMBER] = Field(
        "auto",
        description="Rows per work unit, and so per shard; auto: 10 seconds of work, measured before the first run on a large corpus "
        "(more than 524288 rows on GPUs, 16384 on CPUs; with --long-text chunk or average also more than 16 MiB, 512 KiB), "
        "else 65536 and 2048. The output keeps the first run's choice.",
    )
    workers: Annotated[str, _SPEED, Parameter(metavar="auto|N|MIN:MAX")] = Field(
        "auto", description="Encoder processes: auto (as many as the cluster has room for), N, or MIN:MAX (grows and shrinks)."
    )
    gpus_per_worker: Annotated[Literal["auto"] | Annotated[float, Field(ge=0, le=1)], _SPEED, _AUTO_OR_NUMBER] = Field(
        "auto", description="GPUs per worker: 1, a fraction of one, or 0 for CPUs; auto: 1 if the cluster has GPUs, else 0."
    )
    cpus_per_worker: Annotated[Literal["auto"] | PositiveInt, _SPEED, _AUTO_OR_NUMBER] = Field(
        "auto",
        description="CPU cores per worker; auto: 1 with a GPU, else a node's (in a cluster all but one) in equal parts up to 16.",
    )
    max_unit_attempts: Annotated[PositiveInt, _SPEED, _NUMBER] = Field(
        3, description="Number of attempts after which a failing unit is set aside."
    )

    bad_rows: Annotated[BadRows, _RUN] = Field(
        "reject",
        description="What to do with bad lines and rows without text or a finite vector: reject lists them; fail fails their unit "
        "(for an unreadable file, the run).",
    )
    dry_run: Annotated[bool, _RUN, _FLAG] = Field(
        False, description="Show what would be done, how long it would take and what it would cost; write nothing."
    )
    gpu_hour_price: Annotated[PositiveFloat | None, _RUN, Parameter(metavar="PRICE")] = Field(
        None, description="Price of one GPU hour, for the cost in --dry-run."
    )
    rate: Annotated[PositiveFloat | None, _RUN, _NUMBER] = Field(
        None, description="Tokens per second of one worker, for the time in --dry-run; default: measured, if possible."
    )
    json_summary: Annotated[str | None, _RUN, _PLACE] = Field(
        None, min_length=1, description="Also write the JSON summary to this path or URL."
    )
    report: Annotated[Literal["yes", "no"], _RUN] = Field(
        "yes", description="Write an HTML report of the run, _control/runs/<run>/report.html; it quotes ids and kept columns."
    )
    progress: Annotated[ProgressStyle, _RUN] = Field(
        "auto", description="Progress display: bar, log lines or none; auto: a bar in a terminal, else log lines."
    )
    quiet: Annotated[bool, _RUN, _FLAG] = Field(False, description="Print only errors and the summary.")
    verbose: Annotated[bool, _RUN, _FLAG] = Field(False, description="Print more, such as which store requests are retried.")
    lease_seconds: Annotated[PositiveFloat, _RUN, Parameter(metavar="SECONDS")] = Field(
        30.0, description="Seconds without a sign of life after which another run may take over the output."
    )

    @model_validator(mode="after")
    def _carries_no_secret(self) -> Self:
        for option, urls in {
            "input": self.input,
            "output": [self.output],
            "json-summary": [self.json_summary],
            "model": [self.model],
            "calibration": [self.calibration],
        }.items():
            for url in urls:
                refuse_secrets(option, url or "")
        return self

    @field_validator("output")
    @classmethod
    def _output_can_be_written(cls, value: str) -> str:
        if value.startswith("hf://"):
            raise ValueError("the job cannot write to the hub; choose a local folder or an object store, and upload the result afterward")
        return value

    @field_validator("workers")
    @classmethod
    def _workers_form(cls, value: str) -> str:
        match = re.fullmatch(r"auto|([1-9]\d*)(?::([1-9]\d*))?", value)
        if match is None:
            raise ValueError("use auto, a number of 1 or more, or MIN:MAX such as 1:64")
        low, high = match.groups()
        if high is not None and int(low) > int(high):
            raise ValueError(f"the minimum {low} is above the maximum {high}; swap them")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.text_template is not None and "text_column" in self.model_fields_set:
            raise ValueError("--text-column and --text-template are both given; keep one of them")
        if self.prompt is not None and self.prompt_name is not None:
            raise ValueError("--prompt and --prompt-name are both given; keep one of them")
        if self.quiet and self.verbose:
            raise ValueError("--quiet and --verbose are both given; keep one of them")
        if self.max_tokens is not None and self.batch_tokens != "auto" and self.batch_tokens < self.max_tokens:
            raise ValueError(
                f"--batch-tokens={self.batch_tokens} is below --max-tokens={self.max_tokens}; raise the first or lower the second"
            )
        copied = [*([self.id_column] if self.id_column else []), *self.keep_columns]
        reserved = RESERVED_COLUMNS.union(vector_columns(self.dimensions), CHUNK_COLUMNS if self.long_text == "chunk" else ())
        if taken := sorted(reserved.intersection(copied)):
            raise ValueError(
                f"column {taken[0]!r} has a name that is reserved for the shards' own columns; rename it in the source or leave it out"
            )
        if len(set(copied)) < len(copied):
            repeated = next(name for name in copied if copied.count(name) > 1)
            raise ValueError(f"column {repeated!r} is named twice in --id-column and --keep-columns; name it once")
        return self

    @field_validator("input", "keep_columns", "dimensions", mode="before")
    @classmethod
    def _one_or_several(cls, value: object) -> object:
        return () if value is None else value if isinstance(value, list | tuple) else (value,)

    @model_validator(mode="after")
    def _stores_numbers(self) -> Self:
        if any(each <= after for each, after in pairwise(self.dimensions)):
            given = " ".join(map(str, self.dimensions))
            raise ValueError(f"--dimensions {given} is not in decreasing order; give the largest number first, and each number once")
        if self.calibration is not None and self.output_dtype != "int8":
            raise ValueError(f"--calibration has no use with --output-dtype={self.output_dtype}, only with int8; leave it out")
        if self.byte_stream_split and self.output_format != "parquet":
            raise ValueError(f"--byte-stream-split is an encoding of Parquet, not of --output-format={self.output_format}; leave it out")
        if self.byte_stream_split and self.output_dtype not in ("float32", "float16"):
            raise ValueError(
                f"--byte-stream-split needs numbers of several bytes, but --output-dtype={self.output_dtype} has one; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _cuts_as_asked(self) -> Self:
        if self.long_text not in ("chunk", "average") and (self.chunk_overlap or self.chunk_by != "words"):
            option = "chunk-overlap" if self.chunk_overlap else "chunk-by"
            raise ValueError(f"--{option} needs windows, but --long-text={self.long_text} makes none; set --long-text to chunk or average")
        if self.long_text == "chunk" and self.text_column in self.keep_columns:
            raise ValueError(
                f"--keep-columns {self.text_column} would repeat the whole text in the row of each chunk; leave it out, "
                "since chunk_start and chunk_end tell where in the source's text a chunk is"
            )
        return self

    def worker_range(self) -> tuple[int, int] | None:
        """(minimum, maximum) number of workers as the user said it, None for auto."""
        if self.workers == "auto":
            return None
        low, _, high = self.workers.partition(":")
        return int(low), int(high or low)
