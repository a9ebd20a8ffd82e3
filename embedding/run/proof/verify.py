"""The proof of an output, from the outside: plan its corpus anew, check every shard, embed a sample again, compare what it claims."""

from __future__ import annotations

import logging
import secrets
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import accumulate
from typing import TypeAlias

import numpy as np

import embedding
from embedding.corpus.findings import CheckedUnit, Finding, Kind, Rules, Sample
from embedding.corpus.lease import Lease
from embedding.corpus.numbers import Floats, bounds, is_packed, loaded
from embedding.corpus.output import SUCCESS, JobSettings, Output
from embedding.corpus.plan import Unit, UnreadableSource, plan_units, shard_stem
from embedding.corpus.reader import read_layouts
from embedding.corpus.sources import list_inputs
from embedding.corpus.vectors import VectorColumns
from embedding.corpus.verify import Claims, false_claims, missing_shards, repair
from embedding.errors import ConfigError, ModelError, count
from embedding.model.spec import TRUNCATE, ModelSpec
from embedding.run.checker import CheckJob
from embedding.run.cluster import Cluster
from embedding.run.models import find_model, model_folder
from embedding.run.parcels import parcels_of
from embedding.run.pieces import average, firsts, submit_pieces
from embedding.run.pipeline import run_checks
from embedding.run.proof.config import VerifyConfig
from embedding.run.proof.result import Proof
from embedding.run.settings import columns_of_output, long_texts_of_output, model_options, shards_of_output, vectors_of_output
from embedding.run.summary import publish_elsewhere, require_place

log = logging.getLogger(__name__)

_COSINE_OF_THE_SAME_TEXT = {"fp32": 0.9999, "bf16": 0.99, "fp16": 0.99, "fp8": 0.99}
"""Of a vector with the same text's in fp32, by the precision that the output was made in.

In fp32 the order of sums differs with the batch, which costs some 1e-7. bf16 keeps 8 bits: each of a few dozen roundings in a row
turns a vector by up to 0.2%, and whole models measure 0.995 to 0.9999; fp8 is taken only where a sample of
the texts keeps 0.999. Another text's vector is rarely above 0.9.
"""
_SAMPLE_BATCH = 64
_LEASE_SECONDS = 30.0
_LOG_SECONDS = 5.0
_SHOWN_PER_KIND = 5
RunChecks: TypeAlias = Callable[[Sequence[Unit], CheckJob], Iterable[CheckedUnit]]
"""Checks all the units, on whatever there is to do it; answers in any order."""


def verify_corpus(config: VerifyConfig, *, on_end: Callable[[Proof], None] | None = None) -> Proof:
    """Prove that an output is what its settings make of its corpus; without `repair` nothing of it is written.

    `on_end` gets the proof however it ends, also where an error is raised or the process is asked to stop.

    Raises:
        ConfigError: there is no output, its corpus or model cannot be had, or an option is wrong.
        OutputBusyError: `repair` was asked for, and a run holds the output.
        EmbeddingJobError: something broke; nothing is proved.
    """
    started = time.monotonic()
    require_place(config.json_summary)
    output = Output(config.output)
    settings = output.settings()
    if settings is None:
        raise ConfigError(f"{output.url} is not an output of this job: it has no _control/job.json; check the path")
    output = Output(config.output, shards_of_output(settings))
    output.form.require()
    model = model_of_output(config, settings, output) if config.sample else None
    proof = Proof(output.url)
    with _lease(config, output) as lease:
        try:
            with Cluster() as cluster:
                findings = examine(config, output, settings, model, proof, _checks_on(cluster, config, settings))
            if lease is not None:
                lease.renew()
            proof.conclude(findings, repair(output, findings) if lease is not None else [])
        except (KeyboardInterrupt, SystemExit):
            proof.status = "interrupted"
            raise
        finally:
            proof.seconds = round(time.monotonic() - started, 3)
            _publish(config, proof, on_end)
    return proof


def _checks_on(cluster: Cluster, config: VerifyConfig, settings: JobSettings) -> RunChecks:
    cpus = int(sum(node.get("CPU", 0) for node in cluster.nodes()))
    asked = None if config.workers == "auto" else config.workers

    def run(units: Sequence[Unit], job: CheckJob) -> Iterator[CheckedUnit]:
        return run_checks(parcels_of(units, rows=settings.kept["unit_rows"], workers=asked or max(1, cpus)), job, asked)

    return run


@contextmanager
def _lease(config: VerifyConfig, output: Output) -> Iterator[Lease | None]:
    """The output's lease where something may be deleted: a proof alone may run beside a run."""
    with Lease.acquire(output.storage, f"verify-{secrets.token_hex(3)}", _LEASE_SECONDS) if config.repair else nullcontext() as lease:
        yield lease


