"""A cluster of unlike nodes, of which some join late, start slowly or are lost: a head without CPUs, one node of CPUs, and GPU nodes.

There is no GPU: Ray takes anybody's word for the number, and the workers here run their model on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch

from embedding import JobConfig, Summary, embed_corpus
from embedding.corpus.ledger import CommitRecord
from embedding.run import job, pipeline
from embedding.run.parcels import Parcel
from embedding.run.placement import Placement
from embedding.run.worker import UNITS_IN_HAND, EmbeddingWorker, WorkerJob
from tests.run.here import embed_here
from tests.support import corpora, outputs
from tests.support.ray_cluster import RayNodes, ray_nodes
from tests.support.watched import Trace, watched_read, watched_worker

ROWS, UNIT_ROWS = 200, 5
UNITS = ROWS // UNIT_ROWS
OPTIONS: dict[str, Any] = {"id_column": "id", "unit_rows": UNIT_ROWS, "precision": "fp32", "batch_tokens": 2048, "normalize": "yes"}
OnRecord: TypeAlias = Callable[[list[CommitRecord]], None]


@dataclass(frozen=True)
class Place:
    """The cluster, and the ids of its nodes by kind."""

    nodes: RayNodes
    cpu: str

    def gpus(self, count: int) -> list[str]:
        """Let there be that many GPU nodes at least; their ids."""
        while len(self.nodes.raylets) < 1 + count:
            self.nodes.add_node(num_cpus=1, num_gpus=1)
        return [self.nodes.ids[raylet] for raylet in self.nodes.raylets[1:]]


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    with ray_nodes(1, 2) as nodes:
        yield Place(nodes, nodes.ids[nodes.raylets[0]])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return corpora.plain(rows=ROWS, files=4, row_group_rows=20).write(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def undisturbed(source: str, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The shards as one process makes them."""
    output, threads = str(tmp_path_factory.mktemp("undisturbed")), torch.get_num_threads()
    torch.set_num_threads(1)  # as the workers have
    embed_here(source, output, tiny_model, **OPTIONS)
    torch.set_num_threads(threads)
    return outputs.shards(output)


Embed: TypeAlias = Callable[..., tuple[str, Summary, list[CommitRecord]]]


@pytest.fixture
def trace(tmp_path: Path) -> Trace:
    (tmp_path / "trace").mkdir()
    return Trace(tmp_path / "trace")


@pytest.fixture
def embed(place: Place, trace: Trace, source: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Embed:
    """`embed(worker, on_record, **options)`: the job in this process; its output, summary and records in the order they came."""
    for name, value in place.nodes.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(pipeline, "read_stage", watched_read(trace))

    def run(worker: type[EmbeddingWorker], on_record: OnRecord = lambda _: None, **options: Any) -> tuple[str, Summary, list[CommitRecord]]:
        records: list[CommitRecord] = []

        def watched(parcels: Sequence[Parcel], told: WorkerJob, placement: Placement, **options: Any) -> Iterator[CommitRecord]:
            for record in pipeline.run_units(parcels, told, placement, worker, **options):
                records.append(record)
                yield record
                on_record(records)

        monkeypatch.setattr(job, "run_units", watched)
        output = str(tmp_path / "out")
        fixed = {**OPTIONS, "model": str(tiny_model), "progress": "none", "report": "no"}
        return output, embed_corpus(JobConfig.build(input=(source,), output=output, **fixed, **options)), records

    return run


def test_a_pool_grows_when_a_node_joins_and_loses_only_what_was_in_hand_with_one(
    place: Place, trace: Trace, embed: Embed, undisturbed: dict[str, bytes]
) -> None:
    [first] = place.gpus(1)
    before: dict[str, tuple[str, ...]] = {}
    lost: set[str] = set()

    def hold(trace: Trace, node: str) -> bool:
        """The first node stops with units in its hands as soon as it has done three."""
        return node == first and len(trace.units("done", node)) >= 3

    def happen(records: list[CommitRecord]) -> None:
        if len(records) == 3:
            place.gpus(2)
        if len({record.worker for record in records}) == 2 and not lost:
            before.update(outputs.versions(output))
            place.nodes.lose_node(place.nodes.raylets[1])
            lost.update(trace.units("begun", first) - trace.units("done", first))

    output = str(trace.folder.with_name("out"))
    _, summary, records = embed(watched_worker(trace, hold_unit=hold), happen, workers="1:3")

    [second] = place.gpus(1)
    assert (summary.status, summary.rows_out, summary.units_done) == ("complete", ROWS, UNITS)
    assert [record.worker for record in records[:3]] == [first] * 3
    assert {record.worker for record in records} == {first, second}
    assert trace.nodes("begun") == {first, second}
    assert 0 < len(lost) <= UNITS_IN_HAND["cuda"]
    assert {unit for unit, count in trace.units("begun").items() if count > 1} == lost
    assert set(trace.units("done").values()) == {1}
    assert before.items() <= outputs.versions(output).items()
    assert outputs.shards(output) == undisturbed


def test_each_stage_runs_where_it_belongs_and_a_slow_start_stalls_nobody(
    place: Place, trace: Trace, embed: Embed, undisturbed: dict[str, bytes]
) -> None:
    slow, *_ = gpus = place.gpus(2)
    release = trace.folder.with_name("release")

    def hold_load(_trace: Trace, node: str) -> bool:
        return node == slow and not release.exists()

    def hold_unit(trace: Trace, node: str) -> bool:
        """The quick ones leave some units to the slow one."""
        return node != slow and len(trace.units("done")) >= 3 * UNITS // 4 and not trace.units("begun", slow)

    def happen(records: list[CommitRecord]) -> None:
        if len(records) == UNITS // 2:
            release.touch()

    output, summary, records = embed(watched_worker(trace, hold_load=hold_load, hold_unit=hold_unit), happen)

    assert summary.status == "complete"
    assert slow not in {record.worker for record in records[: UNITS // 2]}
    assert {record.worker for record in records} == trace.nodes("loading") == set(gpus)
    assert len(trace.units("read")) == UNITS
    assert place.cpu in trace.nodes("read") <= {place.cpu, *gpus}  # and not the head
    assert outputs.shards(output) == undisturbed
