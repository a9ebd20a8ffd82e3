"""How units travel through Ray Data: alone, at once, and as few Ray tasks as a large corpus needs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray.data

from embedding.corpus.ledger import CommitRecord
from embedding.run import job, pipeline
from tests.run.conftest import Embed
from tests.support import corpora, outputs

TRACEBACK = """\x1b[36mray::MapWorker(MapBatches(EmbeddingWorker)).submit()\x1b[39m (pid=1, ip=127.0.0.1)
OSError: [Errno 28] No space left on device

The above exception was the direct cause of the following exception:

ray::MapWorker(MapBatches(EmbeddingWorker)).submit() (pid=1, ip=127.0.0.1)
  File "worker.py", line 6, in put
    raise StorageFullError("writing a failed") from error
embedding.errors.StorageFullError: writing a failed: no room; make room, then run the same command again to go on

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
        (TRACEBACK, "writing a failed: no room; make room, then run the same command again to go on"),
        ("ray.exceptions.ActorDiedError: The actor died.\n\tclass_name: W\n", "The actor died."),
        ("The cluster is gone\n", "The cluster is gone"),
        ("", ""),
    ],
)
def test_the_reason_is_what_was_raised(text: str, reason: str) -> None:
    assert pipeline.reason_in(text) == reason


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