def model_of_output(config: VerifyConfig, settings: JobSettings, output: Output) -> ModelSpec:
    """The model in fp32, after making sure that it is the one of the output.

    Raises:
        ConfigError: it cannot be found, or is another one.
    """
    options = model_options(settings, output.url, config.model, trust_remote_code=config.trust_remote_code)
    if settings.vectors["code_sha256"] is not None and not config.trust_remote_code:
        raise ModelError(f"{options.model} brings its own code; add --trust-remote-code to run it, or --sample 0 to compare no vectors")
    spec = find_model(options, precision="fp32")
    found = {**spec.fingerprint_fields(), "precision": settings.vectors["precision"]}
    if differing := [key for key, value in found.items() if settings.vectors.get(key) != value]:
        raise ModelError(
            f"{options.model} is not the model of {output.url}, but differs in {', '.join(differing)}; set --model to the right one, "
            "or use --sample 0 to compare no vectors"
        )
    return spec


def plan_of_output(settings: JobSettings) -> tuple[list[Unit], list[UnreadableSource]]:
    """The units of the corpus as it is now, with the cuts that the output keeps; and the files that cannot be read."""
    columns = columns_of_output(settings)
    unreadable: list[UnreadableSource] = []
    layouts = list(read_layouts(list_inputs(settings.input, columns.format, columns.all).sources, columns, unreadable))
    limit = settings.asked.get("limit_rows")
    rows, names = settings.kept["unit_rows"], shards_of_output(settings).names
    planned = plan_units(layouts, unit_rows=rows, fingerprint=settings.fingerprint, limit_rows=limit, names=names)
    return sorted(planned, key=lambda unit: unit.shard), unreadable


def examine(
    config: VerifyConfig, output: Output, settings: JobSettings, model: ModelSpec | None, proof: Proof, run: RunChecks
) -> list[Finding]:
    """Everything that is wrong: what is missing or too much, shards, vectors of the sample, and what is said about them."""
    units, unreadable = plan_of_output(settings)
    claims = Claims.of(output)
    findings = [Finding(Kind.UNREADABLE_SOURCE, file.source.uri, file.reason) for file in unreadable]
    findings += missing_shards(claims, units, {shard_stem(file.source, output.form.names) for file in unreadable})
    committed = [unit for unit in units if unit.shard in claims.shards]
    log.info("checking %s of %s", count(len(committed), "shard"), count(len(units), "unit"))
    proof.seed = secrets.randbelow(2**32) if config.seed is None else config.seed
    job = CheckJob(output.url, rules_of_output(settings), choose_rows(committed, config.sample, proof.seed))
    checked = _collect(run(committed, job) if committed else (), committed, proof, silent=config.progress == "none")
    if model is not None:
        _compare_vectors(model, settings, committed, checked, proof)
    findings += [each.finding for each in checked.values() if each.finding is not None]
    findings += false_claims(claims, units, checked, output)
    if claims.complete and not output.is_complete():
        findings.append(
            Finding(Kind.NOT_COMPLETE, SUCCESS, "a run started while the output was being verified; verify again when it is done")
        )
    _tell(findings)
    return findings


def _collect(answers: Iterable[CheckedUnit], units: Sequence[Unit], proof: Proof, *, silent: bool) -> dict[str, CheckedUnit]:
    """What was found about each unit, by id, in the order of the units."""
    found: dict[str, CheckedUnit] = {}
    bad, shown = 0, time.monotonic()
    for checked in answers:
        found[checked.unit] = checked
        bad += checked.finding is not None
        proof.add(checked)
        if not silent and (time.monotonic() - shown > _LOG_SECONDS or len(found) == len(units)):
            shown = time.monotonic()
            log.info("checked %d of %s, %s, %d bad", len(found), count(len(units), "shard"), count(proof.rows, "row"), bad)
    if len({each.versions for each in found.values() if each.finding is None}) > 1:
        log.info("different library versions made these shards, so the last bits of their vectors may differ")
    return {unit.id: found[unit.id] for unit in units}


def rules_of_output(settings: JobSettings) -> Rules:
    """What each shard must be, by the settings that the output was begun with."""
    return Rules(
        columns=columns_of_output(settings),
        has_id=settings.vectors["id_column"] is not None,
        token_columns=settings.vectors["token_columns"],
        vectors=vectors_of_output(settings),
        normalized=settings.vectors["normalize"],
        fingerprint=settings.fingerprint,
        settings=settings.vectors,
        form=shards_of_output(settings),
        long_text=long_texts_of_output(settings).how,
        max_tokens=settings.vectors["max_tokens"],
        package_version=embedding.__version__,
    )


def choose_rows(units: Sequence[Unit], number: int, seed: int) -> dict[str, tuple[int, ...]]:
    """`number` random rows over all units, each at most once: by unit id the rows, counted from the unit's first."""
    starts = [0, *accumulate(unit.num_rows for unit in units)]
    chosen = np.random.default_rng(seed).choice(starts[-1], min(number, starts[-1]), replace=False, shuffle=False)
    rows: dict[str, tuple[int, ...]] = defaultdict(tuple)
    for row in np.sort(chosen).tolist():
        index = int(np.searchsorted(starts, row, side="right")) - 1
        rows[units[index].id] += (row - starts[index],)
    return dict(rows)


