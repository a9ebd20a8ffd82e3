"""What a run would do, how long it would take and what it would cost, from a sample of its rows: for --dry-run. Knows no Ray."""

from __future__ import annotations

import json
import logging
import math
import random
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import accumulate, cycle, pairwise

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from embedding.config import JobConfig
from embedding.corpus.faults import row_faults
from embedding.corpus.ledger import read_ledger
from embedding.corpus.output import Output
from embedding.corpus.plan import Unit, make_unit
from embedding.corpus.reader import Columns, UnitRows
from embedding.corpus.vectors import VectorColumns
from embedding.errors import count
from embedding.model.embedder import EmbeddedTexts, Embedder
from embedding.model.spec import TRUNCATE, LongTexts, ModelSpec
from embedding.model.tokenizer import TokenizedTexts, Tokenizer
from embedding.model.windows import Windows
from embedding.run.models import model_folder
from embedding.run.placement import Placement
from embedding.run.sample import read_in_time
from embedding.run.settings import long_texts_of

log = logging.getLogger(__name__)

_BLOCKS = 64
_BLOCK_ROWS = 16
"""Rows beside each other are alike: many small blocks say more than a few large ones, and each costs a read."""
_ENCODE_SECONDS = 2.0
_LEAST_TOKENS = 256
"""Fewer tell no pace: the fixed cost of a call hides it."""
_RUNS = "_control/runs"
_RUNS_BACK = 20


@dataclass(frozen=True)
class TextSample:
    """What a sample of the rows says about all of them."""

    tokens: TokenizedTexts
    """Of what would be encoded: texts, or pieces of them."""
    rows: int
    """Rows that were looked at, those without text included."""
    tokens_per_row: float
    tokens_error: float
    """Standard error of that, 0 where every row was looked at."""
    truncated_share: float
    long_share: float
    """Texts of more than max_tokens, whatever becomes of them."""
    windows_per_row: float
    rejected_share: float
    unreadable: str
    """Why a block could not be read, empty where all could."""


@dataclass(frozen=True)
class Rate:
    """How many tokens a worker embeds in a second, and where that number comes from."""

    tokens_per_second: float
    origin: str


def estimate(
    config: JobConfig,
    output: Output,
    pending: Sequence[Unit],
    columns: Columns,
    model: ModelSpec,
    batch_tokens: int,
    placement: Placement,
    *,
    here: bool,
) -> dict[str, object]:
    """What embedding the pending units takes; None for what cannot be known. `here`: the run would be on this machine, which can be tried.

    Shares are of rows. Bytes are those of the vectors where this output has no shard yet that could be measured. Time and GPU hours
    are those of the workers at work, from the first batch to the last.
    """
    long = long_texts_of(config)
    sample = sample_texts(pending, model, columns, config.output, long) if pending else None
    rows = sum(unit.num_rows for unit in pending)
    bytes_per_row, measured = _shard_bytes_per_row(output, VectorColumns(model.columns, config.output_dtype))
    if sample is not None and not measured and long.how == "chunk":
        bytes_per_row *= sample.windows_per_row
    facts: dict[str, object] = {"rows to do": rows, "shard bytes": round(rows * bytes_per_row), "shard bytes measured": measured}
    if sample is None:
        return facts
    if sample.unreadable:
        log.warning("part of the sample cannot be read: %s", sample.unreadable)
    rate = Rate(config.rate, "as given by --rate") if config.rate else earlier_rate(output)
    too_small = rate is None and here and len(sample.tokens.ids) < _LEAST_TOKENS
    if rate is None and here and not too_small:
        rate = rate_here(model, sample.tokens, batch_tokens, placement.device, placement.threads)
    tokens = rows * sample.tokens_per_row
    worker_hours = tokens / rate.tokens_per_second / 3600 if rate else None
    gpu_hours = worker_hours * placement.gpus if worker_hours is not None else None
    workers = max(1, placement.max_workers)
    return facts | {
        "rows sampled": sample.rows,
        "tokens a row": round(sample.tokens_per_row, 2),
        "tokens to do": round(tokens),
        "standard error of tokens": round(rows * sample.tokens_error) if math.isfinite(sample.tokens_error) else None,
        "truncated share": round(sample.truncated_share, 4),
        "long share": round(sample.long_share, 4),
        "windows a row": round(sample.windows_per_row, 2) if long.how in ("chunk", "average") else None,
        "rejected share": round(sample.rejected_share, 4),
        "too small to measure": too_small,
        "tokens a second": round(rate.tokens_per_second * workers) if rate else None,
        "rate": rate.origin if rate else None,
        "seconds": round(3600 * worker_hours / workers, 1) if worker_hours is not None else None,
        "GPU hours": gpu_hours,
        "cost": round(gpu_hours * config.gpu_hour_price, 2) if gpu_hours is not None and config.gpu_hour_price else None,
    }


def _shard_bytes_per_row(output: Output, vectors: VectorColumns) -> tuple[float, bool]:
    """Bytes, and whether they were measured on this output's shards; if not, only the vectors count, not what else a shard has."""
    ledger = read_ledger(output.storage, ("bytes", "rows", "error"))
    committed = ledger.filter(pc.equal(ledger["error"], ""))
    rows = pc.sum(committed["rows"]).as_py()
    return (pc.sum(committed["bytes"]).as_py() / rows, True) if rows else (vectors.row_bytes, False)


