"""Dataset-scale text embedding on Ray Data: a Parquet corpus in, embedding shards out.

from embedding import JobConfig, embed_corpus

summary = embed_corpus(JobConfig(input=("s3://bucket/corpus",), output="s3://bucket/vectors"))
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from embedding.config import JobConfig
    from embedding.run.job import embed_corpus
    from embedding.run.summary import Summary

__all__ = ["JobConfig", "Summary", "embed_corpus"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import what takes long only when it is needed: Ray and torch, so that `--help` and a wrong option answer at once, and pydantic, so
    that Ctrl-C finds a handler.
    """
    if name == "JobConfig":
        from embedding.config import JobConfig

        return JobConfig
    if name == "embed_corpus":
        from embedding.run.job import embed_corpus

        return embed_corpus
    if name == "Summary":
        from embedding.run.summary import Summary

        return Summary
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
