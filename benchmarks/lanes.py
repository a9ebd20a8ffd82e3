"""How many cores one process can keep busy: `python -m benchmarks.lanes --help`.

Each core computes a batch in a thread of its own, and between two operations every thread needs Python's lock. Here the matrix products
sleep as long as a core would compute; all else is the job's own encoder, so narrow that few cores do it for many lanes.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest.mock import patch

import numpy as np
from torch import Tensor

from benchmarks.bench import circumstances, save
from benchmarks.data import BenchModel, make_model
from benchmarks.setting import Result
from embedding.model.batching import offsets_of
from embedding.model.embedder import Embedder
from embedding.model.linear import Linear
from embedding.model.tokenizer import TokenizedTexts

_LENGTHS = (8, 8, 7, 7, 6, 6)
"""Of the rows of a batch: three lengths, as a real one has of some."""
_BATCHES_PER_LANE = 6


def main(words: Sequence[str] | None = None) -> Result:
    """Run what the command line asks for."""
    options = _options(words)
    found: Result = {**circumstances(words, options), "seconds of a batch": options.batch_seconds, "lanes": {}}
    with tempfile.TemporaryDirectory() as scratch:
        model = make_model("narrow", Path(scratch))
        for lanes in options.lanes:
            found["lanes"][lanes] = busy = [_share_of_products(model, lanes, options.batch_seconds) for _ in range(options.rounds)]
            sys.stdout.write(f"{lanes} lanes: {np.median(busy):.0%} of the time in products\n")
    save(found, options.out)
    return found


def _share_of_products(model: BenchModel, lanes: int, batch_seconds: float) -> float:
    """The time that the products slept, of all time of all lanes."""
    with patch("embedding.model.bert.linear_for", _sleeping(batch_seconds / (4 * model.layers))):
        embedder = Embedder(model.spec("fp32"), device="cpu", threads=lanes, folder=model.folder)
    lengths = np.array(_LENGTHS).repeat(lanes * _BATCHES_PER_LANE)
    ids = np.random.default_rng(0).integers(1000, 2000, int(lengths.sum()), np.int32)
    tokens = TokenizedTexts(ids, offsets_of(lengths), np.zeros(len(lengths), np.bool_))
    tokens.prepare()
    started = time.perf_counter()
    embedder.embed(tokens, sum(_LENGTHS))
    batches = len(ids) / sum(_LENGTHS)
    return batches * batch_seconds / lanes / (time.perf_counter() - started)


def _sleeping(seconds: float) -> Callable[..., Linear]:
    class Sleeping(Linear):
        def __init__(self, weight: Tensor, bias: Tensor | None, *, fp8: bool) -> None:
            assert not fp8
            super().__init__(weight, bias)

        def forward(self, x: Tensor) -> Tensor:
            time.sleep(seconds)
            return super().forward(x)

    return Sleeping


def _options(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lanes", description=__doc__)
    parser.add_argument("--lanes", type=int, nargs="+", default=[1, 4, 8, 16, 24, 32, 48, 64])
    parser.add_argument("--batch-seconds", type=float, default=0.1, help="of the products; MiniLM-L6 takes a core 0.1 s for 1,024 tokens")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--note", default="", help="kept in the result, such as what else ran on the machine")
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    parser.set_defaults(device="cpu", threads=0)
    return parser.parse_args(words)


if __name__ == "__main__":
    main()