def sample_texts(pending: Sequence[Unit], model: ModelSpec, columns: Columns, seed: str, long: LongTexts = TRUNCATE) -> TextSample | None:
    """Tokenize blocks of rows from all over the pending units; None where none could be read.

    One block of each of equal parts of the rows, at a random place, the same one for the same `seed`; the error is that of a mean
    over clusters.
    """
    found, unreadable = read_in_time(_blocks(pending, seed), replace(columns, copied=()))
    if not found:
        return None
    read = [_texts(rows) for rows in found.values()]
    windows = Windows(Tokenizer(model, model_folder(model, weights=False)), model.max_tokens, long)
    pieces = windows([text for texts in read for text in texts if text is not None])
    rows = np.array([len(texts) for texts in read])
    with_text = np.array([sum(text is not None for text in texts) for texts in read])
    lengths = np.bincount(pieces.texts_P, pieces.tokens.lengths, minlength=int(with_text.sum()))
    too_many = pieces.tokens.truncated.sum() + (np.bincount(pieces.texts_P) > 1).sum() + len(pieces.too_long)
    ends = np.cumsum(with_text)
    per_block = np.add.reduceat(np.append(lengths, 0), ends - with_text) * (with_text > 0)
    share = rows.sum() / sum(unit.num_rows for unit in pending)
    mean = per_block.sum() / rows.sum()
    return TextSample(
        tokens=pieces.tokens,
        rows=int(rows.sum()),
        tokens_per_row=float(mean),
        tokens_error=_standard_error(per_block - mean * rows, rows) * math.sqrt(1 - share) if share < 1 else 0.0,
        truncated_share=float(pieces.tokens.truncated.sum() / rows.sum()),
        long_share=float(too_many / rows.sum()),
        windows_per_row=float(len(pieces.texts_P) / rows.sum()),
        rejected_share=float(1 - (with_text.sum() - len(pieces.too_long)) / rows.sum()),
        unreadable=unreadable,
    )


def _standard_error(residuals_B: npt.NDArray[np.float64], rows_B: npt.NDArray[np.int64]) -> float:
    """Of a ratio over B blocks in the order of the corpus; infinite for one block, which tells nothing about the others.

    From the differences of neighbors, as is right for a sample spread evenly: what differs between far places, such as one file and
    another, is in the sample as it is in the corpus.
    """
    blocks = len(rows_B)
    if blocks < 2:
        return math.inf
    return float(np.sqrt((np.diff(residuals_B) ** 2).sum() / (2 * blocks * (blocks - 1))) / rows_B.mean())


def _blocks(pending: Sequence[Unit], seed: str) -> list[Unit]:
    """The rows to look at, as units of their own, in the order of the pending ones. All rows where there are few."""
    rows = sum(unit.num_rows for unit in pending)
    if rows <= _BLOCKS * _BLOCK_ROWS:
        return list(pending)
    chance = random.Random(seed)
    ends = list(accumulate(unit.num_rows for unit in pending))
    blocks = []
    for number in range(_BLOCKS):
        place = int(rows * (number + chance.random()) / _BLOCKS)
        found = int(np.searchsorted(ends, place, side="right"))
        unit = pending[found]
        inside = min(place - (ends[found] - unit.num_rows), max(0, unit.num_rows - _BLOCK_ROWS))
        blocks.append(make_unit(unit.source, unit.first_row + inside, min(_BLOCK_ROWS, unit.num_rows), seed, unit.near))
    return blocks


def _texts(rows: UnitRows) -> list[str | None]:
    """None for rows that would be rejected."""
    faults = row_faults(rows)
    return [None if row in faults else text.as_py() for row, text in enumerate(rows.text)]


def earlier_rate(output: Output) -> Rate | None:
    """The pace, by worker, of the last run on this output that embedded enough to tell; None where none of the last few did."""
    names = [name for name in output.storage.list(_RUNS) if name.endswith("/summary.json")]
    for name in names[: -_RUNS_BACK - 1 : -1]:
        summary = json.loads(output.storage.read(name) or b"{}")
        if summary.get("tokens_per_second") and summary["tokens"] >= _LEAST_TOKENS:
            break
    else:
        return None
    began = datetime.strptime(summary["run"][:16], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC).timestamp()
    ledger = read_ledger(output.storage, ("worker", "encode_started"))
    workers = len(pc.unique(ledger["worker"].filter(pc.greater_equal(ledger["encode_started"], began))))
    origin = f"the rate of run {summary['run']} with {count(workers, 'worker')}"
    return Rate(summary["tokens_per_second"] / workers, origin) if workers else None


def rate_here(model: ModelSpec, tokens: TokenizedTexts, batch_tokens: int, device: str, threads: int | None) -> Rate:
    """The pace of this machine, from about two seconds of encoding the sample."""
    embedder = Embedder(model, device=device, threads=threads, folder=model_folder(model))
    pieces = list(_pieces(tokens, 2 * batch_tokens))
    embedder.embed(pieces[0], batch_tokens)  # the first batch pays for what all need
    turns, done, began = cycle(pieces), 0, time.perf_counter()
    in_hand: deque[Callable[[], EmbeddedTexts]] = deque()
    while time.perf_counter() < began + _ENCODE_SECONDS:
        piece = next(turns)
        in_hand.append(embedder.submit(piece, batch_tokens))
        done += len(piece.ids)
        if len(in_hand) > 1:  # as in a worker, where the device goes from one unit to the next
            in_hand.popleft()()
    for finish in in_hand:
        finish()
    seconds = time.perf_counter() - began
    return Rate(done / seconds, f"measured on this machine by encoding the sample for {seconds:.0f} s")


def _pieces(tokens: TokenizedTexts, size: int) -> Iterator[TokenizedTexts]:
    """Rows in turn, of about `size` tokens at a time."""
    cuts = np.flatnonzero(np.diff(tokens.offsets[1:] // size, prepend=-1))
    for start, end in pairwise([*cuts.tolist(), len(tokens.lengths)]):
        yield tokens.take(np.arange(start, end))
