"""What one process does to check one unit: read its source, read its shard, compare. Knows no Ray."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import pyarrow as pa

from embedding.corpus.check import check_unit
from embedding.corpus.findings import CheckedUnit, Finding, Kind, Rules
from embedding.corpus.storage import open_storage
from embedding.run.attempts import Attempts
from embedding.run.exchange import decode_unit, encode_checked

_MAX_ATTEMPTS = 3


@dataclass(frozen=True)
class CheckJob:
    """What every process that checks needs to know."""

    output: str
    rules: Rules
    wanted: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Of the units by id, the rows whose text and vector are asked for, counted from the unit's first."""


def check_stage(batch: pa.Table, job: CheckJob, attempts: Attempts) -> pa.Table:
    """One unit in, what was found about it out, as JSON."""
    unit = decode_unit(batch.column("unit")[0].as_py())
    if attempts.begin(f"check {unit.id}") > _MAX_ATTEMPTS:
        what = f"the process that reads it died {_MAX_ATTEMPTS} times; it or {unit.source.uri} is damaged or too large for this machine"
        checked = CheckedUnit(unit.id, Finding(Kind.UNREADABLE_SHARD, unit.shard, what))
    else:
        checked = check_unit(unit, job.rules, open_storage(job.output), job.wanted.get(unit.id, ()))
    return pa.table({"checked": [encode_checked(checked)]})
