"""Lanes: batches of several callers, in order and without gaps."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch

from embedding.model.lanes import Lanes

CPU = torch.device("cpu")
SECONDS = 30
"""Until a test gives up on a thread that should have come."""


def counted(order: list[int], number: int) -> Callable[[], int]:
    def batch() -> int:
        order.append(number)
        return number

    return batch


def test_later_batches_follow_earlier_ones() -> None:
    lanes, order = Lanes(CPU, 1), list[int]()
    finish = [lanes.start(counted(order, number) for number in numbers) for numbers in ([1, 2, 3], [4, 5], [])]
    assert [each() for each in reversed(finish)] == [0, 9, 6]
    assert order == [1, 2, 3, 4, 5]


def test_a_free_lane_goes_on_to_the_next_callers_batches() -> None:
    """The last batch of the first caller ends only when one of the second's has begun."""
    lanes, begun = Lanes(CPU, 2), threading.Event()

    def last() -> int:
        assert begun.wait(SECONDS)
        return 1

    def follows() -> int:
        begun.set()
        return 2

    finish = lanes.start([last]), lanes.start([follows])
    assert [each() for each in finish] == [1, 2]


def test_a_batch_that_fails_takes_those_behind_it_along_but_no_other_callers() -> None:
    lanes, order, queued, given_up = Lanes(CPU, 1), list[int](), threading.Event(), threading.Event()

    def fails() -> int:
        assert queued.wait(SECONDS)
        raise MemoryError("too large")

    def is_computed_meanwhile() -> int:
        assert given_up.wait(SECONDS)
        return 0

    broken = lanes.start([fails, is_computed_meanwhile, *(counted(order, number) for number in (1, 2, 3))])
    whole = lanes.start([counted(order, 4)])
    queued.set()
    with pytest.raises(MemoryError, match="too large"):
        broken()
    given_up.set()
    assert whole() == 4
    assert order == [4]


class Mark:
    """Stands in for a mark in a GPU's queue: whoever waits for it gets there."""

    launched: list[Mark]
    waited: list[Mark]

    def __init__(self, *, blocking: bool) -> None:
        assert blocking  # a thread that spins takes a core from those that tokenize

    def record(self) -> None:
        self.launched.append(self)

    def synchronize(self) -> None:
        self.waited.append(self)


def test_a_gpu_has_batches_waiting_but_never_a_full_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Mark)
    Mark.launched, Mark.waited = [], []
    unfinished: list[int] = []

    def batch() -> int:
        unfinished.append(len(Mark.launched) - len(Mark.waited))
        return 1

    lanes = Lanes(torch.device("cuda"), None)
    assert lanes.count == 1
    first, second = lanes.start([batch] * 5), lanes.start([batch] * 5)
    assert (first(), second()) == (5, 5)
    assert unfinished[:3] == [0, 1, 2]
    assert max(unfinished) == 2
    assert {Mark.launched[4], Mark.launched[9]} <= set(Mark.waited)
