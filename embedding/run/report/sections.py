"""Findings to a page: titles, sentences, tables and figures. Knows no storage and no HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from embedding.corpus.lengths import LENGTH_EDGES
from embedding.errors import count
from embedding.run.report import figures, measures
from embedding.run.report.measures import WorkerTime
from embedding.run.report.page import Findings, Item, Numbers, Page, Section
from embedding.run.report.vectors import VectorFacts, collapse
from embedding.run.report.wording import Named, classify_rows, duration, file_name, name_rows, said, share, short_number
from embedding.run.settings import vectors_of_output
from embedding.run.summary import CLIPPED_SHARE, Summary, clipped

_POINTS = 1000
_WORKERS = 16
"""Workers that are drawn: the first and last ones by tokens, where there are more."""
_FAILURES = 10
_REASONS = 20


def page_of(found: Findings) -> Page:
    """The page of a run's findings."""
    summary, totals = found.summary, found.totals
    with_vector, rejected = totals.rows - totals.rejected, totals.rejected
    corpus = summary.rows_in + summary.rows_skipped + summary.rows_failed + summary.rows_pending
    good = summary.status == "complete"
    tiles = [
        ("Rows with a vector", f"{with_vector:,}", f"of {corpus:,} in the corpus"),
        ("Rejected", f"{rejected:,}", f"{share(rejected, corpus)} of the corpus"),
        ("Tokens", short_number(totals.tokens), f"{totals.tokens / max(1, with_vector):.0f} per row"),
        ("Tokens per second", f"{summary.tokens_per_second:,.0f}", f"{summary.rows_per_second:,.1f} rows/s, this run"),
        ("Wall time", duration(summary.seconds), "this run, including startup"),
        ("Vectors", f"{found.settings.vectors.get('dimensions', '')}", f"dimensions of {found.model.rpartition('/')[2]}"),
    ]
    sections = [*_speed(found), _texts(found), *_vectors(found), _provenance(found)]
    return Page(
        title=f"{summary.output}: {summary.status}",
        good=good,
        verdict="Complete." if good else "Not complete.",
        sentence=f"{with_vector:,} of {count(corpus, 'row')} have a vector; {rejected:,} were rejected." if good else _failed(summary),
        tiles=tiles,
        warnings=_warnings(found),
        sections=sections,
    )


def _failed(summary: Summary) -> str:
    """What a run that is not complete lacks."""
    units = f"{count(summary.units_failed, 'unit')} with {count(summary.rows_failed, 'row')} failed"
    files = f"{count(summary.files_failed, 'source file')} could not be read"
    return " and ".join([units] * (summary.units_failed > 0) + [files] * (summary.files_failed > 0)) + "."


def _warnings(found: Findings) -> list[str]:
    table, sample = found.records.table, found.sample
    warnings = [] if found.vectors is None else collapse(found.vectors, scanned=sample.scanned, repeats=sample.repeats)
    good = measures.total(table, "rows") - measures.total(table, "rejected")
    truncated, padding, tokens = (measures.total(table, name) for name in ("truncated", "padding", "tokens"))
    if truncated > 0.1 * good:
        warnings.append(
            f"{share(truncated, good)} of the rows were longer than max_tokens={found.settings.vectors.get('max_tokens')} and truncated."
        )
    if padding > 0.1 * (tokens + padding):
        warnings.append(f"{share(padding, tokens + padding)} of the computed tokens were padding.")
    outside, numbers = _clipped(found)
    if outside > CLIPPED_SHARE * numbers:
        warnings.append(f"{clipped(share(outside, numbers))}.")
    missing = found.shards - table.num_rows
    if missing > 0:
        complete = found.summary.status == "complete"
        where = "speed and texts below leave them out" if complete else "the counts here leave them out"
        warnings.append(f"The records of {count(missing, 'shard')} are lost or were not read: {where}.")
    if sample.unread:
        warnings.append(f"{count(len(sample.unread), 'shard')} of the sample could not be read: {sample.unread[0]}")
    return [*warnings, *(note for note in dict.fromkeys(table["note"].unique().to_pylist()[:5]) if note)]


def _clipped(found: Findings) -> tuple[int, int]:
    """Numbers that the ranges of int8 do not hold, and all numbers that are stored so."""
    columns = vectors_of_output(found.settings)
    rows, rejected, chunks = (measures.total(found.records.table, name) for name in ("rows", "rejected", "chunks"))
    numbers = sum(columns.dimensions) * (chunks or rows - rejected) if columns.calibration else 0
    return measures.total(found.records.table, "clipped"), numbers


