"""Waiting for a condition, never for an amount of time."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from tenacity import RetryError, Retrying, retry_if_result, stop_after_delay, wait_fixed

T = TypeVar("T")

POLL_SECONDS = 0.02


def wait_until(condition: Callable[[], T], *, seconds: float = 60, what: str) -> T:
    """The first truthy answer of `condition`, which is asked again every 20 ms.

    Raises:
        TimeoutError: it gave none within `seconds`; `what` says what was waited for.
    """
    attempts = Retrying(stop=stop_after_delay(seconds), wait=wait_fixed(POLL_SECONDS), retry=retry_if_result(lambda answer: not answer))
    try:
        return attempts(condition)
    except RetryError:
        raise TimeoutError(f"waited {seconds:g} s for {what}") from None
