"""A job and its proof in this process, unit by unit, without Ray: every part is the real one but the cluster."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from embedding import JobConfig
from embedding.corpus.columns import Columns
from embedding.corpus.findings import CheckedUnit
from embedding.corpus.ledger import Ledger, records_from_table
from embedding.corpus.output import JobSettings, Output
from embedding.corpus.plan import Unit, plan_units
from embedding.corpus.reader import read_layouts
from embedding.corpus.sources import absolute, list_sources
from embedding.corpus.vectors import TO_BE_MEASURED, Calibration
from embedding.errors import EmbeddingJobError
from embedding.model.spec import ModelSpec
from embedding.run.attempts import AttemptCounter
from embedding.run.calibration import calibration_of, with_calibration
from embedding.run.calibrator import Calibrator, calibration_job
from embedding.run.checker import CheckJob, check_stage
from embedding.run.exchange import decode_checked, encode_units, rows_in
from embedding.run.models import find_model
from embedding.run.placement import place_workers
from embedding.run.proof.config import VerifyConfig
from embedding.run.proof.result import Proof
from embedding.run.proof.verify import examine, model_of_output
from embedding.run.reading import read_stage
from embedding.run.settings import (
    columns_of_corpus,
    first_choices,
    installed_versions,
    job_settings,
    long_texts_of,
    shards_asked,
    shards_of_output,
    what_was_asked,
)
from embedding.run.worker import EmbeddingWorker, WorkerJob


def embed_here(source: str, output: str, model: Path | str, run: str = "run", **options: Any) -> list[str]:
    """What `embed_corpus` does; the shards that it made, in the order of the corpus."""
    defaults = {"id_column": "id", "unit_rows": 10, "normalize": "yes"}
    config = JobConfig.build(input=(source,), output=output, model=str(model), **(defaults | options))
    spec = find_model(config, precision="fp32")
    form = shards_asked(config)
    place, inputs = Output(output, form), (absolute(source),)
    sources = list_sources(inputs, config.input_format)
    columns = columns_of_corpus(config, sources, place.settings)
    begun = place.settings()
    settings = job_settings(config, spec, first_choices(config, spec, "cpu"), inputs, columns, calibration_of(config, spec, begun))
    if settings.vectors.get("calibration") == TO_BE_MEASURED:
        settings = with_calibration(settings, measure_here(config, spec, settings, columns))
    settings = place.begin(settings)
    place.remember(settings, inputs, what_was_asked(config, spec))
    place.mark_incomplete()
    attempts, kept = AttemptCounter(), settings.kept
    planned = plan_units(
        read_layouts(sources, columns, fits=form.fits(columns.copied)),
        unit_rows=kept["unit_rows"],
        fingerprint=settings.fingerprint,
        limit_rows=config.limit_rows,
        names=form.names,
    )
    units = sorted(planned, key=lambda unit: unit.shard)
    provenance = {"fingerprint": settings.fingerprint, "settings": settings.vectors, "versions": installed_versions(form)}
    job = WorkerJob(
        model=spec,
        output=output,
        batch_tokens=kept["batch_tokens"],
        columns=columns,
        has_id=config.id_column is not None,
        token_columns=config.token_columns,
        provenance=provenance,
        max_unit_attempts=3,
        device="cpu",
        threads=None,
        long_text=long_texts_of(config),
        output_dtype=config.output_dtype,
        calibration=settings.calibration,
        shards=form,
    )
    worker, ledger = EmbeddingWorker(job, attempts), Ledger(place.storage, run)
    done = place.shards()
    made = [unit for unit in units if unit.shard not in done]
    for unit in made:
        [record] = records_from_table(rows_in(worker(read_stage(pa.Table.from_pylist([encode_units([unit])]), columns, attempts, 3))))
        if record.error:
            raise EmbeddingJobError(record.error)
        ledger.append(record)
    ledger.flush()
    place.complete(units, place.shards(), lambda: None)
    return [unit.shard for unit in made]


def measure_here(config: JobConfig, spec: ModelSpec, settings: JobSettings, columns: Columns) -> Calibration:
    """What `run_calibration` does, on a CPU."""
    layouts = list(read_layouts(list_sources(config.input, config.input_format), columns))
    job = calibration_job(config, layouts, columns, spec, settings.kept["batch_tokens"], place_workers(config, [{"CPU": 2.0}]))
    return Calibrator(job).find().calibration


def check_here(units: Sequence[Unit], job: CheckJob) -> Iterator[CheckedUnit]:
    """What `run_checks` does."""
    for unit in units:
        found = rows_in(check_stage(pa.Table.from_pylist([encode_units([unit])]), job, AttemptCounter()))
        yield decode_checked(found["checked"][0].as_py())


def prove_here(output: str, **options: Any) -> Proof:
    """What `verify_corpus` does, but for the repair."""
    config = VerifyConfig.build(output=output, **({"sample": 10_000, "progress": "none"} | options))
    settings = Output(output).settings()
    assert settings is not None
    place, proof = Output(output, shards_of_output(settings)), Proof(output)
    model = model_of_output(config, settings, place) if config.sample else None
    proof.conclude(examine(config, place, settings, model, proof, check_here), [])
    return proof


def found(proof: Proof) -> set[tuple[str, str]]:
    """What is wrong: kind and name."""
    return {(str(finding.kind), finding.name) for finding in proof.details}
