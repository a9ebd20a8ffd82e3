"""One run, from the configuration to the summary. Reads like the diagram in docs/architecture.md."""

from __future__ import annotations

import functools
import logging
import secrets
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from rich.filesize import decimal

from embedding.config import JobConfig
from embedding.corpus.columns import Columns
from embedding.corpus.lease import Lease
from embedding.corpus.ledger import Ledger
from embedding.corpus.output import JobSettings, Output
from embedding.corpus.plan import SourceLayout, Unit, UnreadableSource, plan_units, shard_stem, stem_of
from embedding.corpus.reader import read_layouts
from embedding.corpus.sources import absolute, list_inputs
from embedding.corpus.storage import TEMPORARY
from embedding.errors import AccessError, ConfigError, CorpusError, EmbeddingJobError, LeaseLostError, StorageError, count
from embedding.model.spec import ModelSpec
from embedding.run.calibration import calibrated, calibration_of
from embedding.run.cluster import Cluster
from embedding.run.fidelity import with_fidelity
from embedding.run.metrics import Metrics
from embedding.run.models import find_model
from embedding.run.outlook import Outlook
from embedding.run.parcels import parcels_of
from embedding.run.pipeline import InFlight, run_units
from embedding.run.placement import Placement, place_workers
from embedding.run.progress import Watched, open_progress
from embedding.run.report.publish import write_report
from embedding.run.settings import (
    columns_asked,
    columns_of_corpus,
    first_choices,
    installed_versions,
    job_settings,
    long_texts_of,
    precision_of,
    require_apart,
    require_not_of_output,
    shards_asked,
    what_was_asked,
)
from embedding.run.sizes import measured, open_choices
from embedding.run.summary import Summary, publish_elsewhere, require_place
from embedding.run.worker import WorkerJob

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Corpus:
    """The source files as this run found them."""

    columns: Columns
    layouts: list[SourceLayout]
    unreadable: list[UnreadableSource]
    versions: dict[str, str]
    """By input, those that have a version as a whole."""

    @property
    def remembered(self) -> dict[str, dict[str, str]]:
        """What an output remembers of it besides its inputs: nothing where no input has a version."""
        return {"input_versions": self.versions} if self.versions else {}


@dataclass(frozen=True)
class _Plan:
    """Everything that is known before a worker starts."""

    columns: Columns
    model: ModelSpec
    settings: JobSettings
    units: list[Unit]
    pending: list[Unit]
    stale: list[str]
    """Committed shards that no unit claims."""
    summary: Summary


def embed_corpus(config: JobConfig, *, on_end: Callable[[Summary], None] | None = None) -> Summary:
    """Embed every row of the corpus that the output does not hold yet.

    `on_end` gets the summary however the run ends, also where an error is raised or the process is asked to stop.

    Raises:
        ConfigError: an option, the corpus, the model or the output's earlier settings do not allow the run.
        OutputBusyError: another run holds the output.
        EmbeddingJobError: something broke; the same call again goes on where this one stopped.
    """
    started = time.monotonic()
    run_id = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}"
    output = Output(config.output, shards_asked(config))
    earlier = functools.cache(lambda: None if config.restart else output.settings())
    require_apart(config)
    require_place(config.json_summary)
    corpus = _read_corpus(config, output, earlier)
    with Cluster(looked_at=config.dry_run) as cluster:
        model, settings = _settle(config, output, earlier(), cluster, corpus.columns)
        if config.dry_run:
            Lease.require_free(output.storage)
            output.storage.require_writable(f"{TEMPORARY}/probe-{secrets.token_hex(8)}")
            if earlier() is None:
                settings = with_fidelity(config, corpus.layouts, corpus.columns, model, settings, cluster)
            plan = _plan(config, output, corpus, model, settings, run_id)
            plan.summary.plan = _describe(config, output, plan, corpus, cluster, begun=earlier() is not None)
            publish_elsewhere(config.json_summary, _ended(plan.summary, started, on_end).document())
            return plan.summary
        with Lease.acquire(output.storage, run_id, config.lease_seconds) as lease:
            if earlier() is None:
                settings = with_fidelity(config, corpus.layouts, corpus.columns, model, settings, cluster)
            if config.restart:
                output.clear(lease.renew)
            if earlier() is None and open_choices(config, corpus.layouts, cluster):
                settings = measured(config, corpus.layouts, corpus.columns, model, settings, cluster)
            settings = calibrated(config, output, corpus.layouts, corpus.columns, model, settings, cluster)
            plan = _plan(config, output, corpus, model, output.begin(settings), run_id)
            lease.renew()
            output.remember(plan.settings, _inputs(config), what_was_asked(config, model) | corpus.remembered)
            try:
                _run(config, output, plan, cluster, lease)
            except BaseException as error:
                plan.summary.status = "interrupted" if isinstance(error, KeyboardInterrupt | SystemExit) else "crashed"
                cause = _cause(error, lease)
                with _failing_quietly():
                    _publish(config, output, _ended(plan.summary, started, on_end))
                if cause is error:
                    raise
                raise cause from error
            _publish(config, output, _ended(plan.summary, started, on_end))
            if config.report == "yes" and plan.summary.status != "nothing to do":
                write_report(output, plan.summary, plan.settings, _committed(plan), model=config.model)
    return plan.summary


