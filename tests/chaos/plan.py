"""Which process dies when: the plan of a storm, the same for the same seed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias
from urllib.parse import urlsplit

from tests.support.faulty_proxy import When

Victim: TypeAlias = Literal["driver", "worker", "reader", "node", "store", "suspended store"]
Moment: TypeAlias = Literal[
    "at random",
    "during a read",
    "before the put",
    "after the put",
    "after the rejected rows",
    "before the ledger append",
    "before the manifest",
    "before _SUCCESS",
    "after _SUCCESS",
]
Blow: TypeAlias = tuple[Victim, Moment]

WHILE_EMBEDDING: dict[Blow, int] = {
    ("worker", "at random"): 2,
    ("worker", "before the put"): 2,
    ("worker", "after the put"): 2,
    ("worker", "after the rejected rows"): 1,
    ("driver", "at random"): 1,
    ("driver", "before the put"): 1,
    ("driver", "after the put"): 1,
    ("node", "at random"): 2,
    ("node", "before the put"): 1,
    ("node", "after the put"): 1,
    ("store", "at random"): 1,
    ("store", "before the put"): 1,
    ("store", "after the put"): 1,
    ("suspended store", "at random"): 1,
    ("suspended store", "before the put"): 1,
}
"""How often at least."""
AT_THE_END: list[Blow] = [
    ("driver", "before the ledger append"),
    ("driver", "before the manifest"),
    ("driver", "before _SUCCESS"),
    ("driver", "after _SUCCESS"),
]
"""In the order in which a run comes to these moments."""
SHORT: list[Blow] = [
    ("reader", "during a read"),
    ("worker", "before the put"),
    ("store", "at random"),
    ("worker", "after the put"),
    ("node", "at random"),
    ("suspended store", "at random"),
]
SHORT_END = AT_THE_END[:3]
"""With these, every kind of victim and every moment of the promise, with as few starts of drivers as that takes."""

STORM_PART = 0.75
"""Part of the units within which the storm rages; the others are left for a run to end with."""
LONGEST_WAIT = 0.6
"""Seconds from the moment a blow may fall to a random one."""
LONGEST_OUTAGE = 4.0
"""Seconds that a store stays dead or suspended."""


@dataclass(frozen=True)
class Strike:
    """One blow, and when it falls: at the first such moment after so many shards are committed."""

    victim: Victim
    moment: Moment
    after_shards: int
    wait: float
    outage: float

    def __str__(self) -> str:
        return f"{self.victim} {self.moment}"


def storm(seed: int, units: int, extra: int = 8) -> list[Strike]:
    """A storm of every blow that there is and `extra` more, in the order of the seed."""
    choose = random.Random(seed)
    blows = [blow for blow, times in WHILE_EMBEDDING.items() for _ in range(times)] + choose.choices(list(WHILE_EMBEDDING), k=extra)
    choose.shuffle(blows)
    drivers = [number for number, (victim, _) in enumerate(blows) if victim == "driver"]
    for number in reversed(drivers[:3]):  # a new driver reads anew; an old one may have read everything
        blows.insert(number + 1, ("reader", "during a read"))
    return timed(blows, AT_THE_END, units, choose)


def short_storm(seed: int, units: int) -> list[Strike]:
    """A storm for continuous integration."""
    choose = random.Random(seed)
    return timed(SHORT, SHORT_END, units, choose)


def timed(blows: Sequence[Blow], ending: Sequence[Blow], units: int, choose: random.Random) -> list[Strike]:
    """The blows over the run: some follow each other at once, and at some the run has come further."""
    last = int(units * STORM_PART)
    after = sorted(choose.randrange(last) for _ in blows)
    for number, (victim, _) in enumerate(blows):
        if victim == "reader":
            after[number] = after[number - 1] if number else 0
    return [
        Strike(victim, moment, shards, choose.uniform(0, LONGEST_WAIT), choose.uniform(0, LONGEST_OUTAGE))
        for (victim, moment), shards in zip([*blows, *ending], [*after, *[last] * len(ending)], strict=True)
    ]


def moment_of(when: When, method: str, url: str, output: str, corpus: str) -> Moment | None:
    """Which moment of a run a request is, by its path below `/<output>/` or `/<corpus>/`; None for one that no plan names."""
    path = urlsplit(url).path.removeprefix("/")
    if method == "GET" and path.startswith(f"{corpus}/"):
        return "during a read" if when == "after" else None
    if method != "PUT" or not path.startswith(f"{output}/"):
        return None
    name = path.removeprefix(f"{output}/")
    folder = name.rpartition("/")[0] if name.startswith("_control/") else name.partition("/")[0]
    moments: dict[tuple[When, str], Moment] = {
        ("before", "data"): "before the put",
        ("after", "data"): "after the put",
        ("after", "_control/rejected"): "after the rejected rows",
        ("before", "_control/records"): "before the ledger append",
        ("before", "_SUCCESS"): "before _SUCCESS",
        ("after", "_SUCCESS"): "after _SUCCESS",
    }
    return "before the manifest" if (when, name) == ("before", "_control/manifest.parquet") else moments.get((when, folder))
