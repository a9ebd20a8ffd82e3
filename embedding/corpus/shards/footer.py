"""What a shard's file says of itself beside its rows, and how damage to that shows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping


def seal(facts: Mapping[str, object]) -> str:
    """Digest of the facts in a footer, which have no checksum of their format's own."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def require_seal(facts: Mapping[str, object], found: object) -> None:
    """Check the facts against their seal.

    Raises:
        ValueError: they are not what was written.
    """
    if found != seal(facts):
        raise ValueError("the facts in the footer are damaged")
