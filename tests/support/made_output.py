"""An output as runs leave it, made without a model: shards, ledger, lists of rejected rows and summary, from vectors at hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from embedding.corpus.ledger import CommitRecord, Ledger, parquet_bytes
from embedding.corpus.lengths import length_counts
from embedding.corpus.output import JobSettings, Output, rejected_name
from embedding.corpus.plan import Unit, make_unit
from embedding.corpus.shard import shard_table
from embedding.corpus.shards.parquet import PARQUET
from embedding.corpus.sources import Source
from embedding.run.summary import Summary
from embedding.run.worker import rejected_table

RUN = "20250102T030405Z-abcdef"
SETTINGS = JobSettings(
    {"id_column": "id", "text_column": "text", "keep_columns": ["topic", "text"], "max_tokens": 64, "dimensions": 16},
    {"unit_rows": 100, "batch_tokens": 512},
    ("/corpus",),
    {"torch": "2.13.0"},
)


@dataclass
class MadeOutput:
    """What the report of a run is made from."""

    output: Output
    summary: Summary
    shards: list[str] = field(default_factory=list)
    records: list[CommitRecord] = field(default_factory=list)

    def add(
        self, vectors_RD: npt.NDArray[np.float32], columns: Mapping[str, Sequence[object]], *, rejected: int = 0, duplicates: int = 0
    ) -> Unit:
        """Commit a unit: its vectors with these columns, and `rejected` further rows."""
        number, rows = len(self.shards), len(vectors_RD)
        unit = make_unit(Source(f"part-{number}.parquet", f"file:///corpus/part-{number}.parquet", 10, "v"), 0, rows + rejected, "f")
        lengths = 3 + np.arange(rows) % 62  # of 62 rows the last is as long as max_tokens allows
        facts = {"rejected": rejected, "tokens": int(lengths.sum()), "truncated": int((lengths == 64).sum()), "duplicates": duplicates}
        facts |= {"lengths": length_counts(lengths)}  # type: ignore[dict-item]
        table = shard_table(pa.table(dict(columns)), np.ascontiguousarray(vectors_RD, np.float32), {})
        data = PARQUET.encode(table, {"unit": unit.identity(), "record": facts, "provenance": {}})
        if rejected:
            faults = {rows + number: "text is null" for number in range(rejected)}
            self.output.storage.put(rejected_name(unit.id), parquet_bytes(rejected_table(unit, None, faults)))
        self.output.storage.put(unit.shard, data)
        times = {"encode_started": 1000.0 + 5 * number, "encode_seconds": 4.0, "tokenize_seconds": 0.5, "read_seconds": 0.25}
        record = CommitRecord.of(unit, **facts, **times, bytes=len(data), padding=rows, worker=f"host:{number % 2}")
        self.shards.append(unit.shard)
        self.records.append(record)
        self.summary.units_pending += 1
        self.summary.rows_pending += record.rows
        self.summary.add(record)
        return unit

    def close(self) -> MadeOutput:
        """Write ledger and summary as the run's end does."""
        ledger = Ledger(self.output.storage, self.summary.run)
        for record in self.records:
            ledger.append(record)
        ledger.flush()
        self.summary.status = "complete"
        self.output.storage.put(f"_control/runs/{self.summary.run}/summary.json", self.summary.document())
        return self


def empty_output(url: str) -> MadeOutput:
    """An output without a shard yet."""
    output = Output(url)
    return MadeOutput(output, Summary(output.url, RUN))


def made_output(url: str, *, shards: int = 3, rows: int = 120, text: str = "what the row says, at some length") -> MadeOutput:
    """An output of vectors that lie in groups by topic, with a rejected row in each shard."""
    made, rng = empty_output(url), np.random.default_rng(0)
    centres = rng.normal(size=(4, 16))
    for shard in range(shards):
        topics = rng.integers(0, 4, rows)
        vectors = centres[topics] + rng.normal(size=(rows, 16))
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        names = [f"id-{shard}-{row}" for row in range(rows)]
        columns = {"id": names, "topic": [f"topic {topic}" for topic in topics], "text": [f"{text} {name}" for name in names]}
        made.add(vectors.astype(np.float32), columns, rejected=1)
    return made.close()
