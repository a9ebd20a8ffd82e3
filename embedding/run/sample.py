"""Reading some rows of a corpus in a bounded time, to know more of it before a run."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from embedding.corpus.plan import Unit
from embedding.corpus.reader import Columns, UnitRows, read_unit
from embedding.errors import SourceError, StorageError

_READS_AT_ONCE = 8
_READ_SECONDS = 10.0
"""After that the places that were read must do: row groups can be large and stores slow."""


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
