"""A corpus of units and the worker that embeds them, as many at once as in a run, without Ray."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.setting import Setting
from embedding.corpus.ledger import CommitRecord, records_from_table
from embedding.corpus.plan import plan_units
from embedding.corpus.reader import Columns, read_layouts
from embedding.corpus.sources import list_sources
from embedding.model.tokenizer import TokenizedTexts
from embedding.run.attempts import AttemptCounter
from embedding.run.exchange import encode_units, rows_in
from embedding.run.reading import read_stage
from embedding.run.worker import UNITS_IN_HAND, EmbeddingWorker, WorkerJob

_COLUMNS = Columns("text", ("id",))


class Units:
    """The texts of a setting as one Parquet file, cut into units."""

    def __init__(self, setting: Setting, scratch: Path, units: int) -> None:
        source = scratch / "corpus"
        source.mkdir(exist_ok=True)
        pq.write_table(pa.table({"id": np.arange(len(setting.texts)), "text": setting.texts}), source / "a.parquet")
        layouts = read_layouts(list_sources([str(source)]), _COLUMNS)
        self.units = list(plan_units(layouts, unit_rows=-(-len(setting.texts) // units), fingerprint="bench"))
        self._attempts = AttemptCounter()
        self._device = setting.device
        job = WorkerJob(
            model=setting.model.spec(setting.precision),
            output=str(scratch / "vectors"),
            batch_tokens=setting.batch_tokens,
            columns=_COLUMNS,
            has_id=True,
            token_columns=False,
            provenance={},
            max_unit_attempts=1,
            device=setting.device,
            threads=setting.threads if setting.device == "cpu" else None,
        )
        self._worker = EmbeddingWorker(job, self._attempts)

    def encode(self, ready: Iterable[TokenizedTexts], batch_tokens: int) -> None:
        """What the worker's encoder does with tokens that are ready, and nothing else."""
        for tokens in ready:
            self._worker._embedder.embed(tokens, batch_tokens)

    def embed(self) -> Iterator[CommitRecord]:
        """Embed and commit all of them, whether they are committed already or not; their records as they come.

        Raises:
            RuntimeError: a unit failed.
        """
        batches = (pa.Table.from_pylist([encode_units([unit])]) for unit in self.units)
        with ThreadPoolExecutor(UNITS_IN_HAND[self._device]) as pool:
            for table in pool.map(lambda batch: self._worker(read_stage(batch, _COLUMNS, self._attempts, 1)), batches):
                [record] = records_from_table(rows_in(table))
                if record.error:
                    raise RuntimeError(record.error)
                self._attempts.settle(record.unit)  # when it is embedded again that is not another try
                yield record
