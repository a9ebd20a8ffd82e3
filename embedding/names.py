"""Names that all parts of the job share: what options can be set to, and what the shards' own columns are called.

Apart from the configuration, so that processes that read or embed need not load what checks one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

DEFAULT_MODEL = "sentence-transformers/all-MiniLM-L6-v2"

Pooling: TypeAlias = Literal["mean", "cls", "max", "weightedmean", "mean_sqrt_len", "lasttoken"]
"""How token vectors become a text's vector; the names and meanings are sentence-transformers'."""
Precision: TypeAlias = Literal["fp32", "bf16", "fp16", "fp8"]
InputFormat: TypeAlias = Literal["auto", "parquet", "arrow", "jsonl", "csv", "tsv"]
BadRows: TypeAlias = Literal["reject", "fail"]
OutputDtype: TypeAlias = Literal["float32", "float16", "int8", "binary", "ubinary"]
OutputFormat: TypeAlias = Literal["parquet", "lance"]
LongText: TypeAlias = Literal["truncate", "chunk", "average", "reject"]
ChunkBy: TypeAlias = Literal["words", "sentences"]
ProgressStyle: TypeAlias = Literal["auto", "bar", "log", "none"]

RESERVED_COLUMNS = frozenset({"embedding", "num_tokens", "truncated", "source", "row_index"})
"""Column names of a shard that are the job's own."""
CHUNK_COLUMNS = frozenset({"chunk", "chunk_start", "chunk_end"})
"""Those that a shard has only where it has a row for each chunk of a text."""


def vector_columns(dimensions: Sequence[int]) -> tuple[str, ...]:
    """The columns of vectors with so many dimensions each, the largest first: its name does not say how many."""
    return ("embedding", *(f"embedding_{number}" for number in dimensions[1:]))
