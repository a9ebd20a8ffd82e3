"""Whether several workers on one device do more than one: what `--gpus-per-worker 0.5` would gain."""

from __future__ import annotations

import multiprocessing
import time
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from threading import BrokenBarrierError
from typing import TYPE_CHECKING

from benchmarks.setting import Result, Setting
from embedding.model.embedder import Embedder

if TYPE_CHECKING:
    from multiprocessing.synchronize import Barrier

_WORKERS = (1, 2)
_START_SECONDS = 900

_ready: Barrier
"""Of this process, where it is a worker."""


def sharing_stage(setting: Setting) -> Result:
    """Tokens a second of all processes together, each with a model of its own and encoding all texts, one to several at once."""
    return {"tokens_per_second": {str(workers): _rate(setting, workers) for workers in _WORKERS}}


def _rate(setting: Setting, workers: int) -> float:
    context = multiprocessing.get_context("spawn")
    ready = context.Barrier(workers)
    with ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(ready,)) as pool:
        spans = [pool.submit(_encode, setting, workers) for _ in range(workers)]
        wait(spans, return_when=FIRST_EXCEPTION)
        if any(span.done() and span.exception() for span in spans):
            ready.abort()  # the others wait there
        found = [span.result() for span in sorted(spans, key=lambda span: isinstance(span.exception(), BrokenBarrierError))]
    begun, ended, tokens = zip(*found, strict=True)
    return float(sum(tokens) / (max(ended) - min(begun)))


def _begin(ready: Barrier) -> None:
    global _ready
    _ready = ready


def _encode(setting: Setting, workers: int) -> tuple[float, float, int]:
    """A worker's encoder, and when it began and ended how many tokens; the processes begin together, when all are warm."""
    threads = max(1, setting.threads // workers) if setting.device == "cpu" else None
    embedder = Embedder(setting.model.spec(setting.precision), device=setting.device, threads=threads, folder=setting.model.folder)
    tokens = embedder.tokenize(setting.texts)
    embedder.embed(tokens, setting.batch_tokens)
    _ready.wait(_START_SECONDS)
    begun = time.monotonic()
    for _ in range(setting.rounds):
        embedder.embed(tokens, setting.batch_tokens)
    return begun, time.monotonic(), setting.rounds * len(tokens.ids)
