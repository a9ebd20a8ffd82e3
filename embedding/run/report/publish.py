"""The report of a run: `report.html` beside `summary.json`, one file that asks for nothing else, whatever the size of the output."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence

import embedding
from embedding.corpus.output import JobSettings, Output
from embedding.corpus.review import read_records, read_rejections, read_runs, read_totals, sample_shards
from embedding.run.summary import Summary

log = logging.getLogger(__name__)

SAMPLE_ROWS = 2000
_READ_SECONDS = (8.0, 10.0, 12.0, 20.0)
"""Since the beginning: after these, no further ledger segment, list of rejected rows, summary or shard is opened."""
_PATIENCE_SECONDS = 60.0
"""After these the report is given up: a store that hangs must not keep the driver."""


def write_report(output: Output, summary: Summary, settings: JobSettings, shards: Sequence[str], *, model: str) -> None:
    """Put the report of a run that ended; `shards` are those that are committed. Never raises: a report is not worth a run."""

    def write() -> None:
        try:
            output.storage.put(name, make_report(output, summary, settings, shards, model=model).encode())
        except Exception as error:  # noqa: BLE001  (nothing that a report meets may fail a run that is done)
            log.warning("the report could not be made: %s: %s", type(error).__name__, error)
        else:
            log.info("report: %s/%s", output.url, name)

    name = f"_control/runs/{summary.run}/report.html"
    thread = threading.Thread(target=write, name="report", daemon=True)
    thread.start()
    thread.join(_PATIENCE_SECONDS)
    if thread.is_alive():
        log.warning("the report was not finished within %.0f seconds and is left out", _PATIENCE_SECONDS)


def make_report(output: Output, summary: Summary, settings: JobSettings, shards: Sequence[str], *, model: str) -> str:
    """The page: read, measure, draw, lay out. Nothing is read that grows with the rows."""
    from jinja2 import Environment, PackageLoader, StrictUndefined  # this and the drawing: seconds that only reports need to spend

    from embedding.run.report.page import Findings
    from embedding.run.report.sections import page_of
    from embedding.run.report.vectors import study

    began = time.monotonic()
    records_until, rejected_until, runs_until, sample_until = (began + seconds for seconds in _READ_SECONDS)
    records = read_records(output.storage, shards, summary.run, records_until)
    totals = (read_totals(output.storage) if summary.status == "complete" else None) or records.totals()
    rejections = read_rejections(output.storage, records, rejected_until)
    runs = read_runs(output.storage, runs_until)
    sample = sample_shards(output.storage, shards, rows=SAMPLE_ROWS, seed=settings.fingerprint, until=sample_until, form=output.form)
    vectors = study(sample.vectors_RD, sample.rounding) if len(sample.vectors_RD) else None
    page = page_of(Findings(summary, settings, model, len(shards), totals, records, rejections, runs, sample, vectors))
    layout = Environment(loader=PackageLoader("embedding.run.report", "."), autoescape=True, undefined=StrictUndefined)
    return layout.get_template("report.html.j2").render(page=page, output=output.url, run=summary.run, version=embedding.__version__)
