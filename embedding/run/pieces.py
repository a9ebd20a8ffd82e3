"""Pieces of texts and their vectors to the rows of a shard: a row a text, or a row a chunk of it."""

# Shape suffixes: P pieces, S rows of the shard, D width.
# ruff: noqa: N815

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from embedding.corpus.chunks import Chunks
from embedding.corpus.lengths import length_counts
from embedding.corpus.shard import take_rows
from embedding.corpus.vectors import side_by_side

if TYPE_CHECKING:
    from embedding.model.embedder import EmbeddedTexts, Embedder
    from embedding.model.spec import LongTexts, ModelSpec
    from embedding.model.windows import Pieces

Int64Array = npt.NDArray[np.int64]

_PARTS_QUEUED = 2
"""One is computed, the other follows it without a gap."""


@dataclass(frozen=True)
class ShardRows:
    """S rows of a shard, in the order of the texts."""

    texts_S: Int64Array
    """The number of each row's text."""
    vectors_SD: npt.NDArray[np.float32]
    num_tokens_S: Int64Array
    truncated_S: npt.NDArray[np.bool_]
    chunks: Chunks | None
    """Where the rows are chunks."""
    not_finite: list[int]
    """Texts that have no row, since a vector of theirs is not finite."""
    duplicates: int
    """Pieces with the tokens of an earlier one."""

    def facts(self) -> dict[str, object]:
        """What the unit's record says about the rows."""
        facts: dict[str, object] = {
            "tokens": int(self.num_tokens_S.sum()),
            "truncated": int(self.truncated_S.sum()),
            "duplicates": self.duplicates,
            "lengths": length_counts(self.num_tokens_S),
        }
        return facts if self.chunks is None else facts | {"chunks": len(self.texts_S)}

    def token_columns(self) -> dict[str, pa.Array]:
        """The columns of --token-columns."""
        return {"num_tokens": pa.array(self.num_tokens_S, pa.int32()), "truncated": pa.array(self.truncated_S)}

    def identified(self, copied: pa.Table, rows_of_texts: Int64Array) -> pa.Table:
        """The rows' copied columns, out of those of the unit's rows, and where their chunks are."""
        taken = take_rows(copied, rows_of_texts[self.texts_S])
        return taken if self.chunks is None else self.chunks.behind(taken)


def submit_pieces(embedder: Embedder, pieces: Pieces, batch_tokens: int) -> Callable[[], EmbeddedTexts]:
    """Begin to embed all pieces; the answer waits for their vectors.

    Part by part, one queued while the one before it is computed: what is needed beside tokens and vectors does not grow with the unit.

    Raises:
        ModelError: a single piece does not fit the memory.
    """
    done: list[EmbeddedTexts] = []
    queued: deque[Callable[[], EmbeddedTexts]] = deque()
    for part in pieces.parts:
        queued.append(embedder.submit(part, batch_tokens))
        if len(queued) == _PARTS_QUEUED:
            done.append(queued.popleft()())
    return lambda: _joined(done + [finish() for finish in queued])


def _joined(parts: Sequence[EmbeddedTexts]) -> EmbeddedTexts:
    if len(parts) == 1:
        return parts[0]
    return type(parts[0])(
        np.concatenate([each.vectors_RD for each in parts]),
        np.concatenate([each.finite_R for each in parts]),
        parts[-1].batch_tokens,
        sum(each.padding_tokens for each in parts),
        sum(each.distinct_rows for each in parts),
    )


def shard_rows(pieces: Pieces, embedded: EmbeddedTexts, long: LongTexts, model: ModelSpec) -> ShardRows:
    """The rows that the pieces make: all of a text's, or none where a vector of them is not finite."""
    finite_P, texts_P = embedded.finite_R, pieces.texts_P
    not_finite = np.unique(texts_P[~finite_P])
    duplicates = len(texts_P) - embedded.distinct_rows
    kept = slice(None) if finite_P.all() else ~np.isin(texts_P, not_finite)
    texts, vectors, lengths, truncated = (
        texts_P[kept],
        embedded.vectors_RD[kept],
        pieces.tokens.lengths[kept],
        pieces.tokens.truncated[kept],
    )
    chunks = None
    if long.how == "chunk":
        chunks = Chunks(_numbers(texts), pieces.starts_P[kept], pieces.ends_P[kept])
    elif long.how == "average" and len(first := firsts(texts)) < len(texts):
        vectors = average(vectors, lengths, first, model)
        texts, lengths, truncated = texts[first], np.add.reduceat(lengths, first), np.logical_or.reduceat(truncated, first)
    return ShardRows(texts, vectors, lengths, truncated, chunks, not_finite.tolist(), duplicates)


def average(vectors_PD: npt.NDArray[np.float32], tokens_P: Int64Array, first: Int64Array, model: ModelSpec) -> npt.NDArray[np.float32]:
    """[S, D] of each text, whose pieces begin at `first`, the mean of its pieces' vectors, each weighing its tokens.

    As OpenAI's cookbook has it ("Embedding texts that are longer than the model's maximum context length"): finished vectors are
    averaged, then the mean is scaled to length 1, where the model's are. A text of one piece keeps its vector.
    """
    means_SD = vectors_PD[first]
    ends = np.append(first[1:], len(vectors_PD))
    for row in np.flatnonzero(ends - first > 1).tolist():
        part = slice(first[row], ends[row])
        mean = np.einsum("p,pd->d", tokens_P[part].astype(np.float64), vectors_PD[part].astype(np.float64)) / tokens_P[part].sum()
        for column in side_by_side(model.columns) if model.normalize else ():
            mean[column] /= np.linalg.norm(mean[column]) or 1.0
        means_SD[row] = mean
    return means_SD


def firsts(texts_P: Int64Array) -> Int64Array:
    """Where each text's pieces begin."""
    return np.flatnonzero(np.diff(texts_P, prepend=-1))


def _numbers(texts_P: Int64Array) -> Int64Array:
    """Each piece's number among its text's: 0, 0, 1, 2, 0 for the texts 4, 5, 5, 5, 7."""
    first = firsts(texts_P)
    return np.arange(len(texts_P)) - np.repeat(first, np.diff(first, append=len(texts_P)))
