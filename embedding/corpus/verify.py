"""What an output claims as a whole, against its checked units: shards, manifest, ledger, lists of rejected rows, `_SUCCESS`."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from embedding.corpus.findings import CheckedUnit, Finding, Kind
from embedding.corpus.ledger import RECORDS, CommitRecord, read_ledger, records_from_table, records_to_table
from embedding.corpus.output import DATA, MANIFEST, MANIFEST_SCHEMA, REJECTED, SUCCESS, Output, manifest, rejected_name
from embedding.corpus.plan import Unit, stem_of
from embedding.corpus.shards.form import Published
from embedding.errors import count

NOT_OURS_TO_MEND = frozenset({Kind.SOURCE_CHANGED, Kind.UNREADABLE_SOURCE, Kind.NOT_COMPLETE, Kind.FOREIGN_FILE})
"""What the next run does anyway, or what only its owner can judge."""
_BAD_CONTROL = frozenset({Kind.WRONG_MANIFEST, Kind.WRONG_LEDGER})
_TRUE_OF_SHARD = ("shard", "source", "first_row", "rows", "rejected", "tokens", "truncated", "chunks")
_NOT_THERE = frozenset({Kind.MISSING_SHARD})


@dataclass(frozen=True)
class Claims:
    """What stands in an output at one moment."""

    complete: bool
    """Whether `_SUCCESS` says that all of it is true."""
    shards: Mapping[str, int]
    """Names and sizes of the files in data/ that are named as shards."""
    foreign: Sequence[str]
    """Other files in data/."""
    rejected: Sequence[str]
    manifest: list[dict[str, Any]] | None
    """Rows of the manifest, None where there is none that can be read."""

    @classmethod
    def of(cls, output: Output) -> Claims:
        """List the output. `_SUCCESS` is asked for first: what it vouches for must be there afterwards."""
        complete = output.is_complete()
        shards = output.shards()
        foreign = [name for name in output.storage.list(DATA) if name not in shards]
        return cls(complete, shards, foreign, list(output.storage.list(REJECTED)), _read_manifest(output))


def _read_manifest(output: Output) -> list[dict[str, Any]] | None:
    data = output.storage.read(MANIFEST)
    if data is None:
        return None
    try:
        table = pq.read_table(pa.BufferReader(data), use_threads=False)
        return list(table.to_pylist()) if table.schema.equals(MANIFEST_SCHEMA) else None
    except (pa.ArrowException, OSError, ValueError):
        return None


def missing_shards(claims: Claims, units: Iterable[Unit], unknown: Collection[str] = ()) -> Iterator[Finding]:
    """What is planned but not there, and what is there but not planned; `unknown` are stems of shards that could not be planned."""
    listed = {row["shard"]: row["source"] for row in claims.manifest or ()}
    absent = [unit for unit in units if unit.shard not in claims.shards]
    planned = {unit.shard for unit in units}
    unplanned = [name for name in claims.shards if name not in planned and stem_of(name) not in unknown]
    for name in claims.foreign:
        what = "no run wrote it, but readers that open every file in data/ will read it; move it elsewhere"
        yield Finding(Kind.FOREIGN_FILE, name, what)
    if not claims.complete:
        stale = f" and {count(len(unplanned), 'shard')} without a unit" if unplanned else ""
        unfinished = f"{count(len(absent), 'unit')} without a shard{stale}"
        what = f"a run is still at work or did not finish, leaving {unfinished}; run the job to complete the output"
        yield Finding(Kind.NOT_COMPLETE, SUCCESS, what)
        return
    for unit in absent:
        if unit.shard in listed or not listed:
            yield Finding(Kind.MISSING_SHARD, unit.shard, "its unit was committed, but the shard is gone")
    for name in unplanned:
        if listed and name not in listed:
            yield Finding(Kind.UNCLAIMED_SHARD, name, "no source row belongs to it, and the manifest does not list it")
    changed = {unit.source.uri for unit in absent if listed and unit.shard not in listed}
    for source in sorted(changed | {listed[name] for name in unplanned if name in listed}):
        what = "it was added, replaced or removed after the output was completed; run the job to embed what is there now"
        yield Finding(Kind.SOURCE_CHANGED, source, what)


def false_claims(claims: Claims, units: Sequence[Unit], checked: Mapping[str, CheckedUnit], output: Output) -> Iterator[Finding]:
    """What manifest, ledger and lists of rejected rows say that the checked shards do not.

    Units with a finding of their own are left out: what is said of them will be said anew.
    """
    proved = {unit.id: unit for unit in units if unit.id in checked and checked[unit.id].finding is None}
    if claims.complete:
        yield from _false_manifest(claims, units, list(proved.values()), checked)
        lists = {rejected_name(unit.id) for unit in units if unit.id not in proved or checked[unit.id].rejected}
        for name in claims.rejected:
            if name not in lists:
                yield Finding(Kind.UNCLAIMED_REJECTED_ROWS, name, "no unit of the corpus has rejected rows that it could list")
        if fault := _false_version(output.form.published(output.storage), claims, units, proved.values(), checked):
            yield fault
    ledger = {record.unit: record for record in records_from_table(read_ledger(output.storage))}
    for unit_id, unit in proved.items():
        record, truth = ledger.get(unit_id), CommitRecord.of(unit, **_facts(checked[unit_id]))
        if record is None or record.error or record.bytes != truth.bytes:
            continue  # of a try that failed or of an earlier shard: footers stand in for it
        if any(getattr(record, key) != getattr(truth, key) for key in _TRUE_OF_SHARD):
            yield Finding(
                Kind.WRONG_LEDGER, RECORDS, f"the record of {unit.shard} has other counts of rows or tokens than the shard itself"
            )


def _false_manifest(claims: Claims, units: Sequence[Unit], proved: Sequence[Unit], checked: Mapping[str, CheckedUnit]) -> Iterator[Finding]:
    if claims.manifest is None:
        yield Finding(Kind.WRONG_MANIFEST, MANIFEST, "it is missing or damaged")
        return
    records = records_to_table(CommitRecord.of(unit, **_facts(checked[unit.id])) for unit in proved)
    truth = {row["shard"]: row for row in manifest(proved, claims.shards, records).to_pylist()}
    listed = [row["shard"] for row in claims.manifest]
    if listed != sorted(set(listed)):
        yield Finding(Kind.WRONG_MANIFEST, MANIFEST, "it does not list the shards in the order of the corpus, each exactly once")
    for row in claims.manifest:
        right = truth.pop(row["shard"], row)
        if differing := [f"{key} {row[key]} instead of {right[key]}" for key in row if row[key] != right[key]]:
            yield Finding(Kind.WRONG_MANIFEST, MANIFEST, f"for {row['shard']} it says {', '.join(differing)}")
    for name in truth:
        yield Finding(Kind.WRONG_MANIFEST, MANIFEST, f"it does not list {name}")
    known = claims.shards.keys() | {unit.shard for unit in units}
    for name in listed:
        if name not in known:
            yield Finding(Kind.WRONG_MANIFEST, MANIFEST, f"it lists {name}, which neither exists nor belongs to the corpus")


def _false_version(
    published: Published | None, claims: Claims, units: Sequence[Unit], proved: Iterable[Unit], checked: Mapping[str, CheckedUnit]
) -> Finding | None:
    """What readers are told that is not so, if they are told anything."""
    if published is None:
        return None
    if (told := published.shards) is None:
        return Finding(Kind.WRONG_VERSION, published.name, "it is missing, damaged, or was changed by another program")
    truth = {unit.shard: (checked[unit.id].chunks or checked[unit.id].rows, checked[unit.id].bytes) for unit in proved}
    known = claims.shards.keys() | {unit.shard for unit in units}
    wrong = [name for name, facts in truth.items() if told.get(name, (0, facts[1])) != facts]
    wrong += [name for name in told if name not in known]
    what = f"it is wrong about {count(len(wrong), 'shard')}, the first being {min(wrong, default='')}"
    return Finding(Kind.WRONG_VERSION, published.name, what) if wrong else None


def _facts(truth: CheckedUnit) -> dict[str, int]:
    return {key: getattr(truth, key) for key in ("rejected", "tokens", "truncated", "chunks", "bytes")}


def repair(output: Output, findings: Iterable[Finding]) -> list[str]:
    """Delete what is proved bad, `_SUCCESS` first; the names of what went. The next run makes just that anew.

    Only for the run that holds the lease.
    """
    bad = [finding for finding in findings if finding.kind not in NOT_OURS_TO_MEND]
    if not bad:
        return []
    output.mark_incomplete()
    kinds = {finding.kind for finding in bad}
    names = {finding.name for finding in bad if finding.kind not in _NOT_THERE | _BAD_CONTROL}
    if kinds & _BAD_CONTROL:  # a manifest is made from the ledger; without it, from what the shards say themselves
        names |= {MANIFEST, *output.storage.list(RECORDS)}
    output.storage.delete(sorted(names))
    return [SUCCESS, *sorted(names)]
