"""What becomes of one unit, without Ray: the worker is called as the pipeline calls it."""

from __future__ import annotations

import io
import itertools
import json
import os
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file, save_file

from embedding import JobConfig
from embedding.corpus.ledger import CommitRecord, records_from_table
from embedding.corpus.lengths import length_counts
from embedding.corpus.plan import Unit, plan_units
from embedding.corpus.reader import Columns, read_layouts
from embedding.corpus.shards.lance import LANCE
from embedding.corpus.shards.library import library
from embedding.corpus.shards.parquet import PARQUET
from embedding.corpus.sources import list_sources
from embedding.errors import ConfigError
from embedding.model import windows
from embedding.model.embedder import Embedder
from embedding.model.spec import resolve_model
from embedding.model.tokenizer import TokenizedTexts
from embedding.run.attempts import AttemptCounter
from embedding.run.exchange import encode_units, rows_in
from embedding.run.reading import read_stage
from embedding.run.worker import EmbeddingWorker, WorkerJob, _DeviceTime, _Turns
from tests.model.tiny import save_model
from tests.support import corpora, outputs

COLUMNS = Columns("text", ("id",))


def job_of(model: Path, output: str, **options: Any) -> WorkerJob:
    spec = resolve_model(JobConfig(input=("x",), output="x", model=str(model)), precision="fp32")
    job = WorkerJob(
        model=spec,
        output=output,
        batch_tokens=256,
        columns=COLUMNS,
        has_id=True,
        token_columns=False,
        provenance={"fingerprint": "f"},
        max_unit_attempts=3,
        device="cpu",
        threads=None,
    )
    return replace(job, **options)


def worker_on(model: Path, output: str, attempts: AttemptCounter, **options: Any) -> EmbeddingWorker:
    return EmbeddingWorker(job_of(model, output, **options), attempts)


def unit_of(folder: Path, texts: list[str | None]) -> Unit:
    corpora.Corpus({"a.parquet": corpora.parquet(pa.table({"id": range(len(texts)), "text": pa.array(texts, pa.string())}))}, []).write(
        folder
    )
    [unit] = plan_units(read_layouts(list_sources([str(folder)]), COLUMNS), unit_rows=100, fingerprint="f")
    return unit


def process(worker: EmbeddingWorker, unit: Unit, attempts: AttemptCounter) -> CommitRecord:
    batch = read_stage(pa.Table.from_pylist([encode_units([unit])]), COLUMNS, attempts, 3)
    [record] = records_from_table(rows_in(worker(batch)))
    return record


def test_a_unit_becomes_a_shard_and_a_record(tiny_model: Path, tmp_path: Path) -> None:
    attempts, output = AttemptCounter(), str(tmp_path / "out")
    unit = unit_of(tmp_path / "in", ["one two", None, "three"])
    record = process(worker_on(tiny_model, output, attempts, token_columns=True), unit, attempts)
    assert (record.rows, record.rejected, record.error) == (3, 1, "")
    assert list(outputs.shards(output)) == [unit.shard]
    rows = outputs.table(output)
    assert rows["id"].to_pylist() == [0, 2]
    assert rows["truncated"].to_pylist() == [False, False]
    assert sum(rows["num_tokens"].to_pylist()) == record.tokens
    assert record.lengths == length_counts(rows["num_tokens"].to_numpy())
    assert PARQUET.facts(io.BytesIO(outputs.shards(output)[unit.shard]))["record"]["lengths"] == record.lengths
    assert record.bytes == len(outputs.shards(output)[unit.shard])
    assert (attempts.begun(unit.id), attempts.unsettled()) == (1, 1)  # until the driver has the record


class Ended(BaseException):
    """Where the process would have ended."""


