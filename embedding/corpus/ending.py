"""Whether this process was asked to end, and how long it may still talk to stores."""

from __future__ import annotations

import threading
import time

asked = threading.Event()
"""Set once the process was asked to end."""
_deadline = 0.0


def end_within(seconds: float) -> None:
    """Tell that this process has to end: from now on no request is tried again, and no answer later than that is waited for."""
    global _deadline
    _deadline = time.monotonic() + seconds
    asked.set()


def seconds_left() -> float | None:
    """How long this process may still wait for something; None where it was not asked to end."""
    return max(0.0, _deadline - time.monotonic()) if asked.is_set() else None
