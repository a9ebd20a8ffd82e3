"""The recipes of docs/recipes.md, to the letter: each is run on the vectors of a real job, and what it finds is checked by numpy."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from docs.tables import README
from tests.support import outputs
from tests.support.job import JobResult, run_job
from tests.support.pages import commands, sections
from tests.support.postgres import postgres
from tests.support.ray_cluster import RayCluster

PAGE = README.parent / "docs" / "recipes.md"
RECIPES = sections(PAGE)
FIRST, NIGHTLY = "Begin here", "Run every night"
COPIES = 5
NEAR = 0.95

Names: TypeAlias = dict[str, Any]
"""What the code of a recipe leaves behind."""


@dataclass(frozen=True)
class Night:
    """What one night left behind."""

    run: JobResult
    shards: dict[str, tuple[str, ...]]
    held: set[str]
    """Units that the index held before."""
    rows: list[dict[str, Any]]
    """Ids and units in the index after."""


@dataclass(frozen=True)
class Kitchen:
    """The folder of all recipes, after two nights."""

    nights: tuple[Night, Night]
    copies: set[tuple[str, str]]
    """Rows of which the second night brought a slightly longer copy: both ids."""
    ids: list[str]
    vectors: NDArray[np.float32]


def slug(heading: str) -> str:
    return re.sub(r"\W", "_", heading.lower())


def run(heading: str, names: Names) -> Names:
    for block in RECIPES[heading]:
        if block.language == "python":
            exec(compile(block.text, str(block), "exec"), names)
    return names


@pytest.fixture(scope="module")
def kitchen(demo_corpus: Path, ray_cluster: RayCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kitchen]:
    """Two nights with a changed corpus between them: a file loses a row, a file comes, a file stays."""
    folder = tmp_path_factory.mktemp("recipes")
    (folder / "corpus").mkdir()
    rows = ds.dataset(demo_corpus).to_table()
    first, rest = rows.slice(0, 100), rows.slice(100)
    second = rest.filter(pc.is_in(rest["module"], pa.array(["datetime", "_pydatetime"])))  # where they lie is up to Python's version
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, value in ray_cluster.environment().items():
            patch.setenv(name, value)
        pq.write_table(first, "corpus/a.parquet")
        pq.write_table(second, "corpus/b.parquet")
        before = night()
        kept = first.slice(0, 99)
        longest = kept.take(pc.sort_indices(pc.utf8_length(kept["text"]), sort_keys=[("", "descending")])[:COPIES])
        copies = {name: f"copy of {name}" for name in longest["id"].to_pylist()}
        texts = pa.array([f"Note: {text}" for text in longest["text"].to_pylist()])
        pq.write_table(kept, "corpus/a.parquet")
        pq.write_table(pa.table({"id": list(copies.values()), "text": texts, "module": longest["module"]}), "corpus/c.parquet")
        nights = before, night()
        found = outputs.table("vectors").combine_chunks()
        vectors = found["embedding"].chunk(0).flatten().to_numpy().reshape(found.num_rows, -1)
        yield Kitchen(nights, set(copies.items()), found["id"].to_pylist(), vectors)


def night() -> Night:
    [words] = [words for block in RECIPES[NIGHTLY] if block.language == "bash" for words in commands(block)]
    assert words[:2] == ["python", "jobs/embed_corpus.py"]
    result = run_job(*words[2:])
    names = run(NIGHTLY, {})
    return Night(result, outputs.versions("vectors"), names["held"], names["table"].to_arrow().select(["id", "unit"]).to_pylist())


@pytest.fixture(scope="module")
def begun(kitchen: Kitchen) -> Names:
    del kitchen
    return run(FIRST, {})


@pytest.fixture
def recipe(request: pytest.FixtureRequest, begun: Names) -> Callable[[], Names]:
    """Runs the recipe that the test is named after."""
    [heading] = [heading for heading in RECIPES if f"test_{slug(heading)}" == request.node.name]
    return lambda: run(heading, begun.copy())


@pytest.fixture
def best(kitchen: Kitchen, begun: Names) -> dict[str, float]:
    """Ids and cosines of the five rows nearest to the question, in order, by numpy."""
    cosines = kitchen.vectors @ begun["question"]
    return {kitchen.ids[row]: float(cosines[row]) for row in np.argsort(-cosines, kind="stable")[:5]}


def test_every_recipe_has_its_test() -> None:
    assert [heading for heading, blocks in RECIPES.items() if blocks and f"test_{slug(heading)}" not in globals()] == []


def test_begin_here(kitchen: Kitchen, begun: Names) -> None:
    found = list(begun["batches"](rows=10))
    assert [name for ids, _ in found for name in ids.to_pylist()] == kitchen.ids
    np.testing.assert_array_equal(np.concatenate([vectors for _, vectors in found]), kitchen.vectors)
    assert max(len(vectors) for _, vectors in found) == 10
    assert not any(vectors.flags.owndata or vectors.flags.writeable for _, vectors in found)  # seen in Arrow's memory, not copied
    np.testing.assert_allclose(np.linalg.norm([begun["question"], kitchen.vectors[0]], axis=1), 1, atol=1e-6)


def test_search_with_faiss(recipe: Callable[[], Names], best: dict[str, float]) -> None:
    names = recipe()
    assert names["nearest"] == list(best)
    np.testing.assert_allclose(names["scores"][0], list(best.values()), atol=1e-6)


def test_search_with_duckdb(recipe: Callable[[], Names], best: dict[str, float]) -> None:
    assert dict(recipe()["nearest"]) == pytest.approx(best, abs=1e-6)


def test_shortlist_and_rescore(recipe: Callable[[], Names], kitchen: Kitchen, begun: Names, best: dict[str, float]) -> None:
    """The best by numpy, with the cosines that they have in float32, but for half a step a number."""
    [words] = [words for block in RECIPES["Shortlist and rescore"] if block.language == "bash" for words in commands(block)]
    assert run_job(*words[2:]).summary["rows_out"] == len(kitchen.ids)
    names = recipe()
    found, steps = dict(names["nearest"]), names["steps"]["embedding"]
    assert next(iter(found)) == next(iter(best))
    assert set(found) == set(best)
    assert found == pytest.approx(best, abs=0.01)
    assert (steps.dtype, steps.flags.owndata) == (np.int8, False)
    low, high = np.array(names["ranges"]["embedding"], np.float32)
    np.testing.assert_allclose(
        names["scores"]("embedding", steps), (low + (steps + 128.5) * (high - low) / 255) @ begun["question"], atol=1e-5
    )


def test_load_into_lancedb(recipe: Callable[[], Names], best: dict[str, float], kitchen: Kitchen) -> None:
    names = recipe()
    assert names["table"].count_rows() == len(kitchen.ids)
    found = names["nearest"].to_pydict()
    assert dict(zip(found["id"], found["_distance"], strict=True)) == pytest.approx({name: 1 - best[name] for name in best}, abs=1e-6)


def test_write_a_lance_dataset(recipe: Callable[[], Names], best: dict[str, float], kitchen: Kitchen) -> None:
    """Of so few rows all lists are looked into, and the answer is exact."""
    [words] = [words for block in RECIPES["Write a Lance dataset"] if block.language == "bash" for words in commands(block)]
    assert run_job(*words[2:]).summary["rows_out"] == len(kitchen.ids)
    names = recipe()
    table, found = names["table"], names["nearest"].to_pydict()
    assert names["same"].select(["id", "_distance"]).to_pydict() == found
    assert [index.index_type for index in table.describe_indices()] == ["IVF_FLAT"]
    assert 1 < names["lists"] <= names["search"]["nprobes"]
    assert found["id"] == list(best)
    assert found["_distance"] == pytest.approx([1 - cosine for cosine in best.values()], abs=1e-6)
    held = table.to_table(columns=["id", "embedding"], scan_in_order=True).combine_chunks()
    assert held["id"].to_pylist() == kitchen.ids
    np.testing.assert_array_equal(held["embedding"].chunk(0).flatten().to_numpy().reshape(kitchen.vectors.shape), kitchen.vectors)
    assert not table.schema.metadata  # the first shard's footer would stand for all of them


def test_load_into_qdrant(recipe: Callable[[], Names], best: dict[str, float], kitchen: Kitchen) -> None:
    names = recipe()
    assert names["client"].count("vectors").count == len(kitchen.ids)
    assert {point.payload["id"]: point.score for point in names["nearest"]} == pytest.approx(best, abs=1e-6)
    names["client"].close()


def test_copy_into_postgresql(
    recipe: Callable[[], Names], best: dict[str, float], kitchen: Kitchen, monkeypatch: pytest.MonkeyPatch
) -> None:
    with postgres() as variables:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        names = recipe()
        with names["psycopg"].connect() as connection:
            names["register_vector"](connection)
            stored = dict(connection.execute("SELECT id, embedding FROM vectors").fetchall())
    assert [name for (name,) in names["nearest"]] == list(best)
    assert stored.keys() == set(kitchen.ids)
    np.testing.assert_array_equal([stored[name].to_numpy() for name in kitchen.ids], kitchen.vectors)


def test_find_near_duplicates(recipe: Callable[[], Names], kitchen: Kitchen) -> None:
    found = recipe()["duplicates"].to_pydict()
    pairs = list(zip(found["id"], found["duplicate"], strict=True))
    row = {name: number for number, name in enumerate(kitchen.ids)}
    cosines = kitchen.vectors @ kitchen.vectors.T
    assert kitchen.copies <= set(pairs)
    assert len(set(pairs)) == len(pairs)
    assert all(row[left] < row[right] for left, right in pairs)
    assert min(cosines[row[left], row[right]] for left, right in pairs) >= NEAR - 1e-6


def test_join_back_to_the_source_by_id(recipe: Callable[[], Names], kitchen: Kitchen) -> None:
    recipe()
    joined = pq.read_table("joined.parquet").to_pydict()
    assert len(joined["id"]) == len(kitchen.ids)
    texts = {row["id"]: row["text"] for row in ds.dataset("corpus").to_table().to_pylist()}
    vectors = dict(zip(kitchen.ids, kitchen.vectors, strict=True))
    assert dict(zip(joined["id"], joined["text"], strict=True)) == texts
    np.testing.assert_array_equal(joined["embedding"], [vectors[name] for name in joined["id"]])


def test_read_with_polars(recipe: Callable[[], Names], best: dict[str, float], kitchen: Kitchen) -> None:
    names = recipe()
    assert dict(names["nearest"].iter_rows()) == pytest.approx(best, abs=1e-6)
    matrix = names["rows"].collect()["embedding"].rechunk().to_numpy(allow_copy=False)
    np.testing.assert_array_equal(matrix, kitchen.vectors)


@pytest.mark.skipif(find_spec("pyspark") is None or shutil.which("java") is None, reason="no pyspark or no Java here: make test-spark")
@pytest.mark.filterwarnings("ignore:PySpark does not yet fully support pandas:FutureWarning")
def test_read_with_spark(recipe: Callable[[], Names], best: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYSPARK_PYTHON", sys.executable)
    try:
        assert {row.id: row.score for row in recipe()["nearest"]} == pytest.approx(best, abs=1e-6)
    finally:
        end_spark()


def end_spark() -> None:
    """Stop the session and the Java process that it began, which ends when its input does."""
    context = import_module("pyspark").SparkContext
    if context._active_spark_context is not None:
        context._active_spark_context.stop()
    if context._gateway is not None:
        context._gateway.shutdown()
        context._gateway.proc.communicate(timeout=60)


def test_run_every_night(kitchen: Kitchen) -> None:
    first, second = kitchen.nights
    assert (first.run.summary["units_done"], second.run.summary["units_done"], second.run.summary["units_skipped"]) == (2, 2, 1)
    [stayed] = [name for name in first.shards if name.startswith("data/b-")]
    assert first.shards.keys() & second.shards.keys() == {stayed}
    assert first.shards[stayed] == second.shards[stayed]
    assert (first.held, second.held) == (set(), {row["unit"] for row in first.rows})
    assert sorted(row["id"] for row in second.rows) == sorted(kitchen.ids)
    assert import_module("lance").dataset("nightly/vectors.lance").count_rows() == len(kitchen.ids)
    assert {row["unit"] for row in second.rows} == set(outputs.control("vectors", "manifest.parquet")["unit"].to_pylist())
