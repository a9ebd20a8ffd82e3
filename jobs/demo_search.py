"""Answer questions in plain English from the vectors of the demo: embed the question, show the nearest docstrings."""

from __future__ import annotations

from pathlib import Path

import cyclopts
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from rich import box
from rich import print as show
from rich.table import Column, Table
from rich.text import Text

from embedding.config import JobConfig
from embedding.model.embedder import Embedder
from embedding.model.spec import resolve_model

QUESTIONS = (
    "how do I parse a date from a string?",
    "find all files whose name matches a pattern",
    "run functions in parallel and wait for their results",
)


def search(vectors: Path, *questions: str, top: int = 3) -> None:
    """Print the `top` docstrings nearest to each question, by cosine; without questions, to three examples.

    Args:
        vectors: the output folder of the job.
        questions: what to look for.
        top: docstrings a question.
    """
    questions = questions or QUESTIONS
    rows = pq.read_table(vectors / "data", columns=["id", "module", "text", "embedding"]).combine_chunks()
    spec = resolve_model(JobConfig(input=(str(vectors),), output=str(vectors)), precision="fp32")
    embedder = Embedder(spec, device="cpu")
    questions_QD = embedder.embed(embedder.tokenize(questions), spec.max_tokens).vectors_RD
    scores_QR = questions_QD @ matrix(rows["embedding"]).T
    for question, scores_R in zip(questions, scores_QR, strict=True):
        nearest = np.argsort(-scores_R, kind="stable")[:top]
        show(answer(question, scores_R[nearest], rows.take(nearest)))


def matrix(column: pa.ChunkedArray) -> npt.NDArray[np.float32]:
    """The vectors of a column in one chunk as a (rows, dimensions) view of its memory."""
    vectors: npt.NDArray[np.float32] = column.chunk(0).flatten().to_numpy(zero_copy_only=True)
    return vectors.reshape(len(column), -1)


def answer(question: str, scores: npt.NDArray[np.float32], rows: pa.Table) -> Table:
    """The rows and their scores, to be printed; the module's part of a name is dimmed."""
    table = Table("Score", Column("Name", no_wrap=True), "Docstring", title=question, title_justify="left", box=box.SIMPLE_HEAD)
    for score, row in zip(scores, rows.to_pylist(), strict=True):
        name = Text.assemble((row["module"], "dim"), row["id"].removeprefix(row["module"]))
        table.add_row(f"{score:.3f}", name, row["text"].partition("\n")[0])
    return table


if __name__ == "__main__":
    cyclopts.run(search)
