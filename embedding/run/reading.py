"""What a read process does with a parcel of units. Knows no Ray, and no torch, which a process that reads would take seconds to load."""

from __future__ import annotations

import time

import pyarrow as pa

from embedding.corpus.columns import Columns
from embedding.corpus.plan import Unit
from embedding.corpus.reader import read_unit
from embedding.errors import AccessError, EmbeddingJobError
from embedding.run.attempts import Attempts
from embedding.run.exchange import ReadUnit, decode_units, encode_read, encode_rows

_REASON_CHARS = 500
"""Other people's errors can quote what they met, a whole text for instance."""


def read_stage(batch: pa.Table, columns: Columns, attempts: Attempts, max_attempts: int) -> pa.Table:
    """A parcel of units in, what `encode_read` makes of it out: the rows of each, or why they cannot be had.

    Raises:
        AccessError: the source cannot be read any more.
    """
    return encode_read([_read(unit, columns, attempts, max_attempts) for unit in decode_units(batch)])


def _read(unit: Unit, columns: Columns, attempts: Attempts, max_attempts: int) -> ReadUnit:
    started, rows, error = time.time(), None, None
    key = f"read {unit.id}"
    if attempts.begin(key) > max_attempts:
        error = f"its reader died {max_attempts} times; {unit.source.uri} may be damaged or too large"
        return ReadUnit(unit, rows, error, started, 0.0)
    try:
        rows = encode_rows(read_unit(unit, columns))
    except AccessError:  # the plan could read it: credentials have expired, and no other unit can be read
        raise
    except Exception as caught:  # noqa: BLE001  (whatever a file does to its reader, the run goes on without it)
        error = reason_of(caught)
    finally:
        attempts.settle(key)
    return ReadUnit(unit, rows, error, started, time.time() - started)


def reason_of(error: Exception) -> str:
    """What went wrong on one line, of bounded length where others worded it."""
    if isinstance(error, EmbeddingJobError):
        return str(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:_REASON_CHARS]
