"""Whether several workers on one device do more than one: what `--gpus-per-worker 0.5` would gain."""

from __future__ import annotations

import multiprocessing
import time
from typing import TYPE_CHECKING

from benchmarks.setting import Result, Setting
from embedding.model.embedder import Embedder

if TYPE_CHECKING:
    from multiprocessing.queues import Queue
    from multiprocessing.synchronize import Barrier

_WORKERS = (1, 2)
_START_SECONDS = 900


def sharing_stage(setting: Setting) -> Result:
    """Tokens a second of all processes together, each with a model of its own and encoding all texts, one to several at once."""
    return {"tokens_per_second": {str(workers): _rate(setting, workers) for workers in _WORKERS}}


def _rate(setting: Setting, workers: int) -> float:
    context = multiprocessing.get_context("spawn")
    ready, spans = context.Barrier(workers), context.Queue()
    processes = [context.Process(target=_encode, args=(setting, workers, ready, spans)) for _ in range(workers)]
    for process in processes:
        process.start()
    found = [spans.get(timeout=_START_SECONDS) for _ in processes]
    for process in processes:
        process.join()
    begun, ended, tokens = zip(*found, strict=True)
    return float(sum(tokens) / (max(ended) - min(begun)))


def _encode(setting: Setting, workers: int, ready: Barrier, spans: Queue[tuple[float, float, int]]) -> None:
    """A worker's encoder; the processes begin together, when all are warm."""
    threads = max(1, setting.threads // workers) if setting.device == "cpu" else None
    embedder = Embedder(setting.model.spec(setting.precision), device=setting.device, threads=threads, folder=setting.model.folder)
    tokens = embedder.tokenize(setting.texts)
    embedder.embed(tokens, setting.batch_tokens)
    ready.wait(_START_SECONDS)
    begun = time.monotonic()
    for _ in range(setting.rounds):
        embedder.embed(tokens, setting.batch_tokens)
    spans.put((begun, time.monotonic(), setting.rounds * len(tokens.ids)))
