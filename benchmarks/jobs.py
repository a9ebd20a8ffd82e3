"""Whole jobs side by side, Parquet in and Parquet out, each run a process from its start to its end: `python -m benchmarks.jobs --help`.

Before the rounds over the corpus, each embeds a few texts in as many rounds: what that takes is its start, and the rest is work.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from benchmarks.bench import circumstances, save
from benchmarks.data import find_model, make_texts
from benchmarks.peers import OURS, Vectors, unlikeness
from benchmarks.programs import HAVE_BATCH_ROWS, PROGRAMS
from benchmarks.setting import Result, one_line
from benchmarks.timing import interleave, rate, ratio, seconds
from embedding.model.parity import cosines
from embedding.model.tokenizer import Tokenizer

_ROOT = Path(__file__).resolve().parents[1]
_FILES = 4
_FEW_TEXTS = 16
_TRIED = 6
"""The batch size is tried on every so manieth text."""


class Jobs:
    """Runs the project's job and those of others over the same folders."""

    def __init__(self, model: Path, texts: Sequence[str], scratch: Path) -> None:
        self._model = model
        self._scratch = scratch
        self.batch_rows: dict[str, int] = {}
        for corpus, part in {"all": texts, "tried": texts[::_TRIED], "few": texts[:_FEW_TEXTS]}.items():
            _write(part, scratch / corpus)

    def run(self, name: str, corpus: str) -> None:
        """From the start of its process to the end, into an empty folder.

        Raises:
            RuntimeError: it failed.
        """
        output = self._output(name)
        shutil.rmtree(output, ignore_errors=True)
        done = subprocess.run(
            [sys.executable, *self._words(name, str(self._scratch / corpus), str(output))],
            cwd=_ROOT,
            env={key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(done.stderr.strip().rpartition("\n")[2])

    def choose_batch(self, name: str, choices: Sequence[int]) -> None:
        """Take the batch size with which it is fastest."""
        if name not in HAVE_BATCH_ROWS:
            return
        took: dict[int, float] = {}
        for rows in choices if len(choices) > 1 else ():
            self.batch_rows[name] = rows
            took[rows] = seconds(partial(self.run, name, "tried"))
        self.batch_rows[name] = min(choices, key=lambda rows: took.get(rows, 0.0))

    def worst_cosine(self, name: str) -> float:
        """Of what it wrote last, with what the project did.

        Raises:
            ValueError: it has done other work.
        """
        found, expected = self._vectors(name), self._vectors(OURS)
        if found.shape != expected.shape:
            raise ValueError(f"it wrote vectors of shape {found.shape} and not {expected.shape}")
        least = float(cosines(found, expected).min())
        if unlike := unlikeness(least):
            raise ValueError(unlike)
        return least

    def _vectors(self, name: str) -> Vectors:
        data = self._output(name) / "data" if name == OURS else self._output(name)
        table = ds.dataset(data, format="parquet").to_table(columns=["id", "embedding"]).sort_by("id")
        return np.array(table["embedding"].to_pylist(), np.float32)

    def _output(self, name: str) -> Path:
        return self._scratch / name.replace(" ", "-")

    def _words(self, name: str, corpus: str, output: str) -> list[str]:
        if name == OURS:
            columns = ["--id-column", "id", "--precision", "fp32"]
            return ["jobs/embed_corpus.py", "--input", corpus, "--output", output, "--model", str(self._model), *columns]
        batch = ["--batch-rows", str(self.batch_rows[name])] if name in self.batch_rows else []
        return ["-m", "benchmarks.programs", name, corpus, output, str(self._model), *batch]


def main(words: Sequence[str] | None = None) -> Result:
    """Run what the command line asks for."""
    options = _options(words)
    begun = circumstances(words, options)
    with tempfile.TemporaryDirectory() as scratch:
        model = find_model(options.model, Path(scratch))
        texts = make_texts(options.lengths, model, options.tokens)
        tokens = len(Tokenizer(model.spec("fp32"), model.folder)(texts).ids)
        found: Result = {
            **begun,
            "model": model.name,
            "lengths": options.lengths,
            "texts": len(texts),
            "tokens": tokens,
            **_compare(Jobs(model.folder, texts, Path(scratch)), tokens, options),
            "load_average_after": os.getloadavg(),
        }
    save(found, options.out)
    sys.stdout.write(table(found) + "\n")
    return found


def _compare(jobs: Jobs, tokens: int, options: argparse.Namespace) -> Result:
    """All of them in turns; one that does not run here, or gives other vectors, is listed with the reason."""
    jobs.run(OURS, "few")
    names, missing = [OURS], {}
    for name in options.peers:
        try:
            jobs.run(name, "few")
            jobs.worst_cosine(name)
            jobs.choose_batch(name, options.batch_rows)
        except Exception as error:  # noqa: BLE001 - a line of the table, not the end of it
            missing[name] = one_line(error)
        else:
            names.append(name)
    starts = interleave({name: partial(jobs.run, name, "few") for name in names}, options.rounds, warm=False)
    whole = interleave({name: partial(jobs.run, name, "all") for name in names}, options.rounds, warm=False)
    work = {name: [value - median(starts[name]) for value in values] for name, values in whole.items()}
    return {
        "seconds": whole,
        "start_seconds": starts,
        "tokens_per_second": {name: rate(tokens, values) for name, values in work.items()},
        "ratio": {name: ratio(whole[OURS], whole[name]) for name in names[1:]},
        "ratio_after_start": {name: ratio(work[OURS], work[name]) for name in names[1:]},
        "batch_rows": jobs.batch_rows,
        "worst_cosine_to_this_project": {name: jobs.worst_cosine(name) for name in names[1:]},
        "not_measured": missing,
    }


def table(found: Result) -> str:
    """The medians as a Markdown table."""
    lines = [["Job", "seconds in all", "of which start", "tokens/s after it", "this project is"], ["---"] * 5]
    for name, times in found["seconds"].items():
        faster = "" if name == OURS else f"{found['ratio'][name]:.2f}x as fast, {found['ratio_after_start'][name]:.2f}x after the start"
        speed = f"{found['tokens_per_second'][name]:,.0f}"
        lines.append([name, f"{median(times):.1f}", f"{median(found['start_seconds'][name]):.1f}", speed, faster])
    lines += [[name, f"not measured: {reason}", "", "", ""] for name, reason in found["not_measured"].items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _write(texts: Sequence[str], folder: Path) -> None:
    folder.mkdir()
    ids = np.arange(len(texts))
    for number, part in enumerate(np.array_split(ids, _FILES)):
        pq.write_table(pa.table({"id": part, "text": [texts[each] for each in part]}), folder / f"{number}.parquet")


def _options(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.jobs", description=__doc__)
    parser.add_argument("--model", default="minilm", help="the folder of a model, or minilm; tiny is for the tests")
    parser.add_argument("--lengths", default="lognormal:32", help="demo, lognormal:MEDIAN or uniform:LOW-HIGH, in tokens")
    parser.add_argument("--tokens", type=int, default=400_000, help="size of the corpus")
    parser.add_argument("--peers", nargs="*", choices=PROGRAMS, default=list(PROGRAMS))
    parser.add_argument("--batch-rows", type=int, nargs="+", default=[8, 32, 128], help="of a peer; the fastest is taken")
    parser.add_argument("--rounds", type=int, default=3, help="times that each job runs")
    parser.add_argument("--note", default="", help="kept in the result, such as what else ran on the machine")
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    options = parser.parse_args(words)
    options.device, options.threads = "cpu", len(os.sched_getaffinity(0))
    return options


if __name__ == "__main__":
    main()
