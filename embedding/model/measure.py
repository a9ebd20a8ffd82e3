"""The pace of a device, measured: the smallest batch that is as fast as any, and how many rows a second it gives. No torch."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from embedding.model.batching import batch_end, longest_first

if TYPE_CHECKING:
    from embedding.model.embedder import Embedder
    from embedding.model.memory import DeviceMemory
    from embedding.model.tokenizer import TokenizedTexts

_GAIN = 0.03
"""A larger batch must be faster by that much: below it, rounds differ by more, and a small batch leaves memory."""
_NEAR = 0.1
"""Budgets so near to the fastest are timed again before one is chosen."""
_ROUNDS = 2
_LEAST_TOKENS = 256
_TOKENIZE_SECONDS = 2.0
_PLACES = (0.25, 0.75)
"""Where in the sample, sorted by length, batches are timed: at a quarter and at three quarters of its tokens."""
_PLACE_SECONDS = 0.05
"""A device that is done sooner gets several batches at each place, so that what it does between them counts as it does in a unit."""
_PLACE_BATCHES = 16
_SECONDS = 12.0
"""A bound for slow models; where batches take a tenth of a second, it is over in some."""


@dataclass(frozen=True, slots=True)
class Trial:
    """What one budget gave."""

    batch_tokens: int
    tokens_per_second: float
    fits: bool
    """Memory did not run out, and enough was left."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What a device does with a sample of texts."""

    batch_tokens: int
    tokens_per_second: float
    """Encoded, in batches of that size."""
    rows_per_second: float
    """Of a worker: tokenizing or encoding, whichever takes longer, as each hides behind the other."""
    trials: tuple[Trial, ...]
    """By rising budget."""
    in_time: bool
    """False: larger batches were not tried for want of time, though they might be faster."""


def measure(embedder: Embedder, memory: DeviceMemory, texts: Sequence[str], budgets: Iterable[int]) -> Measured:
    """Encode parts of `texts` in batches of ever more tokens, for some seconds, until that gains nothing or does not fit.

    Args:
        embedder: as a worker has it.
        memory: of its device.
        texts: so many that they fill the batches; one at least has a token.
        budgets: tokens of a batch, rising; the first is tried in any case.

    Raises:
        ModelError: a single row does not fit the memory.
        ValueError: the texts have no tokens.
    """
    deadline = time.monotonic() + _SECONDS
    tokenize_seconds, tokens = _tokenized(embedder, texts)
    if tokenize_seconds < _TOKENIZE_SECONDS:  # the first time, nanotoken was compared with tokenizers
        tokenize_seconds = min(tokenize_seconds, _tokenized(embedder, texts)[0])
    once = tokens.once
    if not len(once.ids):
        raise ValueError("the sample has no tokens")
    trials, in_time = _climb(_Course(embedder, memory, once), budgets, deadline)
    best = choose(trials)
    encode_seconds = len(once.ids) / best.tokens_per_second
    rows_per_second = len(texts) / max(tokenize_seconds, encode_seconds)
    return Measured(best.batch_tokens, best.tokens_per_second, rows_per_second, tuple(trials), in_time)


def budgets_from(max_tokens: int) -> Iterator[int]:
    """Powers of two that hold one text of `max_tokens`, without end."""
    budget = 1 << (max(max_tokens, _LEAST_TOKENS) - 1).bit_length()
    while True:
        yield budget
        budget *= 2


def choose(trials: Sequence[Trial]) -> Trial:
    """The smallest budget that is as fast as any that fits; the smallest of all where none does."""
    fitting = [trial for trial in trials if trial.fits] or trials[:1]
    return next(trial for trial in fitting if not gains(fitting, trial))


def gains(trials: Iterable[Trial], over: Trial) -> bool:
    """Whether one of the trials is faster than `over` by more than chance."""
    return any(trial.tokens_per_second > (1 + _GAIN) * over.tokens_per_second for trial in trials)


def _tokenized(embedder: Embedder, texts: Sequence[str]) -> tuple[float, TokenizedTexts]:
    started = time.perf_counter()
    tokens = embedder.tokenize(texts)
    return time.perf_counter() - started, tokens


def _climb(course: _Course, budgets: Iterable[int], deadline: float) -> tuple[list[Trial], bool]:
    """Try the budgets until they gain nothing any more, even when they are timed again in turns, or one does not fit.

    Answers with the trials, and whether there was time for it.
    """
    runners: list[_Runner] = []
    in_time = True
    for budget in budgets:
        best = max((runner.trial.tokens_per_second for runner in runners), default=0.0)
        if runners and budget > course.tokens:
            break
        if runners and time.monotonic() + course.seconds(budget, best) > deadline:
            in_time = False
            break
        runners.append(course.enter(budget, best))
        if not runners[-1].fits:
            break
        if len(runners) > 2 and _is_spent(runners):
            _run_again(runners, deadline)
            if _is_spent(runners):
                break
    return [runner.trial for runner in runners], in_time


