"""How units travel through Ray Data: alone, at once, and as few Ray tasks as a large corpus needs."""

from __future__ import annotations

import functools
import logging
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray.data
from ray.exceptions import RayError

from embedding.corpus.ledger import CommitRecord
from embedding.corpus.plan import make_unit
from embedding.corpus.sources import Source
from embedding.errors import EmbeddingJobError, ModelError
from embedding.run import job, parcels, pipeline
from embedding.run.cluster import Cluster
from embedding.run.exchange import decode_units
from embedding.run.parcels import Parcel, dealt
from embedding.run.progress import OtherVoices
from embedding.run.proof.config import VerifyConfig
from embedding.run.proof.verify import verify_corpus
from embedding.run.reading import read_stage
from embedding.run.summary import Summary
from tests.run.conftest import Embed
from tests.support import corpora, outputs
from tests.support.job import LOG_LINE, run_job
from tests.support.ray_cluster import RayCluster
from tests.support.waiting import wait_until
from tests.support.watched import HOLD_SECONDS, Trace, watched_worker

TRACEBACK = """\x1b[36mray::MapWorker(MapBatches(EmbeddingWorker)).submit()\x1b[39m (pid=1, ip=127.0.0.1)
OSError: [Errno 28] No space left on device

The above exception was the direct cause of the following exception:

ray::MapWorker(MapBatches(EmbeddingWorker)).submit() (pid=1, ip=127.0.0.1)
  File "worker.py", line 6, in put
    raise StorageFullError("writing a failed") from error
embedding.errors.StorageFullError: writing a failed: no room; free some space, then run the same command again to resume

The above exception was the direct cause of the following exception:

ray::MapWorker(MapBatches(EmbeddingWorker)).submit() (pid=1, ip=127.0.0.1)
ray.exceptions.UserCodeException: UDF failed to process a data block.
Failed to apply UDF transform after 1/1 attempts (total backoff 0.0s).
"""
ROWS, UNIT_ROWS = 600, 5
UNITS = ROWS // UNIT_ROWS


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (TRACEBACK, "writing a failed: no room; free some space, then run the same command again to resume"),
        ("ray.exceptions.ActorDiedError: The actor died.\n\tclass_name: W\n", "The actor died."),
        ("The cluster is gone\n", "The cluster is gone"),
        ("", ""),
    ],
)
def test_the_reason_is_what_was_raised(text: str, reason: str) -> None:
    assert pipeline.reason_in(text) == reason


@pytest.mark.usefixtures("embed")
def test_read_tasks_begin_with_their_largest_units() -> None:
    source = Source("file:///in/a.parquet", "a.parquet", 1, "1")
    units = [make_unit(source, first, rows, "f") for first, rows in enumerate([3, 1, 7, 2, 5, 6, 4])]
    with Cluster() as cluster:
        assert cluster.nodes()
        ordered = dealt([[unit] for unit in units], 3)
        dataset = ray.data.from_items([{"rows": unit.num_rows} for [unit] in ordered], override_num_blocks=3)
        assert [ray.get(ref).column("rows").to_pylist() for ref in dataset.to_arrow_refs()] == [[7, 4, 1], [6, 3], [5, 2]]


def test_a_model_that_is_of_no_use_to_a_worker_is_the_users_to_mend() -> None:
    told = TRACEBACK.replace("StorageFullError", "ModelError")
    stopped = [pipeline._explained(RayError(text)) for text in (TRACEBACK, told)]
    assert [type(error) for error in stopped] == [EmbeddingJobError, ModelError]
    assert [error.exit_code for error in stopped] == [1, 2]


def test_a_token_that_the_cluster_does_not_have_is_told_in_one_sentence(tiny_model: Path, ray_cluster: RayCluster, tmp_path: Path) -> None:
    source = corpora.plain(rows=6, files=1).write(tmp_path / "in")
    arguments = ["--input", source, "--output", str(tmp_path / "out"), "--model", str(tiny_model), "--id-column", "id"]
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
    stopped = run_job(*arguments, env={**ray_cluster.environment(), **token}, check=1)
    last = stopped.stderr.splitlines()[-1]
    assert last.startswith("error: the run stopped: Ray dropped a worker before it started, ")
    assert last.endswith("in a new process, set RAY_AUTH_MODE=disabled and run the same command again")
    assert "Traceback" not in stopped.stderr
    assert run_job(*arguments, env=ray_cluster.environment()).summary["rows_out"] == 6