def _cause(error: BaseException, lease: Lease) -> BaseException:
    """Why the run really ended; `error` is what it met last."""
    if isinstance(error, KeyboardInterrupt | SystemExit):
        return error
    with _failing_quietly():
        try:
            lease.check()
        except LeaseLostError as lost:  # a process that was suspended long enough for that finds other things broken too
            return lost
    if isinstance(error, AccessError):  # it was allowed when the run began, so running again can help
        return StorageError(f"{error}, then run the same command again to resume")
    return error


@contextmanager
def _failing_quietly() -> Iterator[None]:
    """What is done on the way out of a failed run must not hide why it failed."""
    try:
        yield
    except EmbeddingJobError as error:
        log.warning("%s", error)


def _ended(summary: Summary, started: float, on_end: Callable[[Summary], None] | None) -> Summary:
    summary.seconds = round(time.monotonic() - started, 3)
    if on_end is not None:
        on_end(summary)
    return summary


def _inputs(config: JobConfig) -> tuple[str, ...]:
    return tuple(absolute(url) for url in config.input)


def _read_corpus(config: JobConfig, output: Output, earlier: Callable[[], JobSettings | None]) -> _Corpus:
    """List the source files and read their footers; `earlier` tells what the output was begun with, where that matters.

    Raises:
        CorpusError: the corpus as a whole cannot be used, or a file cannot be read and --bad-rows=fail.
    """
    listing = list_inputs(config.input, config.input_format, columns_asked(config))
    sources = listing.sources
    require_not_of_output(sources, config)
    columns = columns_of_corpus(config, sources, earlier)
    unreadable: list[UnreadableSource] = []
    set_aside = unreadable if config.bad_rows == "reject" else None
    layouts = list(read_layouts(sources, columns, set_aside, output.form.fits(columns.copied)))
    if unreadable and not layouts:
        raise CorpusError(f"none of the source files ({len(sources)}) can be read; first error: {unreadable[0].reason}")
    size, rows = decimal(sum(source.size for source in sources)), count(sum(layout.num_rows for layout in layouts), "row")
    log.info("%s, %s, %s", count(len(sources), "source file"), size, rows)
    if unreadable:
        log.warning("left out %s that cannot be read; first error: %s", count(len(unreadable), "source file"), unreadable[0].reason)
    return _Corpus(columns, layouts, unreadable, listing.versions)


def _settle(
    config: JobConfig, output: Output, existing: JobSettings | None, cluster: Cluster, columns: Columns
) -> tuple[ModelSpec, JobSettings]:
    """The model and settings of this run: what the output was begun with, checked against the options, else first choices."""
    if existing is None:
        with ThreadPoolExecutor(1, thread_name_prefix="model") as beside:  # it brings torch, and Ray's start is mostly waiting
            finding = beside.submit(find_model, config, precision=precision_of(config, "fp32"))
            placement = place_workers(config, cluster.nodes())
        model = replace(finding.result(), precision=precision_of(config, placement.precision))
        chosen = first_choices(config, model, placement.device)
        return model, job_settings(config, model, chosen, _inputs(config), columns, calibration_of(config, model, None))
    model = find_model(config, precision=precision_of(config, existing.vectors["precision"]))
    settings = job_settings(config, model, existing.kept, existing.input, columns, calibration_of(config, model, existing))
    existing.require_same_vectors(settings, output.url)
    for name, kept in existing.kept.items():
        if getattr(config, name) not in ("auto", kept):
            log.warning("keeping %s=%d from this output's first run, so that its units stay the same; change it by --restart", name, kept)
    return model, settings


def _plan(config: JobConfig, output: Output, corpus: _Corpus, model: ModelSpec, settings: JobSettings, run_id: str) -> _Plan:
    """The difference between what the corpus asks for and what the output's folder lists.

    Shards of a file that cannot be read now are neither done nor stale: what could not be planned is left alone.
    """
    unit_rows, names, limit = settings.kept["unit_rows"], output.form.names, config.limit_rows
    planned = plan_units(corpus.layouts, unit_rows=unit_rows, fingerprint=settings.fingerprint, limit_rows=limit, names=names)
    units = sorted(planned, key=lambda unit: unit.shard)
    committed = {} if config.restart else output.shards()
    claimed = {unit.shard for unit in units}
    unknown = {shard_stem(file.source, names) for file in corpus.unreadable}
    stale = [name for name in committed if name not in claimed and stem_of(name) not in unknown]
    done = [unit for unit in units if unit.shard in committed]
    pending = [unit for unit in units if unit.shard not in committed]
    inputs = _inputs(config)
    forgotten = [url for url in settings.input if url not in inputs]
    if stale and (forgotten or config.limit_rows) and not config.yes:
        cause = f"--input no longer names {forgotten[0]}" if forgotten else f"--limit-rows={config.limit_rows} leaves out rows"
        loss = f"{count(len(stale), 'finished shard')} of {output.url} would be removed"
        raise ConfigError(f"{cause}, so {loss}; add --yes to allow it, or choose another --output")
    sizes = count(len(units), "unit"), count(unit_rows, "row")
    log.info("%s of up to %s: %d done, %d to do", *sizes, len(done), len(pending))
    counts = {"int8_numbers": sum(model.columns) if settings.calibration else 0}
    summary = Summary.planned(output=output.url, run=run_id, done=done, pending=pending, unreadable=corpus.unreadable, **counts)
    return _Plan(corpus.columns, model, settings, units, pending, stale, summary)