def _is_spent(runners: Sequence[_Runner]) -> bool:
    """Whether the last two budgets gain nothing over one before them: a single one may have met a busy moment."""
    *before, one, two = (runner.trial for runner in runners)
    return any(not gains([one, two], other) for other in before)


def _run_again(runners: Sequence[_Runner], deadline: float) -> None:
    """Those near the fastest, in turns, so that a busy moment of the machine meets all of them; once also the last two."""
    for number in range(_ROUNDS):
        best = max(runner.trial.tokens_per_second for runner in runners)
        for runner in runners:
            is_near = runner.trial.tokens_per_second * (1 + _NEAR) >= best
            if is_near or (number == 0 and runner in runners[-2:]):
                if time.monotonic() + runner.seconds > deadline:
                    return
                runner.run()


class _Runner:
    """One budget: its batches, and the quickest time of those at each place."""

    def __init__(self, embedder: Embedder, batch_tokens: int, places: Sequence[TokenizedTexts], *, fits: bool) -> None:
        self.fits = fits
        self._embedder = embedder
        self._batch_tokens = batch_tokens
        self._places = places
        self._seconds = [math.inf] * len(places)

    @property
    def seconds(self) -> float:
        """What a round takes."""
        return sum(self._seconds)

    @property
    def trial(self) -> Trial:
        """What is known so far; every place counts the same."""
        each = [seconds / len(tokens.ids) for seconds, tokens in zip(self._seconds, self._places, strict=True)]
        return Trial(self._batch_tokens, len(each) / sum(each), self.fits)

    def run(self) -> None:
        """One round. The clock is right on a GPU too: `embed` returns when the vectors are on the host."""
        for number, tokens in enumerate(self._places):
            started = time.perf_counter()
            self._embedder.embed(tokens, self._batch_tokens)
            self._seconds[number] = min(self._seconds[number], time.perf_counter() - started)


class _Course:
    """The sample, sorted by length as a unit would be, from which each budget takes its batches."""

    def __init__(self, embedder: Embedder, memory: DeviceMemory, once: TokenizedTexts) -> None:
        self._embedder = embedder
        self._memory = memory
        order = longest_first(once.lengths)
        self._sorted = once.take(order[once.lengths[order] > 0])

    @property
    def tokens(self) -> int:
        """Of the sample: it fills no larger batch."""
        return len(self._sorted.ids)

    def seconds(self, budget: int, tokens_per_second: float) -> float:
        """What it takes to enter a budget, at the pace so far."""
        return (1 + len(_PLACES)) * self._embedder.lanes * budget / tokens_per_second

    def enter(self, budget: int, tokens_per_second: float) -> _Runner:
        """The budget, after its first round. Before that come the longest rows, unmeasured: of all batches they need most memory."""
        longest = self._rows_from(0, budget, self._embedder.lanes)
        self._memory.watch()
        in_use = self._embedder.embed(longest, budget).batch_tokens
        if in_use < budget:
            self._memory.release()
        batches = max(1, min(_PLACE_BATCHES, int(_PLACE_SECONDS * tokens_per_second / budget)))
        batches = -(-batches // self._embedder.lanes) * self._embedder.lanes  # so that none of them idles
        places = [self._around(place, budget, batches) for place in _PLACES]
        runner = _Runner(self._embedder, budget, places, fits=in_use == budget and self._memory.has_room())
        runner.run()
        return runner

    def _around(self, place: float, budget: int, batches: int) -> TokenizedTexts:
        """The rows of so many batches round that place of the sample, 0 to 1."""
        offsets = self._sorted.offsets
        first_token = min(max(0.0, place * offsets[-1] - batches * budget / 2), max(0, offsets[-1] - batches * budget))
        return self._rows_from(min(int(np.searchsorted(offsets, first_token)), len(offsets) - 2), budget, batches)

    def _rows_from(self, start: int, budget: int, batches: int = 1) -> TokenizedTexts:
        lengths, stop = self._sorted.lengths, start
        for _ in range(batches):
            if stop < len(lengths):
                stop = batch_end(lengths, stop, budget, padded=not self._embedder.packed)
        rows = self._sorted.take(np.arange(start, stop))
        rows.prepare()  # as a worker does it
        return rows
