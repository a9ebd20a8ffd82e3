"""The job's own stages, one by one and joined, without Ray."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import tokenizers
import torch

from benchmarks.data import BenchModel
from benchmarks.setting import Result, Setting, one_line
from benchmarks.timing import interleave, rate, ratio
from embedding.model.batching import batch_end, longest_first, split_rows
from embedding.model.bert import BertEncoder
from embedding.model.encoder import DTYPES, Encoder
from embedding.model.linear import linear_for, onednn_fits_on
from embedding.model.packing import PackedBatch, pack
from embedding.model.pooling import Head
from embedding.model.tokenizer import TokenizedTexts
from embedding.model.tokenizer import Tokenizer as JobTokenizer
from embedding.names import Precision

if TYPE_CHECKING:
    from embedding.corpus.ledger import CommitRecord

_UNITS = 6
"""Of the parquet stage: each is the whole sample, as units of a few batches would leave cores without one at the end of each."""
_NOT_COMPILED_TOO = 65_536
"""Tokens of the batches that the sweep runs without torch's compiler as well."""
_MOST_REPEATS = 1000
"""Of a layer's products on a CPU: those of models for tests are so small that nothing but calls would be timed."""
_MEMORY_UNITS = 600
_MEMORY_REPEATS = 20
"""How often the texts follow one another in the corpus of the memory stage."""


def tokenizer_stage(setting: Setting) -> Result:
    """Texts -> flat ids, against `tokenizers` on the same cores, with the number of texts that are cut otherwise."""
    spec = setting.model.spec("fp32")
    ours = JobTokenizer(spec, setting.model.folder)
    theirs = tokenizers.Tokenizer.from_file(str(setting.model.folder / "tokenizer.json"))
    theirs.no_padding()
    theirs.enable_truncation(setting.model.max_tokens)
    found, expected = ours(setting.texts), theirs.encode_batch_fast(setting.texts)
    mismatches = sum(a.tolist() != b.ids for a, b in zip(split_rows(found.ids, found.offsets), expected, strict=True))
    size = sum(len(text.encode()) for text in setting.texts)
    name = "nanotoken" if ours.is_fast else "the job's"
    times = interleave({name: lambda: ours(setting.texts), "tokenizers": lambda: theirs.encode_batch_fast(setting.texts)}, setting.rounds)
    return {
        "texts": len(setting.texts),
        "mismatches": mismatches,
        "seconds": times,
        "megabytes_per_second": {key: rate(size / 1e6, value) for key, value in times.items()},
        "tokens_per_second": {key: rate(len(found.ids), value) for key, value in times.items()},
        "ratio": ratio(times[name], times["tokenizers"]),
    }


def encoder_stage(setting: Setting, *, batch_tokens: int | None = None, compiled: bool = True) -> Result:
    """Batches -> hidden states, pooling with the copy back, and the matrix products alone, in the same rounds.

    `compiled` False: without torch's compiler, which the job uses on GPUs.
    """
    spec, device = setting.model.spec(setting.precision), torch.device(setting.device)
    tokens = JobTokenizer(spec, setting.model.folder)(setting.texts)
    work = setting.model.flop(tokens.lengths)
    encoder = Encoder(spec, setting.model.folder, device, setting.precision)
    if not compiled:
        assert isinstance(encoder._model, BertEncoder), "only the job's own encoder can be told not to"
        encoder._model.module.run_compiled(False)
    head = Head(spec, setting.model.folder, device, prompt_tokens=0)
    budget = batch_tokens or setting.batch_tokens
    batches = list(_batches(tokens, budget, device))
    hidden = [encoder(batch) for batch in batches]
    pinned = [torch.empty((len(batch.lengths), spec.dimensions), pin_memory=device.type == "cuda") for batch in batches]

    on_cpu = device.type == "cpu"
    lanes = ThreadPoolExecutor(setting.threads if on_cpu else 1)

    def encode() -> None:
        if on_cpu:
            torch.set_num_threads(1)  # a batch in each of as many threads, as the job does it
        deque(lanes.map(encoder, batches), maxlen=0)
        if on_cpu:
            torch.set_num_threads(setting.threads)

    def pool() -> None:
        with torch.inference_mode():
            for states, batch, place in zip(hidden, batches, pinned, strict=True):
                place.copy_(head(states, batch), non_blocking=True)

    products = _products(setting.model, min(budget, len(tokens.ids)), setting.precision, device)
    times = interleave({"encoder": encode, "pooling and copy": pool, **{kind: each.run for kind, each in products.items()}}, setting.rounds)
    fastest = min(products, key=lambda kind: float(np.median(times[kind])))
    matrix = [products[fastest].flop / time for time in times[fastest]]
    mfu = np.median([work / time / peak for time, peak in zip(times["encoder"], matrix, strict=True)])
    return {
        "precision": setting.precision,
        "batch_tokens": budget,
        "compiled": compiled,
        "packed": encoder.packed,
        "tokens": len(tokens.ids),
        "seconds": times,
        "tokens_per_second": rate(len(tokens.ids), times["encoder"]),
        "pooling_rows_per_second": rate(len(tokens.lengths), times["pooling and copy"]),
        "pooling_share": 1 / (1 + ratio(times["pooling and copy"], times["encoder"])),
        "batches": encoder.manner,
        "matrix_tflops": float(np.median(matrix)) / 1e12,
        "matrix_products": fastest,
        "mfu": float(mfu),
    }


