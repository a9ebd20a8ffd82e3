"""The output folder: its layout, the settings it was started with, what is committed, and how it is completed.

The presence of a shard is its commit; everything under `_control/` can be lost without losing a vector, except `job.json`,
which says what the vectors are.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embedding.corpus.lease import LEASE
from embedding.corpus.ledger import RECORD_SCHEMA, CommitRecord, parquet_bytes, read_ledger, records_to_table
from embedding.corpus.plan import Unit
from embedding.corpus.requests import explained, is_of_store
from embedding.corpus.shards.dataset import TRANSACTIONS, VERSIONS
from embedding.corpus.shards.form import ShardForm
from embedding.corpus.shards.parquet import PARQUET
from embedding.corpus.storage import DELETIONS, TEMPORARY, open_storage
from embedding.corpus.vectors import Calibration, digest
from embedding.errors import ConfigError, SettingsChangedError, StorageError, count

log = logging.getLogger(__name__)

SUCCESS = "_SUCCESS"
DATA = "data"
MANIFEST = "_control/manifest.parquet"
_JOB = "_control/job.json"
REJECTED = "_control/rejected"
_SHARD_NAME = re.compile(r"-\d{10,}-([0-9a-f]{16})\.(parquet|lance)$")
_FOOTER_THREADS = 32
_MANIFEST_FACTS = ("rows", "rejected", "tokens", "truncated", "chunks")
MANIFEST_SCHEMA = pa.schema(
    [
        pa.field(name, kind, nullable=False)
        for name, kind in (
            ("shard", pa.string()),
            ("unit", pa.string()),
            ("source", pa.string()),
            ("source_version", pa.string()),
            ("first_row", pa.int64()),
            ("source_rows", pa.int64()),
            ("rows", pa.int64()),
            ("rejected", pa.int64()),
            ("tokens", pa.int64()),
            ("truncated", pa.int64()),
            ("bytes", pa.int64()),
        )
    ]
)


@dataclass(frozen=True)
class JobSettings:
    """What an output was begun with."""

    vectors: dict[str, Any]
    """Every setting that changes a vector or a shard's columns; hashed into the fingerprint."""
    kept: dict[str, int]
    """First choices that shape units and batches (unit_rows, batch_tokens): later runs keep them."""
    input: tuple[str, ...]
    versions: dict[str, str] = field(default_factory=dict)
    asked: dict[str, Any] = field(default_factory=dict)
    """What the last run was asked beyond the fingerprint: where the model is, how many rows to embed. A proof needs it."""
    measured: dict[str, Any] = field(default_factory=dict)
    """What the first run measured before it chose what is kept; empty where it measured nothing."""
    calibration: Calibration = field(default_factory=dict)
    """The ranges of int8, settled when the output is begun; `vectors` has their digest."""

    @property
    def fingerprint(self) -> str:
        """Hash of `vectors`."""
        return hashlib.sha256(json.dumps(self.vectors, sort_keys=True).encode()).hexdigest()[:16]

    def encode(self) -> bytes:
        """The JSON of job.json."""
        return json.dumps({"fingerprint": self.fingerprint, **asdict(self)}, indent=1).encode()

    def require_same_vectors(self, now: JobSettings, url: str) -> None:
        """Check that `now` makes the same vectors.

        Raises:
            SettingsChangedError: it does not; the sentence names each differing key, old and new.
        """
        old, new = self.vectors, now.vectors
        differing = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
        if differing:
            changes = "; ".join(f"{key}: {_show(old.get(key))} -> {_show(new.get(key))}" for key in differing)
            raise SettingsChangedError(
                f"{url} was started with other settings ({changes}); use those, choose another --output, or start over with --restart"
            )


