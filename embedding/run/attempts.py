"""How often each unit was tried, and why it failed, over all processes of a run, those that died included. Knows no Ray."""

from __future__ import annotations

from collections import Counter
from typing import Protocol


class Attempts(Protocol):
    """What readers and workers report and ask; `key` names a unit and the step that is tried."""

    def begun(self, key: str) -> int:
        """Tries so far."""

    def begin(self, key: str) -> int:
        """Count a try: 1 for the first."""

    def fail(self, key: str, reason: str) -> None:
        """A try failed for this reason; a try whose process died is never reported."""

    def reason(self, key: str) -> str:
        """Why the last reported try failed, empty where none was reported."""

    def settle(self, key: str) -> None:
        """Forget the key: its try came to an end."""


class AttemptCounter:
    """Attempts of the process that it lives in."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._reasons: dict[str, str] = {}

    def begun(self, key: str) -> int:
        """As in `Attempts`."""
        return self._counts[key]

    def begin(self, key: str) -> int:
        """As in `Attempts`."""
        self._counts[key] += 1
        return self._counts[key]

    def fail(self, key: str, reason: str) -> None:
        """As in `Attempts`."""
        self._reasons[key] = reason

    def reason(self, key: str) -> str:
        """As in `Attempts`."""
        return self._reasons.get(key, "")

    def settle(self, key: str) -> None:
        """As in `Attempts`."""
        self._counts.pop(key, None)
        self._reasons.pop(key, None)

    def unsettled(self) -> int:
        """Units that are being read or worked on."""
        return len({key.removeprefix("read ") for key in self._counts})