def _batches(tokens: TokenizedTexts, budget: int, device: torch.device) -> Iterator[PackedBatch]:
    ordered = tokens.take(longest_first(tokens.lengths))
    start = 0
    while start < len(ordered.lengths):
        end = batch_end(ordered.lengths, start, budget, padded=False)
        ids = torch.from_numpy(ordered.ids[ordered.offsets[start] : ordered.offsets[end]])
        yield pack(ids, ordered.lengths[start:end], device)
        start = end


@dataclass(frozen=True)
class _Products:
    """The matrix products of one layer on random data: four h x h, one h x 4h, one 4h x h, times `repeats`."""

    pairs: list[tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]]
    flop: float
    repeats: int

    def run(self) -> None:
        with torch.inference_mode():
            for _ in range(self.repeats):
                for left, multiply in self.pairs:
                    multiply(left)


def _products(model: BenchModel, rows: int, precision: Precision, device: torch.device) -> dict[str, _Products]:
    """By torch.mm and by the job's own choice where that is another; the faster is the rate of this machine.

    Those of fp8 include the rounding of the tokens; torch.mm does them in bf16.
    """
    width, dtype = model.width, DTYPES[precision]
    shapes = [(width, width)] * 4 + [(width, 4 * width), (4 * width, width)]
    lefts = [torch.randn(rows, inner, device=device).to(dtype) for inner, _ in shapes]
    weights = [torch.randn(outer, inner, device=device).to(dtype) for inner, outer in shapes]
    flop = sum(2.0 * rows * inner * outer for inner, outer in shapes)
    enough = 5e14 if device.type == "cuda" else 5e10  # of a GPU half a second in half precision, in which it finds its clock
    repeats = max(1, round(enough / flop))
    if device.type == "cpu":
        repeats = min(repeats, _MOST_REPEATS)
    kinds: dict[str, list[Callable[[torch.Tensor], torch.Tensor]]] = {"torch.mm": [partial(torch.mm, mat2=one.t()) for one in weights]}
    if onednn_fits_on(device, dtype):
        kinds["oneDNN"] = [linear_for(one, None) for one in weights]
    if precision == "fp8":
        kinds["fp8"] = [linear_for(one, None, fp8=True) for one in weights]
    return {kind: _Products(list(zip(lefts, each, strict=True)), repeats * flop, repeats) for kind, each in kinds.items()}


def write_stage(setting: Setting, scratch: Path) -> Result:
    """Rows and random vectors -> shard bytes, checked, put to a local folder."""
    import pyarrow as pa

    from embedding.corpus.shard import shard_table
    from embedding.corpus.shards.parquet import PARQUET
    from embedding.corpus.storage import open_storage

    vectors = np.random.default_rng(0).standard_normal((20_000, setting.model.width), dtype=np.float32)
    copied = pa.table({"id": np.arange(len(vectors))})
    storage = open_storage(str(scratch / "written"))
    times = interleave(
        {"write": lambda: storage.put("data/a.parquet", PARQUET.encode(shard_table(copied, vectors, {}), {}))}, setting.rounds
    )
    return {
        "seconds": times,
        "rows_per_second": rate(len(vectors), times["write"]),
        "megabytes_per_second": rate(vectors.nbytes / 1e6, times["write"]),
    }