def _describe(config: JobConfig, output: Output, plan: _Plan, corpus: _Corpus, cluster: Cluster, *, begun: bool) -> dict[str, object]:
    from embedding.run.estimate import estimate

    placement = place_workers(config, cluster.nodes())
    kept = plan.settings.kept
    still_open = [] if begun else open_choices(config, corpus.layouts, cluster)
    origin = "this output's first run" if begun else "as given, or the default for this hardware; a run would keep them"
    can_try = cluster.is_here and placement.fitting > 0
    facts = estimate(config, output, plan.pending, corpus.columns, plan.model, kept["batch_tokens"], placement, here=can_try)
    return facts | {
        "source files": len(corpus.layouts),
        "source bytes": sum(layout.source.size for layout in corpus.layouts),
        "unreadable files": len(corpus.unreadable),
        "rows": sum(unit.num_rows for unit in plan.units),
        "units done": plan.summary.units_skipped,
        "units to do": plan.summary.units_pending,
        "stale shards": len(plan.stale),
        "workers": str(placement),
        "place": "this machine" if cluster.is_here else "the running cluster",
        "kept": kept,
        "kept from": f"{' and '.join(still_open)} will be measured when the run starts; this is the default" if still_open else origin,
        "settings": plan.settings.vectors,
        "fingerprint": plan.settings.fingerprint,
    }


def _run(config: JobConfig, output: Output, plan: _Plan, cluster: Cluster, lease: Lease) -> None:
    """pending units -> records -> ledger and progress -> manifest."""
    summary = plan.summary
    if not plan.pending and not plan.stale and not summary.files_failed and output.is_complete():
        summary.status = "nothing to do"
        return
    lease.renew()
    output.mark_incomplete()
    if plan.pending:
        _embed(config, output, plan, cluster, lease)
    if summary.units_failed or summary.files_failed:
        summary.status = "failed units"
        return
    output.complete(plan.units, output.shards(), lease.renew)
    summary.status = "complete"


def _embed(config: JobConfig, output: Output, plan: _Plan, cluster: Cluster, lease: Lease) -> None:
    placement = place_workers(config, cluster.nodes())
    log.info("starting workers: %s", placement)
    if placement.fitting < placement.min_workers:
        log.warning("the cluster has room for %d of %d workers; waiting for nodes to join", placement.fitting, placement.min_workers)
    summary, notes = plan.summary, {""}
    ledger, metrics = Ledger(output.storage, summary.run), Metrics(output.url, summary.run)
    outlook, in_flight = Outlook(plan.units, plan.pending), InFlight()
    try:
        style = "none" if config.quiet and config.progress == "auto" else config.progress
        with open_progress(style, Watched(summary, outlook, placement, in_flight)) as progress:
            parcels = parcels_of(plan.pending, rows=plan.settings.kept["unit_rows"], workers=placement.max_workers)
            for record in run_units(parcels, _worker_job(config, output, plan, placement), placement, in_flight=in_flight):
                lease.check()
                ledger.append(record)
                summary.add(record)
                outlook.add(record, now := time.monotonic())
                metrics.update(record, summary, outlook, now)
                for note in {record.note, summary.warning} - notes:
                    notes.add(note)
                    log.warning("%s", note)
                progress.update()
    except BaseException:
        with _failing_quietly():
            ledger.flush()
        raise
    ledger.flush()


def _worker_job(config: JobConfig, output: Output, plan: _Plan, placement: Placement) -> WorkerJob:
    settings = plan.settings
    return WorkerJob(
        model=plan.model,
        output=output.url,
        batch_tokens=settings.kept["batch_tokens"],
        columns=plan.columns,
        has_id=config.id_column is not None,
        token_columns=config.token_columns,
        provenance={"fingerprint": settings.fingerprint, "settings": settings.vectors, "versions": installed_versions(output.form)},
        max_unit_attempts=config.max_unit_attempts,
        fails_on_bad_rows=config.bad_rows == "fail",
        long_text=long_texts_of(config),
        output_dtype=config.output_dtype,
        calibration=settings.calibration,
        shards=output.form,
        device=placement.device,
        threads=placement.threads,
    )


def _committed(plan: _Plan) -> list[str]:
    failed = {(failure["source"], failure["first_row"]) for failure in plan.summary.failures}
    return [unit.shard for unit in plan.units if (unit.source.uri, unit.first_row) not in failed]


def _publish(config: JobConfig, output: Output, summary: Summary) -> None:
    output.storage.put(f"_control/runs/{summary.run}/summary.json", summary.document())
    publish_elsewhere(config.json_summary, summary.document())
