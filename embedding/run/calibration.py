"""The ranges of --output-dtype int8: given by the user or measured, settled once when an output is started, and never changed."""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from embedding.config import JobConfig
from embedding.corpus.columns import Columns
from embedding.corpus.output import JobSettings, Output
from embedding.corpus.plan import SourceLayout
from embedding.corpus.storage import open_storage
from embedding.corpus.vectors import TO_BE_MEASURED, Calibration, VectorColumns, as_json, digest
from embedding.errors import ConfigError, CorpusError, EmbeddingJobError, count
from embedding.model.spec import ModelSpec
from embedding.run.calibrator import calibration_job
from embedding.run.cluster import Cluster
from embedding.run.pipeline import run_calibration
from embedding.run.placement import place_workers

log = logging.getLogger(__name__)


def calibration_of(config: JobConfig, model: ModelSpec, existing: JobSettings | None) -> Calibration:
    """The ranges that are known before a run: those that the user gives, else the output's own; none for what needs none.

    Raises:
        ConfigError: those of the user do not fit the vectors.
    """
    if config.calibration is None or config.output_dtype != "int8":
        return existing.calibration if existing is not None and config.output_dtype == "int8" else {}
    columns = VectorColumns(model.columns)
    calibration = _of_file(config.calibration, columns) if config.calibration.endswith(".npy") else _of_output(config.calibration, model)
    if fault := columns.fault(calibration):
        raise ConfigError(f"--calibration {config.calibration} does not fit the vectors: {fault}")
    return calibration


def _of_file(url: str, columns: VectorColumns) -> Calibration:
    folder, _, name = url.rpartition("/")
    data = open_storage(folder or ("/" if url.startswith("/") else ".")).read(name)
    if data is None:
        raise ConfigError(f"--calibration {url} does not exist; check the path")
    width = sum(columns.dimensions)
    try:
        ranges = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ConfigError(f"--calibration {url} is not a .npy file that numpy can read; save it with numpy.save") from error
    if not isinstance(ranges, np.ndarray) or ranges.shape != (2, width) or ranges.dtype.kind not in "fiu":
        found = f"{ranges.dtype} {ranges.shape}" if isinstance(ranges, np.ndarray) else "several arrays"
        raise ConfigError(f"--calibration {url} contains {found}, not the minimum and maximum of {width} numbers, shape (2, {width})")
    with np.errstate(over="ignore"):
        return {name: as_json(part) for name, part in columns.parts(ranges.astype(np.float32)).items()}


def _of_output(url: str, model: ModelSpec) -> Calibration:
    settings = Output(url).settings()
    if settings is None:
        raise ConfigError(f"--calibration {url} is neither a .npy file nor an output of this job; check the path")
    if not settings.calibration:
        raise ConfigError(f"--calibration {url} is an output without int8 ranges; name one that was made with --output-dtype int8")
    if settings.vectors["weights_sha256"] != model.weights_sha256:
        raise ConfigError(f"--calibration {url} is an output of another model, whose ranges do not fit; leave it out")
    return settings.calibration


def calibrated(
    config: JobConfig,
    output: Output,
    layouts: Sequence[SourceLayout],
    columns: Columns,
    model: ModelSpec,
    settings: JobSettings,
    cluster: Cluster,
) -> JobSettings:
    """The settings with ranges where they lack them: measured on a sample of the corpus. Only for the run that holds the lease.

    Raises:
        CorpusError: no row of the sample has a text that would be embedded.
        EmbeddingJobError: nothing could be measured.
    """
    if settings.vectors.get("calibration") != TO_BE_MEASURED:
        return settings
    if (begun := output.settings()) is not None:  # by a run that held the lease while this one waited for it
        return with_calibration(settings, begun.calibration)
    placement = place_workers(config, cluster.nodes())
    job = calibration_job(config, layouts, columns, model, settings.kept["batch_tokens"], placement)
    log.info("measuring the int8 ranges on a sample of the corpus%s", "" if placement.fitting else "; waiting for a node to join")
    try:
        found = run_calibration(job, placement)
    except EmbeddingJobError as error:
        what = f"the int8 ranges could not be measured: {error}"
        raise EmbeddingJobError(f"{what}; run the same command again, or provide them with --calibration") from error
    if not found.rows:
        raise CorpusError("no text of the sample could be embedded to measure the int8 ranges; provide them with --calibration")
    log.info("measured the int8 ranges on %s", count(found.rows, "vector"))
    return with_calibration(replace(settings, measured=settings.measured | {"calibration_rows": found.rows}), found.calibration)


def with_calibration(settings: JobSettings, calibration: Calibration) -> JobSettings:
    """The settings with these ranges."""
    return replace(settings, vectors=settings.vectors | {"calibration": digest(calibration)}, calibration=calibration)