def parquet_stage(setting: Setting, scratch: Path) -> Result:
    """Parquet -> read, tokenize, encode, write, put -> shards, several units at once, against the encoder alone on the same units.

    The encoder alone is `Embedder.embed` on ready token ids, unit by unit, nothing beside it.
    """
    from benchmarks.units import Units

    corpus = Units(replace(setting, texts=setting.texts * _UNITS), scratch, _UNITS)
    tokenizer = JobTokenizer(setting.model.spec(setting.precision), setting.model.folder)
    tokens = tokenizer(setting.texts)
    tokens.prepare()

    def encode() -> None:
        corpus.encode([tokens] * _UNITS, setting.batch_tokens)

    records: list[CommitRecord] = []

    def whole() -> None:
        records[:] = corpus.embed()

    times = interleave({"Parquet to Parquet": whole, "encoder alone": encode}, setting.rounds)
    return {
        "units": len(corpus.units),
        "seconds": times,
        "tokens_per_second": {name: rate(_UNITS * len(tokens.ids), value) for name, value in times.items()},
        "share_of_encoder_alone": ratio(times["Parquet to Parquet"], times["encoder alone"]),
        "rows_per_second": rate(_UNITS * len(setting.texts), times["Parquet to Parquet"]),
        "stage_seconds_of_last_round": {
            name: sum(getattr(record, f"{name}_seconds") for record in records) for name in ("read", "tokenize", "wait", "encode", "write")
        },
    }


def memory_stage(setting: Setting, scratch: Path) -> Result:
    """What a worker's process and its device hold after each of many units: memory that is never given back shows as growth."""
    from benchmarks.units import Units

    again = replace(setting, texts=setting.texts * _MEMORY_REPEATS)
    held_U2 = np.array([_held_megabytes() for _ in Units(again, scratch, _MEMORY_UNITS).embed()])
    settled_U2 = held_U2[len(held_U2) // 10 :]
    growth = np.polyfit(np.arange(len(settled_U2)), settled_U2, 1)[0] * len(settled_U2)
    return {
        "units": len(held_U2),
        "megabytes": dict(zip(("host", "device"), held_U2.T.round(1).tolist(), strict=True)),
        "grown_megabytes": dict(zip(("host", "device"), growth.tolist(), strict=True)),
    }


def _held_megabytes() -> tuple[float, float]:
    """(resident memory of this process, memory that torch has taken of the GPU)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6, torch.cuda.memory_reserved() / 1e6 if torch.cuda.is_available() else 0.0


def cuda_sweep(setting: Setting, precisions: Sequence[Precision]) -> Iterator[list[Result]]:
    """The encoder by batch size, precision and torch.compile, what is known after each; what fails is listed with its reason."""
    found: list[Result] = []
    for precision in precisions:
        for batch_tokens in (8_192, 16_384, 32_768, 65_536, 131_072, 262_144):
            for compiled in (True, False) if batch_tokens == _NOT_COMPILED_TOO else (True,):
                one = replace(setting, precision=precision, rounds=max(3, setting.rounds // 2), batch_tokens=batch_tokens)
                started = time.perf_counter()
                try:
                    found.append(encoder_stage(one, compiled=compiled))
                except Exception as error:  # noqa: BLE001 - a row of the table, not the end of it
                    cause = {"not_measured": one_line(error)}
                    found.append({"precision": precision, "batch_tokens": batch_tokens, "compiled": compiled, **cause})
                found[-1]["wall_seconds"] = time.perf_counter() - started
                yield found


def encoder_by_precision(setting: Setting, precisions: Sequence[Precision]) -> Iterator[dict[str, Result]]:
    """The encoder in each, what is known after each; one that fails is listed with its reason."""
    found: dict[str, Result] = {}
    for precision in precisions:
        try:
            found[precision] = encoder_stage(replace(setting, precision=precision))
        except Exception as error:  # noqa: BLE001 - a row of the table, not the end of it
            found[precision] = {"not_measured": one_line(error)}
        yield found
