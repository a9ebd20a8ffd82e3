"""The form of shards that a name stands for."""

from __future__ import annotations

from embedding.corpus.shards.form import ShardForm
from embedding.corpus.shards.lance import LANCE
from embedding.corpus.shards.parquet import ParquetShards
from embedding.names import OutputFormat


def shard_form(output_format: OutputFormat, *, byte_stream_split: bool = False) -> ShardForm:
    """What writes and reads shards of that format; whether its library is there is not asked yet."""
    return LANCE if output_format == "lance" else ParquetShards(byte_stream_split)
