"""A worker that sleeps instead of encoding. All else of it is the job's own."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import cast

import numpy as np

from benchmarks.data import BenchModel
from benchmarks.simulation import COLUMNS, FINGERPRINT
from embedding.model.embedder import EmbeddedTexts, Embedder
from embedding.model.spec import LongTexts
from embedding.model.tokenizer import TokenizedTexts
from embedding.model.windows import Pieces
from embedding.run.worker import EmbeddingWorker, WorkerJob

_DIMENSIONS = 8


def sleeping_worker(seconds_per_row: float) -> type[EmbeddingWorker]:
    """A worker whose encoder takes that long and gives every row a vector of zeros."""

    class SleepingEmbedder:
        packed = True
        lanes = 1
        description: Mapping[str, str] = {"batches": "packed"}

        def __init__(self) -> None:
            self.device = ThreadPoolExecutor(1)

        def windows(self, long: LongTexts) -> Callable[[Sequence[str]], Pieces]:
            del long
            return self.pieces

        def pieces(self, texts: Sequence[str]) -> Pieces:
            rows, none = np.arange(len(texts)), np.zeros(len(texts), np.int64)
            tokens = TokenizedTexts(np.zeros(len(texts), np.int32), np.arange(len(texts) + 1), np.zeros(len(texts), np.bool_))
            return Pieces(tokens, rows, none, none, rows[:0])

        def submit(self, tokens: TokenizedTexts, batch_tokens: int) -> Callable[[], EmbeddedTexts]:
            rows = len(tokens.lengths)
            asleep = self.device.submit(time.sleep, rows * seconds_per_row)

            def finish() -> EmbeddedTexts:
                asleep.result()
                return EmbeddedTexts(np.zeros((rows, _DIMENSIONS), np.float32), np.ones(rows, np.bool_), batch_tokens, 0, rows)

            return finish

    class SleepingWorker(EmbeddingWorker):
        def load(self, job: WorkerJob) -> Embedder:
            del job
            return cast(Embedder, SleepingEmbedder())

    return SleepingWorker


def worker_job(model: BenchModel, output: str) -> WorkerJob:
    """What a run would tell its workers."""
    return WorkerJob(
        model=model.spec("fp32"),
        output=output,
        batch_tokens=2048,
        columns=COLUMNS,
        has_id=True,
        token_columns=False,
        provenance={"fingerprint": FINGERPRINT},
        max_unit_attempts=3,
        device="cpu",
        threads=None,
    )
