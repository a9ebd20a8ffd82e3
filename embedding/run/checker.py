"""What one process does to check a parcel of units: of each, read its source, read its shard, compare. Knows no Ray."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import pyarrow as pa

from embedding.corpus.check import check_unit
from embedding.corpus.findings import CheckedUnit, Finding, Kind, Rules
from embedding.corpus.plan import Unit
from embedding.corpus.storage import open_storage
from embedding.run.attempts import Attempts
from embedding.run.exchange import decode_units, encode_checked, one_row

_MAX_ATTEMPTS = 3


@dataclass(frozen=True)
class CheckJob:
    """What every process that checks needs to know."""

    output: str
    rules: Rules
    wanted: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Of the units by id, the rows whose text and vector are asked for, counted from the unit's first."""


def check_stage(batch: pa.Table, job: CheckJob, attempts: Attempts) -> pa.Table:
    """A parcel of units in, what was found about each of them out, as JSON."""
    return one_row(pa.table({"checked": [encode_checked(_checked(unit, job, attempts)) for unit in decode_units(batch)]}))


def _checked(unit: Unit, job: CheckJob, attempts: Attempts) -> CheckedUnit:
    if attempts.begin(key := f"check {unit.id}") > _MAX_ATTEMPTS:
        what = f"the process that reads it died {_MAX_ATTEMPTS} times; it or {unit.source.uri} is damaged or too large for this machine"
        return CheckedUnit(unit.id, Finding(Kind.UNREADABLE_SHARD, unit.shard, what))
    checked = check_unit(unit, job.rules, open_storage(job.output), job.wanted.get(unit.id, ()))
    attempts.settle(key)  # here: another unit of the parcel may end this process yet
    return checked
