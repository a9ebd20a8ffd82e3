"""Reading some rows of a corpus in a bounded time, and what measures on them in a process like a worker's. Knows no Ray."""

from __future__ import annotations

import random
import time
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from typing import Generic, TypeVar

import numpy as np
import pyarrow as pa

from embedding.corpus.faults import row_faults
from embedding.corpus.plan import SourceLayout, Unit, make_unit
from embedding.corpus.reader import Columns, UnitRows, read_unit
from embedding.errors import SourceError, StorageError
from embedding.model.spec import LongTexts, ModelSpec

_READS_AT_ONCE = 8
_READ_SECONDS = 10.0
"""After that the places that were read must do: row groups can be large and stores slow."""
CHARS_PER_TOKEN = 4
"""Of most languages, about."""


@dataclass(frozen=True, kw_only=True)
class SampleJob:
    """What a process that measures on a sample needs to know."""

    model: ModelSpec
    columns: Columns
    sample: Sequence[Unit]
    device: str
    threads: int | None
    """CPU threads of the encoder, None for a GPU worker."""
    long_text: LongTexts


JobT = TypeVar("JobT", bound=SampleJob)
FoundT = TypeVar("FoundT")


class OnSample(ABC, Generic[JobT, FoundT]):
    """Lives in a process like a worker's, which may have to wait for its place in the cluster."""

    def __init__(self, job: JobT) -> None:
        self._job = job

    def is_there(self) -> bool:
        """Answers as soon as the process has its place."""
        return bool(self._job.sample)

    @abstractmethod
    def find(self) -> FoundT:
        """Read the sample, load the model, measure.

        Raises:
            EmbeddingJobError: nothing could be measured.
        """


def read_in_time(places: Sequence[Unit], columns: Columns) -> tuple[dict[int, UnitRows], str]:
    """The rows of those places that can be read in time, by the place's number; and what was wrong with one that cannot be read.

    In a random order, the same one each time: whatever is read in time is from everywhere.

    Raises:
        EmbeddingJobError: what is wrong with one is wrong with all of them.
    """
    deadline = time.monotonic() + _READ_SECONDS
    read: dict[int, UnitRows] = {}
    unreadable = ""
    turns = random.Random(len(places)).sample(range(len(places)), len(places))
    pool = ThreadPoolExecutor(_READS_AT_ONCE, thread_name_prefix="sample")
    try:
        for number, future in [(number, pool.submit(read_unit, places[number], columns)) for number in turns]:
            try:
                read[number] = future.result(max(0.1, deadline - time.monotonic()))
            except TimeoutError:
                break
            except (SourceError, StorageError) as error:
                unreadable = unreadable or str(error)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    return {number: read[number] for number in sorted(read)}, unreadable


def embeddable_texts(rows: UnitRows) -> pa.ChunkedArray:
    """The texts of those rows that can be embedded."""
    return rows.text.take(np.delete(np.arange(len(rows.text)), list(row_faults(rows))))


def spread_blocks(layouts: Sequence[SourceLayout], *, blocks: int, block_rows: int, block_bytes: int, limit_rows: int | None) -> list[Unit]:
    """At most `blocks` runs of at most `block_rows` rows, one in each of equal parts of the corpus, at a random place, always the same one.

    Blocks of large rows are shorter: of about `block_bytes` of their file. A corpus with no more rows than that is taken whole.
    """
    ends = list(accumulate(layout.num_rows for layout in layouts))
    rows = min(ends[-1] if ends else 0, limit_rows or ends[-1])
    chance = random.Random(rows)
    places = min(blocks, -(-rows // block_rows))
    found = []
    for place in range(places):
        start, end = rows * place // places, rows * (place + 1) // places
        row = start + int((end - start - min(block_rows, end - start)) * chance.random())
        layout = layouts[number := bisect_right(ends, row)]
        first = row - (ends[number] - layout.num_rows)
        fitting = max(1, block_bytes * layout.num_rows // max(1, layout.source.size))
        wanted = min(block_rows, fitting, end - row, layout.num_rows - first)
        found.append(make_unit(layout.source, first, wanted, "sample", near=layout.mark_before(first)))
    return found
