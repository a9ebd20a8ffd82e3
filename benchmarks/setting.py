"""What is measured on what: shared by all stages of a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

from benchmarks.data import BenchModel
from embedding.errors import first_line
from embedding.model.batching import default_batch_tokens
from embedding.names import Precision

Result: TypeAlias = dict[str, Any]


def one_line(error: Exception) -> str:
    """Why something was not measured."""
    return f"{type(error).__name__}: {first_line(error)}"


@dataclass(frozen=True)
class Setting:
    """What all stages of one table share."""

    model: BenchModel
    texts: list[str]
    device: str
    precision: Precision
    rounds: int
    threads: int
    """Of a CPU, for the project and for each peer. Not what torch says: an Embedder sets it to 1 for the whole process."""
    batch_tokens: int

    @classmethod
    def of(cls, model: BenchModel, texts: list[str], device: str, precision: Precision, rounds: int, threads: int) -> Setting:
        """With the batch that the job would take."""
        return cls(model, texts, device, precision, rounds, threads, default_batch_tokens(device, model.max_tokens))
