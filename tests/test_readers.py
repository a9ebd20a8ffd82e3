"""Every library that people open Parquet with finds the same vectors in the output of a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import datasets
import duckdb
import numpy as np
import numpy.typing as npt
import pandas as pd
import polars as pl
import pyarrow.dataset as ds
import pytest

from tests.support import corpora
from tests.support.job import run_job
from tests.support.ray_cluster import RayCluster

Vectors: TypeAlias = npt.NDArray[np.float32]
CORPUS = corpora.plain(rows=50, files=2, row_group_rows=7)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, ray_cluster: RayCluster) -> Path:
    """`OUT/data` of a run over two files in units of 10 rows."""
    root = tmp_path_factory.mktemp("readers")
    source = CORPUS.write(root / "in")
    run_job("--input", source, "--output", root / "out", "--id-column", "id", "--unit-rows", "10", env=ray_cluster.environment())
    return root / "out" / "data"


def by_pyarrow(data: Path) -> tuple[list[int], Vectors]:
    table = ds.dataset(data, format="parquet").to_table().combine_chunks()
    vectors: Vectors = table["embedding"].chunk(0).flatten().to_numpy(zero_copy_only=True)
    return table["id"].to_pylist(), vectors.reshape(table.num_rows, -1)


def by_pandas(data: Path) -> tuple[list[int], Vectors]:
    frame = pd.read_parquet(data)
    return frame["id"].tolist(), np.stack(frame["embedding"].tolist())


def by_polars(data: Path) -> tuple[list[int], Vectors]:
    frame = pl.read_parquet(data / "*.parquet")
    return frame["id"].to_list(), frame["embedding"].to_numpy()


def by_duckdb(data: Path) -> tuple[list[int], Vectors]:
    with duckdb.connect() as connection:
        columns = connection.sql(f"SELECT id, embedding FROM '{data}/*.parquet' ORDER BY filename, file_row_number").fetchnumpy()
    return columns["id"].tolist(), np.stack(list(columns["embedding"]))


def by_datasets(data: Path) -> tuple[list[int], Vectors]:
    cache = data.parent.parent / "cache"
    rows = datasets.load_dataset("parquet", data_dir=str(data), split="train", cache_dir=str(cache)).with_format("numpy")
    return rows["id"][:].tolist(), rows["embedding"][:]


@pytest.mark.parametrize("read", [by_pandas, by_polars, by_duckdb, by_datasets])
def test_same_numbers(read: Callable[[Path], tuple[list[int], Vectors]], data: Path) -> None:
    expected_ids, expected = by_pyarrow(data)
    ids, vectors = read(data)
    assert ids == expected_ids == [row["id"] for row in CORPUS.rows]
    assert vectors.dtype == np.float32
    assert vectors.shape == (50, 384)
    np.testing.assert_array_equal(vectors, expected)


def test_vectors_are_finite_and_differ(data: Path) -> None:
    _, vectors = by_pyarrow(data)
    assert np.isfinite(vectors).all()
    assert len(np.unique(vectors, axis=0)) == len({row["text"] for row in CORPUS.rows})