def test_a_worker_that_cannot_start_is_told_in_one_sentence(tiny_model: Path, ray_cluster: RayCluster, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    source = corpora.plain(rows=6, files=1).write(tmp_path / "in")
    arguments = ["--input", source, "--output", str(tmp_path / "out"), "--model", str(model), "--progress", "log"]

    result = run_job(*arguments, env=ray_cluster.environment(), check=2)

    assert result.summary["status"] == "crashed"
    *lines, last = result.stderr.splitlines()
    assert re.fullmatch(
        rf"error: the run stopped: a worker on \S+ cannot start: model '{model}' cannot be loaded \(.*\); check its files", last
    )
    assert [line for line in lines if not re.fullmatch(LOG_LINE, line)] == []


def test_what_libraries_print_is_logged_by_its_first_line(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("embedding"), "propagate", True)
    with caplog.at_level(logging.INFO, "embedding"), redirect_stdout(OtherVoices()):
        print("\n\x1b[36m(raylet)\x1b[0m It failed, and is tried again.\n\nTraceback\n  File\n")
        print("x" * 500)
    assert caplog.messages == ["(raylet) It failed, and is tried again.", "x" * 200 + " ..."]


def test_a_unit_is_read_while_another_is_at_the_worker(embed: Embed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stages are apart: one read waits for a worker that has begun a unit, and the worker waits for that read."""
    corpus = corpora.plain(rows=40, files=4)
    late = max(corpus.files)
    (tmp_path / "trace").mkdir()
    trace = Trace(tmp_path / "trace")

    def late_read(batch: pa.Table, **options: Any) -> pa.Table:
        [unit] = decode_units(batch)
        if unit.source.path == late:
            wait_until(lambda: trace.units("begun"), seconds=HOLD_SECONDS, what="a unit to be at the worker")
        answer = read_stage(batch, **options)
        trace.note("read", unit.source.path)
        return answer

    worker = watched_worker(trace, hold_unit=lambda trace, _node: late not in trace.units("read"))
    monkeypatch.setattr(pipeline, "read_stage", late_read)
    monkeypatch.setattr(job, "run_units", functools.partial(pipeline.run_units, worker=worker))
    summary = embed(input=corpus.write(tmp_path / "in"), output=str(tmp_path / "out"))
    assert (summary.status, summary.rows_out) == ("complete", 40)
    assert set(trace.units("read")) == set(corpus.files)


def test_small_units_that_travel_together_end_as_if_they_came_alone(embed: Embed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = corpora.plain(rows=200, files=100).files
    null, damaged = sorted(files)[33], sorted(files)[34]
    files |= {null: corpora.parquet(pa.table({"id": [1, 2], "text": ["one", None]})), damaged: b"PAR1" + bytes(20) + files[damaged][24:]}
    options: dict[str, Any] = {"input": corpora.Corpus(files, []).write(tmp_path / "in"), "bad_rows": "reject"}
    sizes: list[list[int]] = []
    summaries: list[Summary] = []

    def watched(travelling: Sequence[Parcel], *args: Any, **options: Any) -> Iterator[CommitRecord]:
        sizes.append([len(parcel) for parcel in travelling])
        return pipeline.run_units(travelling, *args, **options)

    monkeypatch.setattr(job, "run_units", watched)
    for per_worker, output in ((100, "apart"), (1, "together")):
        monkeypatch.setattr(parcels, "_PARCELS_PER_WORKER", per_worker)
        summaries.append(embed(**options, output=str(tmp_path / output)))

    assert sizes == [[1] * 100, [5] * 20]  # of two rows each, where a unit may have ten
    assert [(each.rows_out, each.rows_rejected, each.rows_failed) for each in summaries] == [(197, 1, 2)] * 2
    assert [[failure["source"] for failure in each.failures] for each in summaries] == [[f"{tmp_path.as_uri()}/in/{damaged}"]] * 2
    assert outputs.shards(str(tmp_path / "together")) == outputs.shards(str(tmp_path / "apart"))
    proof = verify_corpus(VerifyConfig.build(output=str(tmp_path / "together"), sample=50, progress="none"))
    assert (proof.shards, proof.sampled) == (99, 50)
    assert {str(finding.kind) for finding in proof.details} == {"not complete"}  # and nothing else


def test_units_that_share_a_read_task_go_on_one_by_one(embed: Embed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = corpora.plain(rows=ROWS, files=2, row_group_rows=50).write(tmp_path / "in")
    options: dict[str, Any] = {"input": source, "unit_rows": UNIT_ROWS}
    embed(**options, output=str(tmp_path / "apart"))
    shards_at_each_record: list[int] = []

    def watched(*args: Any, **options: Any) -> Iterator[CommitRecord]:
        for record in pipeline.run_units(*args, **options):
            shards_at_each_record.append(len(outputs.versions(str(tmp_path / "shared"))))
            yield record

    monkeypatch.setattr(job, "run_units", watched)
    monkeypatch.setattr(pipeline, "_READ_TASKS", 2)
    block_bytes = ray.data.DataContext.get_current().target_max_block_size

    embed(**options, output=str(tmp_path / "shared"))

    assert len(shards_at_each_record) == UNITS
    assert shards_at_each_record[0] < UNITS // 2  # of the first read task, which would go on as one block
    assert outputs.shards(str(tmp_path / "shared")) == outputs.shards(str(tmp_path / "apart"))
    assert ray.data.DataContext.get_current().target_max_block_size == block_bytes