def _speed(found: Findings) -> list[Section]:
    """The last run that embedded something: this one, unless all that it had to do was to complete."""
    timed = measures.timed(found.records.table)
    if not timed.num_rows:
        return []
    run = max(timed["run"].unique().to_pylist())
    timed = measures.timed(found.records.of_run(run))
    pace, workers = measures.pace(timed), measures.worker_times(timed)
    tokens, padding = measures.total(timed, "tokens"), measures.total(timed, "padding")
    which = "This run" if run == found.summary.run else f"This run had nothing to embed; run {run}"
    at_work = f"{count(timed.num_rows, 'unit')} with {tokens:,} tokens on {count(len(workers), 'worker')}"
    lead = f"{which} encoded {at_work} in {duration(pace.seconds)}, counted from the first batch to the last."
    lead += f" Padding was {share(padding, tokens + padding)} of the computed tokens."
    rates = pace.tokens_per_second
    middle = np.median(rates)
    steady = float((np.abs(rates - middle) <= 0.2 * middle).mean())
    pace_item = Item(
        "Throughput, tokens/s",
        f"Median {middle:,.0f} tokens/s; for {steady:.0%} of the time, the rate was within 20% of that.",
        Numbers(
            ("From", "To", "Tokens/s"),
            [
                (duration(pace.edges[at]), duration(pace.edges[at + 8]), f"{rates[at : at + 8].mean():,.0f}")
                for at in range(0, len(rates), 8)
            ],
            ("From", "To", "Tokens/s"),
        ),
        figures.pace_svg(pace),
    )
    return [Section("Speed", lead, [pace_item, _workers(workers)], blocks=[_slowest(timed)])]


