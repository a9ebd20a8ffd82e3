"""Whether fp8 is near enough to float32 on this corpus: measured before an output is begun, and refused where it is not."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, replace

from embedding.config import JobConfig
from embedding.corpus.columns import Columns
from embedding.corpus.output import JobSettings
from embedding.corpus.plan import SourceLayout
from embedding.errors import ConfigError, CorpusError, EmbeddingJobError, count
from embedding.model.spec import ModelSpec
from embedding.run.calibrator import calibration_job
from embedding.run.cluster import Cluster
from embedding.run.comparer import LEAST_COSINE, Comparer, Fidelity
from embedding.run.pipeline import run_comparison
from embedding.run.placement import place_workers

log = logging.getLogger(__name__)


def with_fidelity(
    config: JobConfig, layouts: Sequence[SourceLayout], columns: Columns, model: ModelSpec, settings: JobSettings, cluster: Cluster
) -> JobSettings:
    """The settings of a new output with what fp8 keeps of a sample's vectors; as they are in other precisions.

    A dry run, which starts nothing on a cluster, leaves it to the run there.

    Raises:
        ConfigError: it keeps too little, or does not run there.
        EmbeddingJobError: that could not be measured.
    """
    if model.precision != "fp8":
        return settings
    if config.dry_run and not cluster.is_here:
        log.warning("a run begins by comparing fp8 with fp32 on a sample of the corpus, and ends there if the vectors differ too much")
        return settings
    placement = place_workers(config, cluster.nodes())
    job = calibration_job(config, layouts, columns, model, settings.kept["batch_tokens"], placement)
    waiting = "" if placement.fitting or config.dry_run else "; waiting for a node to join"
    log.info("comparing fp8 with fp32 on a sample of the corpus%s", waiting)
    try:
        found = Comparer(job).find() if config.dry_run else run_comparison(job, placement)
    except EmbeddingJobError as error:
        raise type(error)(f"fp8 could not be compared with fp32: {error}") from error
    return replace(settings, measured=settings.measured | {"fp8": asdict(_near_enough(found))})


def _near_enough(found: Fidelity) -> Fidelity:
    """Raises ConfigError: it is not, or there was nothing to compare."""
    if not found.vectors:
        raise CorpusError("no text of the sample could be embedded to compare fp8 with fp32; use --precision bf16")
    compared = f"of {count(found.vectors, 'vector')} of the corpus, the worst has a cosine of {found.least_cosine:.4f} to fp32"
    if found.least_cosine < LEAST_COSINE:
        raise ConfigError(f"--precision fp8 changes the vectors too much: {compared}, below {LEAST_COSINE}; use --precision bf16")
    log.info("fp8 is near enough: %s", compared)
    return found
