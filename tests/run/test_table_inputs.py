"""Whole jobs on tables: what is in the table is embedded, what it drops goes, and the output remembers which version that was."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from deltalake import write_deltalake
from pyiceberg.catalog.sql import SqlCatalog

from embedding.corpus.output import Output
from tests.run.conftest import Embed
from tests.run.here import embed_here, prove_here
from tests.support import corpora, outputs
from tests.support.iceberg_catalog import iceberg_catalog

TEXTS = corpora.sentences(60, seed=5)


def rows(first: int, stop: int) -> pa.Table:
    return pa.table({"id": pa.array(range(first, stop), pa.int64()), "text": TEXTS[first:stop]})


def ids(output: str) -> list[int]:
    return sorted(outputs.table(output)["id"].to_pylist())


def test_a_run_on_a_cluster_remembers_the_version_of_a_table(embed: Embed, tmp_path: Path) -> None:
    table, output = str(tmp_path / "table"), str(tmp_path / "out")
    write_deltalake(table, rows(0, 10))
    write_deltalake(table, rows(10, 20), mode="overwrite")
    assert embed(input=table, output=output).status == "complete"
    assert embed(input=table, output=output).status == "nothing to do"
    assert ids(output) == [*range(10, 20)]
    settings = Output(output).settings()
    assert settings is not None
    assert settings.asked["input_versions"] == {table: "Delta Lake version 1"}


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[SqlCatalog]:
    with iceberg_catalog(f"file://{tmp_path}/warehouse") as made:
        yield made


def test_a_run_follows_an_iceberg_table(tiny_model: Path, tmp_path: Path, catalog: SqlCatalog) -> None:
    table = catalog.create_table("n.t", schema=rows(0, 1).schema)
    for number in range(3):
        table.append(rows(10 * number, 10 * number + 10))
    table.delete("id >= 20")
    place, output = table.location().removeprefix("file://"), str(tmp_path / "out")
    assert len(embed_here(place, output, tiny_model, limit_rows=10)) == 1
    assert len(embed_here(place, output, tiny_model, run="second")) == 1
    assert embed_here(place, output, tiny_model, run="third") == []
    assert ids(output) == [*range(20)]
    assert prove_here(output).status == "proved"
    table.overwrite(rows(40, 45), overwrite_filter="id >= 10")
    assert len(embed_here(place, output, tiny_model, run="fourth")) == 1
    assert ids(output) == [*range(10), *range(40, 45)]
