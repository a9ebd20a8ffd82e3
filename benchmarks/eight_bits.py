"""What matrix products of 8 bits would cost a model's vectors: `python -m benchmarks.eight_bits --help`.

The best that can be done without training, a scale for each token and for each output of a weight, found on the very numbers. fp8 is
that of `--precision fp8`; int8 has a zero of its own for each token as well. Speed is no matter here, so that a CPU will do.
"""

# Shape suffixes: T tokens, F features read, O features made, R rows, D width.

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
from torch import Tensor

from benchmarks.bench import circumstances, save
from benchmarks.data import BenchModel, find_model
from benchmarks.setting import Result
from embedding.model.embedder import Embedder
from embedding.model.linear import Fp8Linear, Linear
from embedding.model.parity import cosines
from embedding.names import Precision
from embedding.run.comparer import LEAST_COSINE

_BATCH_TOKENS = 4096
_LEAST_SCALE = 1e-12


def main(words: Sequence[str] | None = None) -> Result:
    """Run what the command line asks for."""
    options = _options(words)
    begun = circumstances(words, options)
    with tempfile.TemporaryDirectory() as scratch:
        model = find_model(options.model, Path(scratch))
        if not model.like_bert:
            raise SystemExit(f"{model.name} has other products than BERT, and its encoder is not the one that is tried here")
        texts = _texts(options.corpus, options.rows)
        exact = _vectors(model, "fp32", texts)
        found: Result = {
            **begun,
            "model": model.name,
            "texts": len(texts),
            "cosine with fp32": {"bf16": _kept(exact, _vectors(model, "bf16", texts))},
        }
        width = model.width
        products = {
            "query, key, value": (3 * width, width),
            "attended": (width, width),
            "up": (4 * width, width),
            "down": (width, 4 * width),
        }
        for kind, linear in {"fp8": Fp8Linear, "int8": _Int8Linear}.items():
            for name, chosen in {"all": products, **{f"only {name}": [name] for name in products}}.items():
                with _multiplied_by(linear, {products[each] for each in chosen}):
                    found["cosine with fp32"][f"{kind}, {name}"] = _kept(exact, _vectors(model, "bf16", texts))
    for name, kept in found["cosine with fp32"].items():
        line = ", ".join(f"{part} {cosine:.4f}" for part, cosine in kept.items())
        sys.stdout.write(f"{name}: {line}{'' if kept['least'] >= LEAST_COSINE else f', below {LEAST_COSINE}'}\n")
    save(found, options.out)
    return found


def int8_product(found_TF: Tensor, weight_OF: Tensor, bias_O: Tensor) -> Tensor:
    """What `Linear` gives, by integers of 8 bits: [T, O] in bfloat16. Computed in float32, which holds every sum of such products here."""
    found, weight = found_TF.float(), weight_OF.float()
    least_T1, most_T1 = found.amin(1, keepdim=True).clamp(max=0), found.amax(1, keepdim=True).clamp(min=0)
    found_scales_T1 = ((most_T1 - least_T1) / 255).clamp_min(_LEAST_SCALE)
    zeros_T1 = (-least_T1 / found_scales_T1).round()
    whole_TF = ((found / found_scales_T1).round() + zeros_T1).clamp(0, 255) - zeros_T1
    weight_scales_O1 = (weight.abs().amax(1, keepdim=True) / 127).clamp_min(_LEAST_SCALE)
    made_TO: Tensor = whole_TF @ (weight / weight_scales_O1).round().t()
    return (made_TO * found_scales_T1 * weight_scales_O1.t() + bias_O.float()).bfloat16()


@contextmanager
def _multiplied_by(linear: type[Linear], shapes: Collection[tuple[int, int]]) -> Iterator[None]:
    """The products by weights of these shapes, of encoders that are made while the block runs."""

    def product(weight_OF: Tensor, bias_O: Tensor, *, fp8: bool) -> Linear:
        assert not fp8
        return (linear if tuple(weight_OF.shape) in shapes else Linear)(weight_OF, bias_O)

    with patch("embedding.model.bert.linear_for", product):
        yield


class _Int8Linear(Linear):
    def forward(self, x: Tensor) -> Tensor:
        assert self.bias is not None
        return int8_product(x, self.weight, self.bias)


def _texts(files: Sequence[Path], most: int) -> list[str]:
    distinct = {text: None for file in files for text in pq.read_table(file, columns=["text"])["text"].to_pylist() if text}
    return random.Random(0).sample(list(distinct), min(most, len(distinct)))


def _vectors(model: BenchModel, precision: Precision, texts: Sequence[str]) -> npt.NDArray[np.float32]:
    embedder = Embedder(model.spec(precision), device="cpu", folder=model.folder)
    return embedder.embed(embedder.tokenize(texts), _BATCH_TOKENS).vectors_RD


def _kept(exact_RD: npt.NDArray[np.float32], found_RD: npt.NDArray[np.float32]) -> dict[str, float]:
    kept_R = cosines(found_RD, exact_RD)
    return {"least": float(kept_R.min()), "1% below": float(np.quantile(kept_R, 0.01)), "half below": float(np.median(kept_R))}


def _options(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.eight_bits", description=__doc__)
    parser.add_argument("corpus", nargs="+", type=Path, help="Parquet files with a column text")
    parser.add_argument("--model", default="minilm", help="the folder of a model like BERT, or minilm; tiny is for the tests")
    parser.add_argument("--rows", type=int, default=2_000, help="texts at most, drawn from all")
    parser.add_argument("--note", default="", help="kept in the result, such as what else ran on the machine")
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    parser.set_defaults(device="cpu", threads=0, rounds=1)
    return parser.parse_args(words)


if __name__ == "__main__":
    main()