def test_a_process_whose_gpu_is_lost_ends_and_takes_no_more_units_along(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def ended(code: int) -> None:
        raise Ended(code)

    attempts = AttemptCounter()
    unit, worker = unit_of(tmp_path / "in", ["one"]), worker_on(tiny_model, str(tmp_path / "out"), attempts)
    assert not worker._embedder.has_lost_its_device()
    worker._embedder._device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    monkeypatch.setattr(Embedder, "submit", lost)
    monkeypatch.setattr(os, "_exit", ended)
    with pytest.raises(Ended, match="1"):
        process(worker, unit, attempts)
    assert (attempts.begun(unit.id), attempts.reason(unit.id)) == (1, "RuntimeError: CUDA error: an illegal memory access was encountered")


def test_a_machine_without_lance_says_so_before_it_takes_a_unit(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = pickle.loads(pickle.dumps(job_of(tiny_model, str(tmp_path), shards=LANCE)))
    library.cache_clear()
    monkeypatch.setitem(sys.modules, "lance", None)
    with pytest.raises(ConfigError, match=r"^--output-format=lance needs pylance, which writes such files and is not installed here; pip"):
        EmbeddingWorker(job, AttemptCounter())


def test_a_unit_of_rejected_rows_only_is_committed_empty(tiny_model: Path, tmp_path: Path) -> None:
    attempts, output = AttemptCounter(), str(tmp_path / "out")
    record = process(worker_on(tiny_model, output, attempts), unit_of(tmp_path / "in", [None, None]), attempts)
    assert (record.rows, record.rejected, record.error) == (2, 2, "")
    assert outputs.table(output).num_rows == 0
    assert outputs.control(output, "rejected")["reason"].to_pylist() == ["text is null", "text is null"]


def test_equal_rows_are_counted_and_share_a_vector(tiny_model: Path, tmp_path: Path) -> None:
    attempts, output = AttemptCounter(), str(tmp_path / "out")
    unit = unit_of(tmp_path / "in", ["one", "two", None, "one", "one"])
    record = process(worker_on(tiny_model, output, attempts), unit, attempts)
    assert (record.rows, record.rejected, record.duplicates) == (5, 1, 2)
    first, other, *equals = outputs.table(output)["embedding"].to_pylist()
    assert equals == [first, first] != [other, other]


def test_long_texts_are_counted_as_truncated(tiny_model: Path, tmp_path: Path) -> None:
    attempts, output = AttemptCounter(), str(tmp_path / "out")
    unit = unit_of(tmp_path / "in", ["word " * 500, "short"])
    record = process(worker_on(tiny_model, output, attempts, token_columns=True), unit, attempts)
    assert record.truncated == 1
    assert outputs.table(output)["truncated"].to_pylist() == [True, False]


def test_a_vector_that_is_not_finite_is_rejected_alone(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "bert")
    weights = load_file(model / "model.safetensors")
    vocabulary = json.loads((model / "tokenizer.json").read_text())["model"]["vocab"]
    weights["embeddings.word_embeddings.weight"][vocabulary["z"]] = torch.nan
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    attempts, output = AttemptCounter(), str(tmp_path / "out")
    record = process(worker_on(model, output, attempts), unit_of(tmp_path / "in", ["one", "z", "three"]), attempts)
    assert (record.rejected, record.error) == (1, "")
    assert outputs.table(output)["id"].to_pylist() == [0, 2]
    [rejected] = outputs.control(output, "rejected").to_pylist()
    assert (rejected["row_index"], rejected["id"], rejected["reason"]) == (1, "1", "the model gives a non-finite vector")


def test_a_unit_that_keeps_failing_is_set_aside(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "data").write_text("a file where a folder must be")
    attempts = AttemptCounter()
    record = process(worker_on(tiny_model, str(tmp_path / "out"), attempts), unit_of(tmp_path / "in", ["one"]), attempts)
    assert "set aside after 3 attempts" in record.error
    assert "data" in record.error


def died(attempts: AttemptCounter, key: str) -> None:
    """Three tries that nobody told the end of."""
    for _ in range(3):
        attempts.begin(key)


def test_a_unit_whose_process_died_is_tried_again_but_not_for_ever(tiny_model: Path, tmp_path: Path) -> None:
    attempts, output = AttemptCounter(), str(tmp_path / "out")
    unit = unit_of(tmp_path / "in", ["one"])
    worker = worker_on(tiny_model, output, attempts)
    died(attempts, unit.id)
    assert "its worker process died each time (set aside after 3 attempts)" in process(worker, unit, attempts).error
    assert outputs.shards(output) == {}
    died(attempts, f"read {unit.id}")
    assert "its reader died 3 times" in process(worker, unit, attempts).error


def test_a_unit_that_failed_keeps_its_reason_where_a_neighbour_then_ends_the_process(tiny_model: Path, tmp_path: Path) -> None:
    attempts, output = AttemptCounter(), str(tmp_path / "out")
    unit = unit_of(tmp_path / "in", ["one"])
    died(attempts, unit.id)
    attempts.fail(unit.id, "RuntimeError: the encoder broke")
    record = process(worker_on(tiny_model, output, attempts), unit, attempts)
    assert record.error == "RuntimeError: the encoder broke (set aside after 3 attempts)"
    attempts.settle(unit.id)
    assert (attempts.begun(unit.id), attempts.reason(unit.id)) == (0, "")


def test_a_unit_that_was_committed_in_its_last_try_is_done_though_its_process_died(tiny_model: Path, tmp_path: Path) -> None:
    attempts, output = AttemptCounter(), str(tmp_path / "out")
    unit = unit_of(tmp_path / "in", ["one"])
    worker = worker_on(tiny_model, output, attempts)
    process(worker, unit, attempts)
    died(attempts, unit.id)
    assert (process(worker, unit, attempts).error, list(outputs.shards(output))) == ("", [unit.shard])


def test_a_unit_that_was_tried_before_is_tried_alone() -> None:
    turns, order = _Turns(), list[str]()
    inside, leave = threading.Barrier(3), threading.Event()

    def work(name: str, *, alone: bool) -> None:
        with turns.take(alone=alone):
            order.append(name)
            if not alone:
                inside.wait(30)
                leave.wait(30)
                order.append(f"{name} ends")

    together = [threading.Thread(target=work, args=(name,), kwargs={"alone": False}) for name in ("one", "two")]
    for thread in together:
        thread.start()
    inside.wait(30)  # both are at work at once
    suspect = threading.Thread(target=work, args=("suspect",), kwargs={"alone": True})
    suspect.start()
    leave.set()
    for thread in (*together, suspect):
        thread.join(30)
    assert sorted(order[:2]) == ["one", "two"]
    assert sorted(order[2:4]) == ["one ends", "two ends"]
    assert order[4:] == ["suspect"]


def test_the_devices_time_is_shared_out_once() -> None:
    device = _DeviceTime()
    assert device.use(ready=1.0, done=4.0) == 1.0
    assert device.use(ready=2.0, done=7.0) == 4.0  # it waited behind the first
    assert device.use(ready=9.0, done=10.0) == 9.0  # nothing was before it
    assert device.use(ready=8.0, done=9.5) == 9.5  # it was done before one that was queued earlier


def test_the_parts_of_a_unit_are_not_mixed_with_those_of_another(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else both units would be done at the end of the second, and the device would idle while both are written."""
    monkeypatch.setattr(windows, "_PART_TOKENS", 100)
    attempts, output = AttemptCounter(), str(tmp_path / "out")
    units = [unit_of(tmp_path / name, [f"{name} {number} " * 8 for number in range(60)]) for name in ("one", "two")]
    worker = worker_on(tiny_model, output, attempts)
    order, submit = [], worker._embedder.submit

    def watched(tokens: TokenizedTexts, batch_tokens: int) -> Any:
        order.append(threading.get_ident())
        return submit(tokens, batch_tokens)

    monkeypatch.setattr(worker._embedder, "submit", watched)
    with ThreadPoolExecutor(2) as pool:
        assert [record.error for record in pool.map(lambda unit: process(worker, unit, attempts), units)] == ["", ""]
    assert len(order) > 10
    assert len(list(itertools.groupby(order))) == 2


def test_bad_rows_fail_their_unit_at_once_if_asked(tiny_model: Path, tmp_path: Path) -> None:
    attempts, output = AttemptCounter(), str(tmp_path / "out")
    worker = worker_on(tiny_model, output, attempts)
    worker._job = replace(worker._job, fails_on_bad_rows=True)
    assert process(worker, unit_of(tmp_path / "good", ["one", ""]), attempts).error == ""
    unit = unit_of(tmp_path / "bad", ["one", None])
    record = process(worker, unit, attempts)
    assert record.error.startswith("1 row cannot be embedded, the first being row 1: text is null; correct the source")
    assert attempts.begun(unit.id) == 1
    assert len(outputs.shards(output)) == 1


def test_a_unit_that_was_put_before_its_process_died_is_not_put_again(tiny_model: Path, tmp_path: Path) -> None:
    attempts, output = AttemptCounter(), str(tmp_path / "out")
    unit = unit_of(tmp_path / "in", ["one", None])
    worker = worker_on(tiny_model, output, attempts)
    first = process(worker, unit, attempts)
    before = outputs.versions(output)
    again = process(worker, unit, attempts)
    assert outputs.versions(output) == before
    assert (again.rows, again.rejected, again.tokens, again.error) == (first.rows, first.rejected, first.tokens, "")


@pytest.mark.parametrize("change", ["replace", "remove"])
def test_units_of_an_old_listing_never_mix_with_new_bytes(change: str, tiny_model: Path, tmp_path: Path) -> None:
    attempts, output = AttemptCounter(), str(tmp_path / "out")
    unit = unit_of(tmp_path / "in", ["one", "two"])
    if change == "replace":
        unit_of(tmp_path / "in", ["two", "one"])
    else:
        (tmp_path / "in" / "a.parquet").unlink()
    record = process(worker_on(tiny_model, output, attempts), unit, attempts)
    assert "a.parquet" in record.error
    assert outputs.shards(output) == {}


@pytest.mark.parametrize(
    ("modules", "needed"),
    [
        ("embedding.run.reading, embedding.run.checker, embedding.run.remote_attempts", set[str]()),
        ("embedding.run.pipeline, embedding.run.worker", set[str]()),
        ("embedding.run.job", {"pydantic"}),
    ],
)
def test_a_process_loads_what_it_needs(modules: str, needed: set[str]) -> None:
    """The others take seconds and hundreds of MB: they come with a worker's model, an option, a store or the hub."""
    heavy = {"torch", "transformers", "pydantic", "aiobotocore", "huggingface_hub"}
    asked = f"import sys, ray.data, {modules}; print(*sorted(sys.modules.keys() & {heavy}))"
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == needed
