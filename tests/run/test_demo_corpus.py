"""The demo corpus, whole: every row has its vector, and the vectors are sentence-transformers' own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.dataset as ds
from sentence_transformers import SentenceTransformer

from tests.support import outputs
from tests.support.job import run_job
from tests.support.ray_cluster import RayCluster

EVERY = 8
"""Of the rows in order of length, these are embedded by sentence-transformers too: all lengths, in all units."""


def test_vectors_of_all_lengths_are_those_of_sentence_transformers(
    demo_corpus: Path, packaged_model: Path, ray_cluster: RayCluster, tmp_path: Path
) -> None:
    output = str(tmp_path / "out")
    run_job(
        "--input", demo_corpus, "--output", output, "--id-column", "id", "--keep-columns", "module", "text", env=ray_cluster.environment()
    )
    found = outputs.table(output)
    source = ds.dataset(demo_corpus).to_table(columns=["id", "module", "text"])
    assert found.select(["id", "module", "text"]).to_pylist() == source.to_pylist()

    vectors = found["embedding"].combine_chunks().flatten().to_numpy().reshape(found.num_rows, -1)
    texts = source["text"].to_pylist()
    chosen = sorted(range(len(texts)), key=lambda row: len(texts[row]))[::-EVERY]
    assert len({found["id"][row].as_py() for row in chosen}) == -(-found.num_rows // EVERY) > 500
    model = SentenceTransformer(str(packaged_model), device="cpu")
    expected = np.asarray(model.encode([texts[row] for row in chosen], batch_size=16))
    cosines = np.sum(vectors[chosen] * expected, axis=1) / (np.linalg.norm(vectors[chosen], axis=1) * np.linalg.norm(expected, axis=1))
    assert cosines.min() >= 0.99999
    assert np.abs(np.linalg.norm(vectors, axis=1) - 1).max() < 1e-5
