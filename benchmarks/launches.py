"""How long a thread that hands work to a device is held up by the threads that tokenize and write, as all need Python's lock.

A GPU does not notice what is shorter than the batches that it was handed ahead (`embedding.model.lanes`). Runs on any machine: the launches
are additions of four numbers.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import torch

from benchmarks.setting import Result, Setting
from embedding.model.spec import TRUNCATE
from embedding.model.tokenizer import Tokenizer
from embedding.model.windows import Windows

_ROWS = 65_536
"""Of a unit on a GPU."""
_HELD_SECONDS = 1e-3


def launch_stage(setting: Setting) -> Result:
    """Time that launches were held up while a GPU's unit was tokenized and its shard was made, and the longest of these times."""
    from embedding.corpus.shard import shard_table
    from embedding.corpus.shards.parquet import PARQUET

    spec = setting.model.spec("fp32")
    windows = Windows(Tokenizer(spec, setting.model.folder), spec.max_tokens, TRUNCATE)
    texts = pa.array((setting.texts * -(-_ROWS // len(setting.texts)))[:_ROWS])
    vectors = np.random.default_rng(0).standard_normal((len(texts), setting.model.width), dtype=np.float32)
    ids = pa.table({"id": np.arange(len(texts))})
    work: dict[str, Callable[[], object]] = {
        "tokenize": lambda: windows(texts.to_pylist()),
        "write": lambda: PARQUET.encode(shard_table(ids, vectors, {}), {}),
    }
    threads = pa.cpu_count()
    pa.set_cpu_count(1)  # on a machine of two cores, Arrow's threads would take the time of the one that launches
    try:
        for each in work.values():
            each()
        return {"rows": len(texts)} | {name: [_beside(each) for _ in range(setting.rounds)] for name, each in work.items()}
    finally:
        pa.set_cpu_count(threads)


def _beside(work: Callable[[], object]) -> Result:
    begun, over, times = threading.Event(), threading.Event(), list[float]()
    launcher = threading.Thread(target=_launch, args=(begun, over, times))
    launcher.start()
    begun.wait()
    started = time.perf_counter()
    work()
    ended = time.perf_counter()
    over.set()
    launcher.join()
    gaps = np.diff([each for each in times if started <= each <= ended])
    held = gaps[gaps > _HELD_SECONDS]
    return {"seconds": ended - started, "held_seconds": float(held.sum()), "longest": float(gaps.max(initial=0.0))}


def _launch(begun: threading.Event, over: threading.Event, times: list[float]) -> None:
    numbers, result = torch.ones(4), torch.empty(4)
    begun.set()
    with torch.inference_mode():
        while not over.is_set():
            torch.add(numbers, numbers, out=result)
            times.append(time.perf_counter())
