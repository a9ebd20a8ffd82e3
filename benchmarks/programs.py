"""The job as others would write it, each a program that `benchmarks.jobs` runs in a process of its own.

Each follows its library's documentation for embedding a folder of Parquet files: column `text` in, `id` and `embedding` out.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_READ_ROWS = 1024
"""Handed to an actor at once, Ray Data's own default. What it sorts by length are these."""


def sentence_transformers(corpus: Path, output: Path, model: str, batch_rows: int) -> None:
    """A loop over the files."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from sentence_transformers import SentenceTransformer

    encoder = SentenceTransformer(model)
    output.mkdir()
    for file in sorted(corpus.iterdir()):
        table = pq.read_table(file)
        vectors = encoder.encode(table["text"].to_pylist(), batch_size=batch_rows, normalize_embeddings=True, show_progress_bar=False)
        column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
        pq.write_table(table.select(["id"]).append_column("embedding", column), output / file.name)


def ray_data(corpus: Path, output: Path, model: str, batch_rows: int) -> None:
    """read_parquet, map_batches with sentence-transformers in one actor that computes on all cores, write_parquet.

    The actor claims one CPU: with all of them nothing could be read, and several actors were slower on two cores.
    """
    import ray
    import torch
    from ray.data import ActorPoolStrategy, DataContext
    from sentence_transformers import SentenceTransformer

    cores = len(os.sched_getaffinity(0))

    class Encoder:
        def __init__(self) -> None:
            torch.set_num_threads(cores)  # Ray allows as many as the actor claims
            self._encoder = SentenceTransformer(model)

        def __call__(self, batch: dict[str, npt.NDArray[np.object_]]) -> dict[str, npt.NDArray[np.generic]]:
            texts = batch["text"].tolist()
            vectors = self._encoder.encode(texts, batch_size=batch_rows, normalize_embeddings=True, show_progress_bar=False)
            return {"id": batch["id"], "embedding": vectors}

    ray.init(address="local", include_dashboard=False)
    DataContext.get_current().enable_progress_bars = False
    texts = ray.data.read_parquet(str(corpus), columns=["id", "text"])
    vectors = texts.map_batches(Encoder, batch_size=_READ_ROWS, num_cpus=1, compute=ActorPoolStrategy(size=1))
    vectors.write_parquet(str(output))


def daft(corpus: Path, output: Path, model: str, batch_rows: int) -> None:
    """`embed_text` with its provider "transformers", which takes sentence-transformers' own batch size."""
    del batch_rows
    daft, functions = import_module("daft"), import_module("daft.functions")  # no dependency of ours
    vectors = functions.embed_text(daft.col("text"), provider="transformers", model=model)
    texts = daft.read_parquet(f"{corpus}/*.parquet")
    texts.select(daft.col("id"), vectors.alias("embedding")).write_parquet(str(output))


PROGRAMS: dict[str, Callable[[Path, Path, str, int], None]] = {
    "sentence-transformers": sentence_transformers,
    "Ray Data": ray_data,
    "Daft": daft,
}
HAVE_BATCH_ROWS = ("sentence-transformers", "Ray Data")
"""Those whose batch size can be chosen."""


def main(words: Sequence[str] | None = None) -> None:
    """Run one of them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.programs", description=__doc__)
    parser.add_argument("program", choices=PROGRAMS)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("model")
    parser.add_argument("--batch-rows", type=int, default=32)
    options = parser.parse_args(words)
    PROGRAMS[options.program](options.corpus, options.output, options.model, options.batch_rows)


if __name__ == "__main__":
    main()
