"""The sizes of units and batches that a user leaves open: measured for a new output, where its corpus is worth it.

Nothing depends on it: where it fails, the run takes the defaults.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, replace

import numpy as np

from embedding.config import JobConfig
from embedding.corpus.columns import Columns
from embedding.corpus.output import JobSettings
from embedding.corpus.plan import SourceLayout
from embedding.errors import EmbeddingJobError, count
from embedding.model.batching import default_batch_tokens
from embedding.model.measure import Measured
from embedding.model.spec import ModelSpec
from embedding.run.cluster import Cluster
from embedding.run.pipeline import run_probe
from embedding.run.placement import Placement, place_workers
from embedding.run.probe import Findings, ProbeJob, sample_units
from embedding.run.settings import default_unit_rows, long_texts_of

log = logging.getLogger(__name__)

_WORTH_UNITS = 8
"""A corpus of more units of default size is worth some seconds of measuring; a smaller one is done sooner without."""
_ROW_BYTES = 32
"""Of a short text in a file, compressed as most are. Where a long text becomes many windows, a corpus is worth as many such rows."""
_UNIT_SECONDS = (10, 20)
"""Of work: more than the least where more workers end units than one driver can feed."""
_FED_PER_SECOND = 50
"""Units; what one driver sustains (docs/scale.md)."""
_UNIT_BYTES = 2**28
"""Texts, copied columns and vectors of a unit; a worker has two or three units in hand, and more wait at it."""
_UNITS_PER_WORKER = 4
"""At least, so that no worker waits long for the last one."""
_LEAST_ROWS, _LEAST_SECONDS = 512, 2
"""Units with less of both cost Ray more than they help, however many the workers are."""


def open_choices(config: JobConfig, layouts: Sequence[SourceLayout], cluster: Cluster) -> list[str]:
    """The sizes that a run measures when it begins a new output: those left open, for a corpus that is worth it."""
    names = [name for name in ("unit_rows", "batch_tokens") if getattr(config, name) == "auto"]
    if not names:
        return []
    device = place_workers(config, cluster.nodes()).device
    rows = _rows(config, layouts)
    if long_texts_of(config).cuts:
        rows = max(rows, _bytes(layouts, rows) // _ROW_BYTES)
    return names if rows > _WORTH_UNITS * default_unit_rows(device) else []


def measured(
    config: JobConfig, layouts: Sequence[SourceLayout], columns: Columns, model: ModelSpec, settings: JobSettings, cluster: Cluster
) -> JobSettings:
    """The settings with what was measured for this corpus, or as they are where that fails: a run is no worse for it."""
    placement = place_workers(config, cluster.nodes())
    waiting = "" if placement.fitting else "; the cluster has no room for one yet, waiting for a node to join"
    log.info("measuring the best batch size and the speed of a worker%s", waiting)
    try:
        found = run_probe(_probe_job(config, layouts, columns, model, placement), placement)
    except EmbeddingJobError as error:
        log.warning("measuring failed (%s); using %s", error, _in_words(settings.kept))
        return settings
    rows = unit_rows(found, rows=_rows(config, layouts), workers=placement.max_workers)
    chosen = {"unit_rows": rows, "batch_tokens": batch_tokens(found.pace, default_batch_tokens(placement.device, model.max_tokens))}
    kept = {name: chosen[name] if getattr(config, name) == "auto" else value for name, value in settings.kept.items()}
    log.info("measured %s tokens/s; using %s", f"{found.pace.tokens_per_second:,.0f}", _in_words(kept))
    return replace(settings, kept=kept, measured=settings.measured | asdict(found))


def batch_tokens(pace: Measured, default: int) -> int:
    """What was measured, but no less than the default where time ran out before that was tried: the machine may have been busy."""
    return pace.batch_tokens if pace.in_time else max(pace.batch_tokens, default)


def unit_rows(found: Findings, *, rows: int, workers: int) -> int:
    """Rows of a unit, a power of two: some seconds of work, within what memory, the workers and Ray bear.

    Args:
        found: pace of a worker and size of a row.
        rows: of the corpus.
        workers: of the run.
    """
    pace = found.pace.rows_per_second
    by_pace = pace * np.clip(workers / _FED_PER_SECOND, *_UNIT_SECONDS)
    by_workers = max(min(_LEAST_ROWS, pace * _LEAST_SECONDS), rows / (workers * _UNITS_PER_WORKER))
    by_bytes = _UNIT_BYTES / found.row_bytes
    return int(2 ** max(0, min(np.rint(np.log2(by_pace)), np.floor(np.log2(min(by_workers, by_bytes))))))


def _rows(config: JobConfig, layouts: Sequence[SourceLayout]) -> int:
    rows = sum(layout.num_rows for layout in layouts)
    return rows if config.limit_rows is None else min(rows, config.limit_rows)


def _bytes(layouts: Sequence[SourceLayout], rows: int) -> int:
    """Of the files that hold so many rows, in proportion."""
    return sum(layout.source.size for layout in layouts) * rows // max(1, sum(layout.num_rows for layout in layouts))


def _probe_job(config: JobConfig, layouts: Sequence[SourceLayout], columns: Columns, model: ModelSpec, placement: Placement) -> ProbeJob:
    return ProbeJob(
        model=model,
        columns=columns,
        sample=sample_units(layouts, placement.device, config.limit_rows),
        batch_tokens=None if config.batch_tokens == "auto" else config.batch_tokens,
        device=placement.device,
        share=min(1.0, placement.gpus),
        threads=placement.threads,
        long_text=long_texts_of(config),
    )


def _in_words(kept: dict[str, int]) -> str:
    return f"batches of {kept['batch_tokens']:,} tokens and units of {count(kept['unit_rows'], 'row')}"