def _workers(workers: list[WorkerTime]) -> Item:
    shown = workers if len(workers) <= _WORKERS else [*workers[: _WORKERS // 2], *workers[-_WORKERS // 2 :]]
    all_time = sum(worker.seconds for worker in workers)
    parts = {name: sum(getattr(worker, name) for worker in workers) / all_time for name in ("encoding", "tokenizing", "waiting", "outside")}
    reading = (
        f"Workers spent {parts['encoding']:.1%} of the time encoding, {parts['waiting']:.1%} waiting for units (reads, writes, scheduling),"
        f" {parts['tokenizing']:.1%} waiting for the tokenizer, and {parts['outside']:.1%} before their first or after their last unit."
    )
    if len(workers) > 1:
        reading += f" The busiest processed {workers[0].tokens / max(1, workers[-1].tokens):.2f} times as many tokens as the least busy."
    if len(shown) < len(workers):
        reading += f" Of {len(workers)} workers, those with the most and the fewest tokens are shown, {len(shown) // 2} of each."
    heads = ("Worker", "Units", "Tokens", "Tokens/s", "Encoding", "Tokenizing", "Waiting", "Outside")
    rows = [
        (
            worker.name,
            f"{worker.units:,}",
            f"{worker.tokens:,}",
            f"{worker.tokens / worker.seconds:,.0f}",
            *(f"{part / worker.seconds:.1%}" for part in (worker.encoding, worker.tokenizing, worker.waiting, worker.outside)),
        )
        for worker in shown
    ]
    legend = [("c0", "encoding"), ("c2", "tokenizing"), ("c1", "waiting"), ("c7", "before first or after last unit")]
    return Item("Workers", reading, Numbers(heads, rows, heads[1:]), figures.workers_svg(shown), legend)


def _slowest(timed: pa.Table) -> Item:
    heads = ("Source", "First row", "Rows", "Tokens", "Read (s)", "Tokenize (s)", "Encode (s)", "Write (s)", "Total (s)")
    units = measures.slowest(timed)
    steps = ("read_seconds", "tokenize_seconds", "encode_seconds", "write_seconds", "seconds")
    rows = [
        (
            file_name(str(unit["source"])),
            f"{unit['first_row']:,}",
            f"{unit['rows']:,}",
            f"{unit['tokens']:,}",
            *(f"{unit[step]:,.2f}" for step in steps),
        )
        for unit in units
    ]
    mean = float(np.mean([measures.numbers(timed, name) for name in steps[:-1]]) * (len(steps) - 1))
    reading = f"The slowest took {units[0]['seconds']:,.1f} s from read to write; the average unit took {mean:,.1f} s."
    return Item("Slowest units", reading, Numbers(heads, rows, heads[1:]))


def _texts(found: Findings) -> Section:
    table = found.records.table
    blocks = _rejections(found)
    if failures := found.summary.failures:
        blocks.append(_failures(found.summary, failures[:_FAILURES]))
    lead = f"{count(measures.total(table, 'rows'), 'row')} in {count(table.num_rows, 'shard')}, from all runs on this output."
    return Section("Texts", lead, [*_lengths(found), _became(table)], blocks=blocks)


def _lengths(found: Findings) -> list[Item]:
    """How long the texts are, and which share of them was too long; nothing where no length is known."""
    table, max_tokens = found.records.table, int(found.settings.vectors.get("max_tokens", 0))
    counts = measures.lengths(table)
    if not counts.any() or not max_tokens:
        return []
    rows, rejected, truncated, chunks = (measures.total(table, name) for name in ("rows", "rejected", "truncated", "chunks"))
    if chunks:
        what, cut = "chunks", f"Texts longer than max_tokens={max_tokens:,} are cut into chunks"
    else:
        too_long = share(truncated, rows - rejected)
        what, cut = "rows", f"{too_long} of the rows were longer than max_tokens={max_tokens:,} and were truncated"
    bins = [(f"{LENGTH_EDGES[at]:,} to {LENGTH_EDGES[at + 1] - 1:,}", f"{counts[at]:,}") for at in np.flatnonzero(counts)]
    reading = f"{cut}; half of the {what} have at most {_median_bound(counts):,} tokens."
    numbers, legend = Numbers(("Tokens", what.capitalize()), bins, (what.capitalize(),)), [("c0", "whole"), ("c1", "truncated")]
    return [Item(f"{what.capitalize()} by length in tokens", reading, numbers, figures.lengths_svg(counts, truncated, max_tokens), legend)]


def _became(table: pa.Table) -> Item:
    """How many rows have a vector, and how many of these are cut short or share one."""
    rows, rejected, truncated = (measures.total(table, name) for name in ("rows", "rejected", "truncated"))
    duplicates, chunks = (measures.total(table, name) for name in ("duplicates", "chunks"))
    embedded = rows - rejected
    if chunks:
        reading = f"{embedded:,} rows became {chunks:,} chunks. Equal chunks in a unit are encoded once and share their vector."
        equal = ("chunks equal to an earlier one of their unit", f"{duplicates:,}", share(duplicates, chunks))
    else:
        reading = "Equal rows in a unit are encoded once and share their vector."
        equal = ("of these, equal to an earlier row of their unit", f"{duplicates:,}", share(duplicates, rows))
    cells = [
        ("with a vector", f"{embedded:,}", share(embedded, rows)),
        ("of these, truncated at max_tokens", f"{truncated:,}", share(truncated, rows)),
        equal,
        ("rejected", f"{rejected:,}", share(rejected, rows)),
    ]
    return Item("What became of the rows", reading, Numbers(("Rows", "Count", "Share"), cells, ("Count", "Share")))


def _rejections(found: Findings) -> list[Item]:
    """Why rows were rejected, each reason with an example; nothing where none was."""
    rejections = found.rejections
    if not rejections.reasons:
        return []
    all_counted = rejections.rows >= measures.total(found.records.table, "rejected")
    scope = "" if all_counted else f" The counts cover {rejections.rows:,} of them."
    shown = list(rejections.reasons.items())[:_REASONS]
    examples = [(reason, f"{times:,}", _place(rejections.examples[reason])) for reason, times in shown]
    table = Numbers(("Reason", "Rows", "First example"), examples, ("Rows",))
    return [Item("Rejected rows by reason", f"All are listed in _control/rejected.{scope}", table)]


def _place(row: Mapping[str, object]) -> str:
    """Where a rejected row is."""
    place = f"{file_name(str(row['source']))} row {row['row_index']:,}"
    return place if row["id"] is None else f"{place}, id {row['id']}"


def _failures(summary: Summary, shown: Sequence[Mapping[str, object]]) -> Item:
    """Units, and files that could not be read, whose rows are unknown."""
    titles = ["failed units"] * (summary.units_failed > 0) + ["unreadable source files"] * (summary.files_failed > 0)
    cells = [["" if unit[key] is None else unit[key] for key in ("first_row", "rows", "reason")] for unit in shown]
    rows = [(file_name(str(unit["source"])), *facts) for unit, facts in zip(shown, cells, strict=True)]
    reading = f"{_failed(summary)} Running the same command again retries them; summary.json lists all of them."
    table = Numbers(("Source", "First row", "Rows", "Reason"), rows, ("First row", "Rows"))
    return Item(" and ".join(titles).capitalize(), reading, table)


def _vectors(found: Findings) -> list[Section]:
    facts, sample = found.vectors, found.sample
    if facts is None:
        return []
    settings = found.settings.vectors
    names = name_rows(sample.columns, settings.get("id_column"), settings.get("text_column") or "")
    near = [
        (names[one.row], [Named(names[row].name, names[row].text, f"{cosine:.2f}") for row, cosine in one.nearest])
        for one in facts.neighbours
    ]
    lead = f"A random sample of {count(facts.rows, 'row')} from {count(sample.shards, 'shard')}, the same every time."
    items = [_map(found, facts, names), *_distances(facts), _health(found, facts)]
    return [Section("Vectors", lead, items, near)]


def _map(found: Findings, facts: VectorFacts, names: Sequence[Named]) -> Item:
    """Some rows of the sample on two axes, in the colors of their class where a column has classes."""
    settings = found.settings.vectors
    classes = classify_rows(found.sample.columns, (settings.get("id_column"), settings.get("text_column")))
    points = np.linspace(0, facts.rows - 1, min(_POINTS, facts.rows)).astype(int)
    of_points = [classes.of_rows[row] for row in points]
    titles = [
        f"{names[row].name} ({classes.labels[number]})" if classes.labels else names[row].name
        for row, number in zip(points, of_points, strict=True)
    ]
    coloured = f" Colored by {classes.column}." if classes.column else ""
    return Item(
        "Map",
        f"{len(points):,} rows on the two axes along which they differ most; these show {facts.plane_share:.0%} of the variance.{coloured}",
        svg=figures.plane_svg(facts.plane_R2[points], of_points, titles, facts.plane_share),
        legend=[(f"c{number}", label) for number, label in classes.labels.items()],
        kind="tall",
    )


def _distances(facts: VectorFacts) -> list[Item]:
    """How near rows are to one another, where there are some, and how long their vectors are, where these are not normalized."""
    items = []
    if len(facts.cosines):
        any_two, nearest = np.median(facts.cosines), np.median(facts.nearest_U)
        reading = f"The median cosine of any two rows is {any_two:.2f}, that of a row and its nearest row {nearest:.2f}."
        legend = [("c0", "any two rows"), ("c1", "a row and its nearest")]
        items.append(Item("Cosines, share of pairs", reading, None, figures.cosines_svg(facts.cosines, facts.nearest_U), legend))
    if not facts.unit_length:
        lengths = f"The vectors are not normalized; their lengths range from {facts.norms_R.min():.3g} to {facts.norms_R.max():.3g}."
        items.append(Item("Lengths", lengths, None, figures.norms_svg(facts.norms_R)))
    return items


def _health(found: Findings, facts: VectorFacts) -> Item:
    """Whether the vectors tell the rows apart."""
    numbers = [
        ("Vectors in the sample", f"{facts.rows:,}"),
        ("Distinct vectors", f"{facts.distinct:,}"),
        ("Length", "1 (normalized)" if facts.unit_length else f"{np.median(facts.norms_R):.4g} (median)"),
        ("Mean cosine of two distinct vectors", f"{facts.mean_cosine:.3f}"),
        ("Effective dimensions", f"{facts.effective_dimensions:.0f} of {min(facts.dimensions, max(1, facts.distinct - 1))}"),
    ]
    outside, stored = _clipped(found)
    if stored:
        numbers.append(("Numbers clipped to the int8 ranges", share(outside, stored)))
    collapsed = collapse(facts, scanned=found.sample.scanned, repeats=found.sample.repeats)
    reading = "See the warnings above." if collapsed else "No sign of collapse."
    return Item("Health", reading, Numbers(("Measure", "Value"), numbers, ("Value",)))


def _provenance(found: Findings) -> Section:
    settings = found.settings
    heads = ("Run", "Status", "Rows", "Rejected", "Tokens", "Tokens/s", "Wall time", "Units failed")
    runs = [
        (
            run["run"],
            run["status"],
            *(f"{run[name]:,}" for name in ("rows_in", "rows_rejected", "tokens")),
            f"{run['tokens_per_second']:,.0f}",
            duration(float(str(run["seconds"]))),
            f"{run['units_failed']:,}",
        )
        for run in found.runs
    ]
    facts: Mapping[str, object] = {"model": found.model, "fingerprint": settings.fingerprint, **settings.vectors, **settings.kept}
    grid = [
        Item(
            "Settings",
            "What the vectors were made with; the fingerprint covers everything except unit_rows and batch_tokens.",
            _pairs("Setting", facts),
        ),
        Item("Versions", "Library versions of the run that started this output.", _pairs("Package", settings.versions)),
    ]
    blocks = [Item("Runs", "Newest first, with what each run embedded.", Numbers(heads, runs, heads[2:]))]
    lead = f"Input: {', '.join(settings.input[:5])}{f' and {len(settings.input) - 5} more' if len(settings.input) > 5 else ''}"
    return Section("Provenance", lead, grid, blocks=blocks)


def _pairs(head: str, facts: Mapping[str, object]) -> Numbers:
    return Numbers((head, "Value"), [(key, said(value)) for key, value in facts.items()])


def _median_bound(counts: npt.NDArray[np.int64]) -> int:
    """The last length of the bin that the middle row is in."""
    middle = int(np.searchsorted(np.cumsum(counts), counts.sum() / 2))
    return int(LENGTH_EDGES[middle + 1]) - 1