def _compare_vectors(model: ModelSpec, settings: JobSettings, units: Sequence[Unit], checked: dict[str, CheckedUnit], proof: Proof) -> None:
    """Embed the sampled texts in fp32; a shard with a vector that is not its text's becomes a finding."""
    from embedding.model.embedder import Embedder  # loads torch, which a proof without a sample does not need

    pairs = [(unit, sample) for unit in units if checked[unit.id].finding is None for sample in checked[unit.id].samples]
    if not pairs:
        return
    long, least = long_texts_of_output(settings), _COSINE_OF_THE_SAME_TEXT[settings.vectors["precision"]]
    columns = vectors_of_output(settings)
    embedder = Embedder(model, folder=model_folder(model))
    windows = embedder.windows(long if long.how == "average" else TRUNCATE)  # the others' samples are what was encoded
    for start in range(0, len(pairs), _SAMPLE_BATCH):
        part = pairs[start : start + _SAMPLE_BATCH]
        pieces = windows([sample.text for _, sample in part])
        embedded = submit_pieces(embedder, pieces, model.max_tokens)()
        right_RD = average(embedded.vectors_RD, pieces.tokens.lengths, firsts(pieces.texts_P), model)
        for (unit, sample), right in zip(part, right_RD, strict=True):
            cosine, length = min(_agreements(sample, right, columns), key=lambda found: found[0] - abs(found[1] - 1))
            proof.sampled += 1
            proof.worst_cosine = min(cosine, proof.worst_cosine if proof.worst_cosine is not None else 1.0)
            if not _alike(cosine, length, least):
                row = f"row {unit.first_row + sample.source_row}{'' if sample.chunk is None else f', chunk {sample.chunk},'}"
                what = f"the vector of {row} of {unit.source.uri} does not match its text: cosine {cosine:.6f}"
                checked[unit.id] = CheckedUnit(
                    unit.id, Finding(Kind.WRONG_VECTOR, unit.shard, f"{what}, {length:.6g} times the right length")
                )


def _agreements(sample: Sample, right: Floats, columns: VectorColumns) -> Iterator[tuple[float, float]]:
    """For each vector of a row, its cosine and relative length to the right one; `right` holds those of all columns side by side."""
    for (name, part), kind, values in zip(columns.parts(right[None]).items(), columns.types.values(), sample.vectors, strict=True):
        stored, right_D = np.array(values, kind.value_type.to_pandas_dtype()), part[0].astype(np.float64)
        if is_packed(columns.dtype):
            yield compare_bits(loaded(stored).astype(np.float64), right_D)
        elif (ranges_2D := columns.ranges.get(name)) is not None:
            yield compare_steps(stored, right_D, ranges_2D)
        else:
            yield compare(stored.astype(np.float64), right_D)


def compare(vector: np.ndarray, right: np.ndarray) -> tuple[float, float]:
    """Cosine, and length in lengths of the right one; of two vectors of zeros, 1 and 1."""
    one, other = float(np.linalg.norm(vector)), float(np.linalg.norm(right))
    if not (one and other):
        return (1.0, 1.0) if one == other else (0.0, 0.0)
    return float(vector @ right) / (one * other), one / other


def compare_bits(values: np.ndarray, right: np.ndarray) -> tuple[float, float]:
    """The largest cosine that a vector with these bits can have with the right one of the same length, and 1.

    A bit that differs says that a number is 0 at least as far from the right one as 0 is; e of the right vector's squares in such
    numbers make a distance of sqrt(e) lengths, and so a cosine of 1 - e/2 at most.
    """
    differs = (right > 0) != (values[: len(right)] > 0)
    squares = float((right**2).sum())
    return 1 - float((right[differs] ** 2).sum()) / squares / 2 if squares else 1.0, 1.0


def compare_steps(values: np.ndarray, right: np.ndarray, ranges_2D: Floats) -> tuple[float, float]:
    """The same of the vector nearest to the right one of all that int8 stores as these values."""
    lows, highs = bounds(values, ranges_2D)
    return compare(np.clip(right, lows, highs), right)


def _alike(cosine: float, length: float, least: float) -> bool:
    """A turn to the cosine `least` moves a vector by this share of its length; a stretch may move it as far."""
    return cosine >= least and abs(length - 1) <= float(np.sqrt(2 * (1 - least)))


def _tell(findings: Sequence[Finding]) -> None:
    shown: Counter[Kind] = Counter()
    for finding in findings:
        shown[finding.kind] += 1
        if shown[finding.kind] <= _SHOWN_PER_KIND:
            log.warning("%s: %s: %s", finding.kind, finding.name, finding.what)
    for kind, number in shown.items():
        if number > _SHOWN_PER_KIND:
            log.warning("%s: %d more; --json-summary lists them all", kind, number - _SHOWN_PER_KIND)


def _publish(config: VerifyConfig, proof: Proof, on_end: Callable[[Proof], None] | None) -> None:
    if on_end is not None:
        on_end(proof)
    publish_elsewhere(config.json_summary, proof.document())
