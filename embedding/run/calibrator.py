"""What the ranges of int8 are measured on: a sample of the corpus, embedded in float32. Knows no Ray."""

# Shape suffixes: W numbers of a row's vectors side by side.

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from embedding.corpus.columns import Columns
from embedding.corpus.plan import SourceLayout, Unit
from embedding.corpus.vectors import Calibration, VectorColumns
from embedding.model.spec import ModelSpec
from embedding.run.models import model_folder
from embedding.run.pieces import shard_rows, submit_pieces
from embedding.run.placement import Placement
from embedding.run.sample import CHARS_PER_TOKEN, OnSample, SampleJob, embeddable_texts, read_in_time, spread_blocks
from embedding.run.settings import long_texts_of

if TYPE_CHECKING:
    from embedding.config import JobConfig

_BLOCKS = 64
_BLOCK_ROWS = {"cpu": 32, "cuda": 256}
"""Beside each other, rows are alike: many small blocks say more than a few large ones."""
_BLOCK_BYTES = 2**20
_SAMPLE_CHARS = {"cpu": 2**19, "cuda": 2**24}
"""Of what is encoded: 130,000 tokens are half a minute of a small model on a CPU, four million as long on a GPU."""


@dataclass(frozen=True, kw_only=True)
class CalibrationJob(SampleJob):
    """What is measured, and how."""

    batch_tokens: int


@dataclass(frozen=True)
class Ranges:
    """What was found."""

    rows: int
    """Vectors that were looked at; where there are none, there are no ranges."""
    calibration: Calibration


class Calibrator(OnSample[CalibrationJob, Ranges]):
    """Measures the range of each number of a vector."""

    def find(self) -> Ranges:
        """Read the sample, embed it as a worker does, but in float32, and look at the numbers.

        Raises:
            EmbeddingJobError: no place of the sample can be read as asked, or the model cannot be loaded.
        """
        from embedding.model.embedder import Embedder  # not for the driver, which needs only what is found

        job = self._job
        model = replace(job.model, precision="fp32")
        embedder = Embedder(model, device=job.device, threads=job.threads, folder=model_folder(model))
        pieces = embedder.windows(job.long_text)(sample_texts(job))
        if not len(pieces.texts_P):
            return Ranges(0, {})
        vectors_RW = shard_rows(pieces, submit_pieces(embedder, pieces, job.batch_tokens)(), job.long_text, model).vectors_SD
        columns = VectorColumns(model.columns)
        return Ranges(len(vectors_RW), columns.calibrated(vectors_RW) if len(vectors_RW) else {})


def calibration_job(
    config: JobConfig, layouts: Sequence[SourceLayout], columns: Columns, model: ModelSpec, batch_tokens: int, placement: Placement
) -> CalibrationJob:
    """What a worker of this run measures on."""
    return CalibrationJob(
        model=model,
        columns=columns,
        sample=calibration_sample(layouts, placement.device, config.limit_rows),
        batch_tokens=batch_tokens,
        device=placement.device,
        threads=placement.threads,
        long_text=long_texts_of(config),
    )


def calibration_sample(layouts: Sequence[SourceLayout], device: str, limit_rows: int | None) -> list[Unit]:
    """Blocks of rows from all over the corpus, the same ones for the same corpus."""
    return spread_blocks(layouts, blocks=_BLOCKS, block_rows=_BLOCK_ROWS[device], block_bytes=_BLOCK_BYTES, limit_rows=limit_rows)


def sample_texts(job: CalibrationJob) -> list[str]:
    """The texts of the sample, fewer where they are long: then some of each part of it, always the same ones."""
    found, _ = read_in_time(job.sample, replace(job.columns, copied=()))
    parts = [embeddable_texts(rows) for rows in found.values()]
    places = [(part, row) for part in parts for row in range(len(part))]
    enough = _SAMPLE_CHARS[job.device]
    head_chars = enough if job.long_text.cuts else CHARS_PER_TOKEN * job.model.max_tokens
    texts: list[str] = []
    chars = 0
    for part, row in random.Random(len(places)).sample(places, len(places)):
        texts.append(part[row].as_py())
        chars += min(len(texts[-1]), head_chars)
        if chars >= enough:
            break
    return [text[:enough] for text in texts] if job.long_text.cuts else texts