def _show(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


class Output:
    """One output folder, local or on an object store."""

    def __init__(self, url: str, form: ShardForm = PARQUET) -> None:
        self.storage = open_storage(url, temporary_folder=TEMPORARY)
        self.form = form
        """Of its shards."""

    @property
    def url(self) -> str:
        """The folder's URL."""
        return self.storage.url

    def begin(self, settings: JobSettings) -> JobSettings:
        """The settings this output works with: those given for a new one, else its own, checked against those given.

        Raises:
            SettingsChangedError: the output was begun with settings that make other vectors.
        """
        if self.storage.put_if_absent(_JOB, settings.encode()):
            return settings
        existing = self.settings()
        if existing is None:
            raise ConfigError(f"{self.url}/{_JOB} vanished while it was being read; check whether another run is deleting this output")
        existing.require_same_vectors(settings, self.url)
        return existing

    def remember(self, settings: JobSettings, inputs: tuple[str, ...], asked: Mapping[str, Any]) -> None:
        """Record what the corpus consists of from now on, and what this run was asked; only for the run that holds the lease."""
        now = replace(settings, input=inputs, asked=dict(asked))
        if now != settings:
            self.storage.put(_JOB, now.encode())

    def settings(self) -> JobSettings | None:
        """The settings the output was begun with, None for a new one.

        Raises:
            ConfigError: the folder holds a job.json that is not ours.
        """
        data = self.storage.read(_JOB)
        if data is None:
            return None
        try:
            return _settings_of(json.loads(data))
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{self.url}/{_JOB} is damaged ({error!r}); start over with --restart") from error

    def shards(self) -> dict[str, int]:
        """Committed shards: name and size in bytes. Other files that somebody put beside them are left alone."""
        return {name: size for name, size in self.storage.list(DATA).items() if _SHARD_NAME.search(name)}

    def is_complete(self) -> bool:
        """Whether the last run completed and nothing was begun since."""
        return self.storage.read(SUCCESS) is not None

    def mark_incomplete(self) -> None:
        """Withdraw `_SUCCESS` before anything changes, for those who wait for it."""
        self.storage.delete([SUCCESS])

    def complete(self, units: Sequence[Unit], committed: Mapping[str, int], still_ours: Callable[[], None]) -> None:
        """Publish what is committed, remove what no unit claims, write the manifest, and put `_SUCCESS` last of all.

        `still_ours` is called right before each change and raises where another run took the output over: a run that slept
        stops there. What it removes was listed before that, so it is nothing that the other run has made.

        Raises:
            StorageError: a unit's shard is not there, or is not what was put there.
        """
        missing = [unit.shard for unit in units if unit.shard not in committed]
        if missing:
            raise StorageError(
                f"{self.url} lost {count(len(missing), 'shard')}, first {missing[0]}; run the same command again to write them again"
            )
        records = self.records(units, committed, _MANIFEST_FACTS)
        listed = manifest(units, committed, records)
        self.form.publish(self.storage, listed, still_ours)
        self._delete(self._unclaimed(units, committed, records), still_ours)
        for name, data in ((MANIFEST, parquet_bytes(listed)), (SUCCESS, b"")):
            still_ours()
            self.storage.put(name, data)

    def _unclaimed(self, units: Sequence[Unit], committed: Iterable[str], records: pa.Table) -> list[str]:
        """Shards of sources that changed or disappeared, lists of rows that are not rejected (any more), and unfinished files."""
        claimed = {unit.shard for unit in units}
        stale = [name for name in committed if name not in claimed]
        if stale:
            log.info("removing %s whose source rows have changed or are gone", count(len(stale), "shard"))
        listed = {rejected_name(units[place].id) for place in pc.indices_nonzero(records["rejected"]).to_pylist()}
        unlisted = [name for name in self.storage.list(REJECTED) if name not in listed]
        return [*stale, *unlisted, *self.storage.list(TEMPORARY)]

    def records(self, units: Sequence[Unit], committed: Mapping[str, int], columns: Sequence[str] = RECORD_SCHEMA.names) -> pa.Table:
        """These columns of the records of committed units, in the order of `units`.

        One that a dead driver never appended is read from the shard's footer, and so is one of an earlier, other shard.
        """
        ledger = read_ledger(self.storage, (*columns, "bytes"))
        places = pc.index_in(pa.array([unit.id for unit in units], pa.string()), value_set=ledger["unit"])
        sizes = ledger["bytes"].take(places)
        is_lost = pc.fill_null(pc.not_equal(sizes, pa.array([committed[unit.shard] for unit in units], pa.int64())), fill_value=True)
        lost = pc.indices_nonzero(is_lost)
        with ThreadPoolExecutor(_FOOTER_THREADS) as pool:
            found = records_to_table(pool.map(lambda place: self._record_from_footer(units[place]), lost.to_pylist()))
        here = pc.replace_with_mask(places.cast(pa.int64()), is_lost.combine_chunks(), pa.array(np.arange(len(lost)) + len(ledger)))
        return pa.concat_tables([ledger, found.select(ledger.column_names)]).take(here).select(list(columns))

    def committed_record(self, unit: Unit) -> CommitRecord | None:
        """The record of the unit if its shard is in place."""
        return self._record_from_footer(unit) if self.storage.exists(unit.shard) else None

    def _record_from_footer(self, unit: Unit) -> CommitRecord:
        with explained(f"reading {self.url}/{unit.shard}"):
            try:
                return CommitRecord.of(unit, **self.form.facts(self.storage.open(unit.shard))["record"])
            except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
                if is_of_store(error):
                    raise
                raise StorageError(f"{self.url}/{unit.shard} is not a complete shard; delete it and run the same command again") from error

    def clear(self, still_ours: Callable[[], None]) -> None:
        """Delete everything of the job: a dataset's versions before what they point at, and the settings last, so that an interrupted
        clearing cannot be resumed by mistake. `still_ours` is as in `complete`.
        """
        versions = [*self.storage.list(VERSIONS), *self.storage.list(TRANSACTIONS)]
        names = [*self.shards(), *self.storage.list("_control")]
        for some in ([SUCCESS], versions, [name for name in names if name not in (_JOB, LEASE)], [_JOB]):
            self._delete(some, still_ours)

    def _delete(self, names: Sequence[str], still_ours: Callable[[], None]) -> None:
        for start in range(0, len(names), DELETIONS):
            still_ours()
            self.storage.delete(names[start : start + DELETIONS])


def _settings_of(document: Mapping[str, Any]) -> JobSettings:
    own = (document["vectors"], document["kept"], tuple(document["input"]), document["versions"])
    settings = JobSettings(*own, document.get("asked", {}), document.get("measured", {}), document.get("calibration", {}))
    if "calibration" in settings.vectors and settings.vectors["calibration"] != digest(settings.calibration):
        raise ValueError("its calibration is not the one that it was started with")
    return settings


def manifest(units: Sequence[Unit], committed: Mapping[str, int], records: pa.Table) -> pa.Table:
    """One row a shard, in input order, with its number of rows: of chunks, where it has those; `records` are those of the units."""
    columns = {
        "shard": [unit.shard for unit in units],
        "unit": [unit.id for unit in units],
        "source": [unit.source.uri for unit in units],
        "source_version": [unit.source.version for unit in units],
        "first_row": [unit.first_row for unit in units],
        "source_rows": [unit.num_rows for unit in units],
        "rows": pc.if_else(pc.greater(records["chunks"], 0), records["chunks"], pc.subtract(records["rows"], records["rejected"])),
        **{name: records[name] for name in ("rejected", "tokens", "truncated")},
        "bytes": [committed[unit.shard] for unit in units],
    }
    return pa.table(columns, schema=MANIFEST_SCHEMA)


def rejected_name(unit_id: str) -> str:
    """Where a unit's rejected rows are listed."""
    return f"{REJECTED}/{unit_id}.parquet"
