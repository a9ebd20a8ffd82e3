"""What a read process does with one unit. Knows no Ray, and no torch: a process that reads starts without it, and holds none of it."""

from __future__ import annotations

import time

import pyarrow as pa

from embedding.corpus.columns import Columns
from embedding.corpus.reader import read_unit
from embedding.errors import AccessError, EmbeddingJobError
from embedding.run.attempts import Attempts
from embedding.run.exchange import decode_unit, encode_rows, read_result

_REASON_CHARS = 500
"""Other people's errors can quote what they met, a whole text for instance."""


def read_stage(batch: pa.Table, columns: Columns, attempts: Attempts, max_attempts: int) -> pa.Table:
    """One unit in, one row of READ_SCHEMA out: its rows, or why they cannot be had.

    Raises:
        AccessError: the source cannot be read any more.
    """
    text = batch.column("unit")[0].as_py()
    unit = decode_unit(text)
    started = time.time()
    key = f"read {unit.id}"
    if attempts.begin(key) > max_attempts:
        return read_result(text, None, f"its reader died {max_attempts} times; {unit.source.uri} may be damaged or too large", started)
    try:
        return read_result(text, encode_rows(read_unit(unit, columns)), None, started)
    except AccessError:  # the plan could read it: credentials have expired, and no other unit can be read
        raise
    except Exception as error:  # noqa: BLE001  (whatever a file does to its reader, the run goes on without it)
        return read_result(text, None, reason_of(error), started)
    finally:
        attempts.settle(key)


def reason_of(error: Exception) -> str:
    """What went wrong on one line, of bounded length where others worded it."""
    if isinstance(error, EmbeddingJobError):
        return str(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:_REASON_CHARS]
