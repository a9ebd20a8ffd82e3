"""Whatever dies, the finished output is byte for byte that of an undisturbed run, and no reader ever sees a partial file.

This is the short form; `make chaos` raises longer storms.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedding.corpus.shard import shard_table
from embedding.corpus.shards.parquet import PARQUET
from tests.chaos.onlooker import fault_of
from tests.chaos.plan import Moment, Victim, moment_of, short_storm, storm
from tests.chaos.scene import scene
from tests.chaos.storms import SHORT_UNITS, UNITS, tables, undisturbed_seconds, weather
from tests.chaos.verdict import Files, differences
from tests.model.tiny import save_model
from tests.support.faulty_proxy import When


@pytest.mark.timeout(900)
def test_a_short_storm(tmp_path: Path) -> None:
    plan = short_storm(1, SHORT_UNITS)
    with scene(save_model(tmp_path, "bert"), SHORT_UNITS) as place:
        found = weather(place, plan, 1, undisturbed_seconds(place))
    assert found["differences"] == []
    assert found["partial files seen"] == []
    assert found["files looked at"] >= SHORT_UNITS
    assert found["blows"] == [str(strike) for strike in plan]
    assert found["exit codes"].count(137) == 3
    assert "| yes |" in tables([found])


def test_a_short_storm_knows_every_victim_and_moment() -> None:
    plan = short_storm(1, SHORT_UNITS)
    assert {strike.victim for strike in plan} == set(get_args(Victim))
    assert {strike.moment for strike in plan} >= set(get_args(Moment)) - {"after the rejected rows", "after _SUCCESS"}


@pytest.mark.parametrize("seed", range(20))
def test_a_storm_is_long_and_the_same_for_its_seed(seed: int) -> None:
    plan = storm(seed, UNITS)
    assert plan == storm(seed, UNITS) != storm(seed + 1, UNITS)
    assert sum(strike.victim != "suspended store" for strike in plan) >= 25
    assert {strike.victim for strike in plan} == set(get_args(Victim))
    assert {strike.moment for strike in plan} == set(get_args(Moment))
    shards = [strike.after_shards for strike in plan]
    assert shards == sorted(shards)
    readers = [number for number, strike in enumerate(plan) if strike.victim == "reader"]
    assert all(plan[number - 1].victim == "driver" for number in readers)


@pytest.mark.parametrize(
    ("when", "method", "path", "moment"),
    [
        ("before", "PUT", "/b/out/data/date=1/a.parquet?x-id=PutObject", "before the put"),
        ("after", "PUT", "/b/out/data/a.parquet", "after the put"),
        ("before", "GET", "/b/out/data/a.parquet", None),
        ("after", "PUT", "/b/out/_control/rejected/a.parquet", "after the rejected rows"),
        ("before", "PUT", "/b/out/_control/rejected/a.parquet", None),
        ("before", "PUT", "/b/out/_control/records/a.parquet", "before the ledger append"),
        ("before", "PUT", "/b/out/_control/manifest.parquet", "before the manifest"),
        ("after", "PUT", "/b/out/_control/manifest.parquet", None),
        ("before", "PUT", "/b/out/_SUCCESS", "before _SUCCESS"),
        ("after", "PUT", "/b/out/_SUCCESS", "after _SUCCESS"),
        ("before", "DELETE", "/b/out/_SUCCESS", None),
        ("before", "PUT", "/b/output/data/a.parquet", None),
        ("after", "GET", "/b/corpus/a.parquet", "during a read"),
    ],
)
def test_moments_are_told_by_requests(when: When, method: str, path: str, moment: Moment | None) -> None:
    assert moment_of(when, method, path, "b/out", "b/corpus") == moment


def shard(ids: list[int], rejected: int = 0) -> bytes:
    table = shard_table(pa.table({"id": ids}), np.ones((len(ids), 4), np.float32), {})
    return PARQUET.encode(table, {"unit": {"num_rows": len(ids) + rejected}, "record": {"rejected": rejected}, "provenance": {}})


def parquet(**columns: list[object]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue()


def test_the_onlooker_sees_a_partial_file() -> None:
    whole = shard([1, 2, 3], rejected=1)
    assert fault_of(whole) == ""
    for data in (b"", whole[: len(whole) // 2], whole[:-1], parquet(id=[1, 2, 3])):
        assert fault_of(data)
    table = shard_table(pa.table({"id": [1]}), np.ones((1, 4), np.float32), {})
    lying = PARQUET.encode(table, {"unit": {"num_rows": 3}, "record": {"rejected": 1}, "provenance": {}})
    assert fault_of(lying) == "1 rows, but its footer says 2"


CALM = {
    "data/a.parquet": shard([0, 1], rejected=1),
    "data/b.parquet": shard([3, 4]),
    "_control/rejected/a.parquet": parquet(id=["2"], reason=["no text"]),
    "_control/manifest.parquet": b"manifest",
    "_SUCCESS": b"",
    "_control/records/run.parquet": b"as it came",
}
IN_A_SHARD = "row {row} is {times} times in a shard, not 1 times"
ROWS = [{"id": number, "text": None if number == 2 else "text"} for number in range(5)]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda files: {**files, "_control/records/run.parquet": b"otherwise"}, []),
        (lambda files: {**files, "data/b.parquet": shard([3])}, ["data/b.parquet is another", IN_A_SHARD.format(row=4, times=0)]),
        (lambda files: {**files, "data/c.parquet": shard([4])}, ["data/c.parquet is surplus", IN_A_SHARD.format(row=4, times=2)]),
        (
            lambda files: {**files, "data/a.parquet": b"half"},
            ["data/a.parquet is another", IN_A_SHARD.format(row=0, times=0), IN_A_SHARD.format(row=1, times=0)],
        ),
        (lambda files: {k: v for k, v in files.items() if k != "_SUCCESS"}, ["_SUCCESS is missing"]),
        (lambda files: {**files, "_control/manifest.parquet": b""}, ["_control/manifest.parquet is another"]),
        (lambda files: {**files, "_control/tmp/x": b""}, ["_control/tmp/x is left"]),
        (
            lambda files: {**files, "_control/rejected/a.parquet": parquet(id=["2"], reason=[""])},
            ["_control/rejected/a.parquet is another", "row 2 is 0 times listed as rejected, not 1 times"],
        ),
    ],
)  # fmt: skip
def test_the_verdict_names_every_difference(spoil: Callable[[Files], Files], said: list[str]) -> None:
    assert differences(spoil(CALM), CALM, ROWS) == said
