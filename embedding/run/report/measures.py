"""What commit records say about a run: its pace, where the workers' time went, which units were slow."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from embedding.corpus.lengths import LENGTH_EDGES

Floats = npt.NDArray[np.float64]

_PACE_BINS = 80
SLOWEST = 8
STEPS = ("read_seconds", "tokenize_seconds", "wait_seconds", "encode_seconds", "write_seconds")


@dataclass(frozen=True)
class Pace:
    """Tokens a second over a run, a unit's tokens spread evenly over the time that it was encoded."""

    edges: Floats
    """Seconds since the first batch began."""
    tokens_per_second: Floats
    began: float
    """Unix time."""

    @property
    def seconds(self) -> float:
        """From the first batch's start to the last one's end."""
        return float(self.edges[-1])


@dataclass(frozen=True)
class WorkerTime:
    """Where a worker's time went between the first batch of the run and the last one, of all workers."""

    name: str
    units: int
    tokens: int
    encoding: float
    tokenizing: float
    """Seconds that the device stood still while the next unit was tokenized."""
    waiting: float
    """Seconds that it stood still with no unit to tokenize either: reads, writes and scheduling were behind."""
    outside: float
    """Seconds before its first unit and after its last one."""

    @property
    def seconds(self) -> float:
        """All of it: the same for every worker."""
        return self.encoding + self.tokenizing + self.waiting + self.outside


def total(records: pa.Table, column: str) -> int:
    """Sum of a column of counts."""
    return int(pc.sum(records[column]).as_py() or 0)


def timed(records: pa.Table) -> pa.Table:
    """The records that know when their unit was encoded: those read from footers do not."""
    return records.filter(pc.greater(records["encode_started"], 0))


def pace(records: pa.Table) -> Pace:
    """The pace over at least one timed record."""
    starts, seconds, tokens = (numbers(records, name) for name in ("encode_started", "encode_seconds", "tokens"))
    seconds = np.maximum(seconds, 1e-6)
    began = float(starts.min())
    edges = np.linspace(0.0, float((starts + seconds).max()) - began, _PACE_BINS + 1)
    encoded = np.array([(tokens * np.clip((edge - (starts - began)) / seconds, 0, 1)).sum() for edge in edges])
    return Pace(edges, np.diff(encoded) / np.diff(edges), began)


def worker_times(records: pa.Table) -> list[WorkerTime]:
    """Of each worker of the timed records, most tokens first.

    A gap between two units on the device goes to tokenizing as far as the second was being tokenized right before, else to waiting.
    """
    starts, seconds, tokenized, tokens = (
        numbers(records, name) for name in ("encode_started", "encode_seconds", "tokenize_seconds", "tokens")
    )
    ends = starts + seconds
    encoded = records["worker"].combine_chunks().dictionary_encode()
    encoded = encoded.combine_chunks() if isinstance(encoded, pa.ChunkedArray) else encoded
    workers = encoded.indices.to_numpy()
    order = np.lexsort((starts, workers))
    found = []
    for rows in np.split(order, np.flatnonzero(np.diff(workers[order])) + 1):
        free = np.maximum.accumulate(ends[rows])
        gaps = np.maximum(0.0, starts[rows][1:] - free[:-1])
        tokenizing = np.minimum(gaps, tokenized[rows][1:])
        outside = starts[rows][0] - starts.min() + ends.max() - free[-1]
        inside = free[-1] - starts[rows][0]
        found.append(
            WorkerTime(
                name=encoded.dictionary[int(workers[rows[0]])].as_py(),
                units=len(rows),
                tokens=int(tokens[rows].sum()),
                encoding=float(inside - gaps.sum()),
                tokenizing=float(tokenizing.sum()),
                waiting=float((gaps - tokenizing).sum()),
                outside=float(outside),
            )
        )
    return sorted(found, key=lambda worker: (-worker.tokens, worker.name))


def slowest(records: pa.Table) -> list[dict[str, object]]:
    """The units that took longest from the read to the put, as records with `seconds`; waiting for the device is not their fault."""
    seconds = sum((numbers(records, name) for name in STEPS if name != "wait_seconds"), np.zeros(records.num_rows))
    rows = np.argsort(-seconds, kind="stable")[:SLOWEST]
    return [{**record, "seconds": float(seconds[row])} for row, record in zip(rows, records.take(rows).to_pylist(), strict=True)]


def lengths(records: pa.Table) -> npt.NDArray[np.int64]:
    """Rows by tokens over all records, in the bins of LENGTH_EDGES."""
    column = records["lengths"].combine_chunks()
    array = pa.concat_arrays(column.chunks) if isinstance(column, pa.ChunkedArray) and column.num_chunks else column
    counts = np.zeros(len(LENGTH_EDGES), np.int64)
    if records.num_rows:
        sizes = pc.list_value_length(array).to_numpy(zero_copy_only=False)
        bins = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        np.add.at(counts, bins, array.flatten().to_numpy(zero_copy_only=False))
    return counts


def numbers(records: pa.Table, column: str) -> Floats:
    """A column as numbers."""
    values: Floats = records[column].to_numpy().astype(np.float64)
    return values
