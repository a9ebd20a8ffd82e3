"""Times side by side: every round runs all contestants, so that a busy moment of the machine meets all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import TypeAlias

import torch

Contestant: TypeAlias = Callable[[], object]
Times: TypeAlias = dict[str, list[float]]
"""Seconds of each round by contestant."""


def seconds(run: Contestant) -> float:
    """Wall time of one call, the GPU's work included."""
    _synchronize()
    started = time.perf_counter()
    run()
    _synchronize()
    return time.perf_counter() - started


def interleave(contestants: Mapping[str, Contestant], rounds: int, *, warm: bool = True) -> Times:
    """Each contestant once a round; who begins changes from round to round. Before the first, all run once unmeasured."""
    names = list(contestants)
    if warm:
        for run in contestants.values():
            run()
    times: Times = {name: [] for name in names}
    for number in range(rounds):
        for position in range(len(names)):
            name = names[(position + number) % len(names)]
            times[name].append(seconds(contestants[name]))
    return times


def rate(amount: float, times: list[float]) -> float:
    """Amount per second of the median round."""
    return amount / median(times)


def ratio(times: list[float], others: list[float]) -> float:
    """How many times faster `times` are than `others`: the median over the rounds of the quotient within a round."""
    return median(other / own for own, other in zip(times, others, strict=True))


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
