"""The columns that say which part of its text a shard's row is, where texts are cut into chunks."""

# Shape suffixes: S rows of a shard.
# ruff: noqa: N815

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

Int64Array = NDArray[np.int64]

_TYPES = {"chunk": pa.int32(), "chunk_start": pa.int64(), "chunk_end": pa.int64()}


@dataclass(frozen=True)
class Chunks:
    """Where S chunks lie: chunk s is `text[starts_S[s]:ends_S[s]]`, in characters; those of a text follow each other."""

    numbers_S: Int64Array
    """0 for the first chunk of a text, and so on."""
    starts_S: Int64Array
    ends_S: Int64Array

    @classmethod
    def read(cls, shard: pa.Table) -> Chunks:
        """The chunks that a shard's rows are.

        Raises:
            ValueError: a column is not there or not of its type, or the numbers are not those of texts one after another.
        """
        found = []
        for name, kind in _TYPES.items():
            if shard.column_names.count(name) != 1 or shard.column(name).type != kind or shard.column(name).null_count:
                raise ValueError(f"its column {name} is not {kind} without nulls")
            found.append(shard.column(name).to_numpy().astype(np.int64))
        numbers_S = found[0]
        right_S = (numbers_S == 0) | (np.diff(numbers_S, prepend=-1) == 1)
        if not right_S.all():
            row = int(np.argmin(right_S))
            raise ValueError(f"row {row} of the shard is chunk {numbers_S[row]}, which does not follow the chunk in the row before it")
        return cls(*found)

    def texts(self) -> Int64Array:
        """[S] the text of each, counted from 0 in the order of the shard."""
        return np.cumsum(self.numbers_S == 0) - 1

    def behind(self, copied: pa.Table) -> pa.Table:
        """The copied columns of the rows, and behind them the chunks'."""
        for (name, kind), values in zip(_TYPES.items(), (self.numbers_S, self.starts_S, self.ends_S), strict=True):
            copied = copied.append_column(pa.field(name, kind, nullable=False), pa.array(values, kind))
        return copied

    def fault(self, text_of: Callable[[int], str]) -> str | None:
        """What is wrong with the places, if anything is; `text_of` gives the text that a row's chunk is of."""
        first = np.flatnonzero(self.numbers_S == 0)
        for start, end in zip(first.tolist(), [*first[1:].tolist(), len(self.numbers_S)], strict=True):
            fault = _fault_in(text_of(start), self.starts_S[start:end].tolist(), self.ends_S[start:end].tolist())
            if fault:
                return f"the chunks of the text at row {start} of the shard {fault}"
        return None


def _fault_in(text: str, starts: list[int], ends: list[int]) -> str | None:
    """They must be in order and inside the text, with nothing but blanks outside all of them."""
    if any(here >= there for places in (starts, ends) for here, there in pairwise(places)):
        return "are not in order"
    if starts[0] < 0 or ends[-1] > len(text) or any(start > end for start, end in zip(starts, ends, strict=True)):
        return f"do not lie within its {len(text)} characters"
    for end, start in zip([0, *ends], [*starts, len(text)], strict=True):
        if text[end:start].strip():
            return f"leave out text between characters {end} and {start}"
    return None
