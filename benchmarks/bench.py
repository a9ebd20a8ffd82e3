"""Measure every stage of the job and its peers side by side, without Ray: `python -m benchmarks.bench --help`.

Prints a Markdown table and writes all raw times as JSON. docs/performance.md says how to read them.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from transformers.utils import logging as transformers_logging

from benchmarks.data import BenchModel, ModelName, find_model, make_texts
from benchmarks.launches import launch_stage
from benchmarks.peers import OURS, peers_stage
from benchmarks.setting import Result, Setting, one_line
from benchmarks.sharing import sharing_stage
from benchmarks.stages import cuda_sweep, encoder_by_precision, memory_stage, parquet_stage, tokenizer_stage, write_stage
from embedding.model.linear import fp8_lacks
from embedding.names import Precision

STAGES = ("tokenizer", "encoder", "write", "launches", "parquet", "peers", "memory", "sharing", "sweep")
_ON_GPUS = ("sharing", "sweep")
"""Run on a CPU only if asked for."""
_LIBRARIES = ("ray", "torch", "transformers", "tokenizers", "nanotoken", "pyarrow", "numpy", "sentence-transformers", "onnxruntime", "daft")
_TOKENIZED_TOKENS = 400_000
"""The tokenizer stage takes a longer corpus: it is fast."""


def main(words: Sequence[str] | None = None) -> Result:
    """Run what the command line asks for."""
    options = _options(words)
    quiet()
    started = time.time()
    with tempfile.TemporaryDirectory() as scratch:
        model = find_model(options.model, Path(scratch))
        found: Result = {
            **circumstances(words, options),
            "model": {"name": model.name, "weights": model.weights, "layers, width, heads": (model.layers, model.width, model.heads)},
            "corpora": {},
        }
        for lengths in options.lengths:
            for corpus in _measure(lengths, model, options, Path(scratch)):
                found["corpora"][lengths] = corpus
                found["seconds"] = time.time() - started
                found["load_average_after"] = os.getloadavg()
                save(found, options.out)
    sys.stdout.write(table(found) + "\n")
    return found


def quiet() -> None:
    """Silence the libraries."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.simplefilter("ignore")  # the exporter and the peers warn of their own internals


def circumstances(words: Sequence[str] | None, options: argparse.Namespace) -> Result:
    """What a result says of its run: when, by which command, where, with what. Asked before it works: the load is then that of others."""
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "command": " ".join(words if words is not None else sys.argv[1:]),
        "hardware": hardware(options.device, options.threads) | {"note": options.note},
        "versions": versions(),
        "rounds": options.rounds,
    }


def save(found: Result, out: Path | None) -> None:
    """Write what is known; after each step of a stage, so that a run that is ended has measured something."""
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(found, indent=1) + "\n")


def _measure(lengths: str, model: BenchModel, options: argparse.Namespace, scratch: Path) -> Iterator[Result]:
    """All stages on one corpus, what is known after each step; one that fails here is listed with its reason."""
    texts = make_texts(lengths, model, options.tokens)
    setting = Setting.of(model, texts, options.device, options.precision[0], options.rounds, options.threads)
    more = make_texts(lengths, model, min(_TOKENIZED_TOKENS, 10 * options.tokens))
    stages: dict[str, Callable[[], Iterable[object]]] = {
        "tokenizer": lambda: [tokenizer_stage(replace(setting, texts=more, precision="fp32"))],
        "encoder": lambda: encoder_by_precision(setting, options.precision),
        "write": lambda: [write_stage(setting, scratch)],
        "launches": lambda: [launch_stage(setting)],
        "parquet": lambda: [parquet_stage(setting, scratch)],
        "peers": lambda: [peers_stage(setting, scratch)],
        "memory": lambda: [memory_stage(setting, scratch)],
        "sharing": lambda: [sharing_stage(setting)],
        "sweep": lambda: cuda_sweep(setting, options.precision),
    }
    found: Result = {"texts": len(texts), "batch_tokens": setting.batch_tokens, "stages": {}, "not_measured": {}}
    for name in options.stages:
        torch.set_num_threads(options.threads)
        gc.collect()
        torch.cuda.empty_cache()
        try:
            for known in stages[name]():
                found["stages"][name] = known
                yield found
        except Exception as error:  # noqa: BLE001 - a row of the table, not the end of it
            found["not_measured"][name] = one_line(error)
            yield found


def _options(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench", description=__doc__)
    add_shared_options(parser)
    parser.add_argument(
        "--model", default="minilm", help=f"the folder of a model, or {', '.join(get_args(ModelName))} (the last for tests)"
    )
    parser.add_argument("--lengths", nargs="+", help="demo, lognormal:MEDIAN or uniform:LOW-HIGH, in tokens")
    parser.add_argument("--precision", nargs="+", choices=get_args(Precision), help="the first is compared with the peers")
    parser.add_argument("--stages", nargs="+", choices=STAGES)
    parser.add_argument("--quick", action="store_true", help="small corpora and few rounds: to see it work, not to quote")
    options = parser.parse_args(words)
    cuda = options.device == "cuda"
    options.lengths = options.lengths or (["uniform:50-300", "lognormal:50"] if cuda else ["demo", "lognormal:32"])
    options.precision = options.precision or (_on_this_gpu() if cuda else ["fp32", "bf16"] if _has_amx() else ["fp32"])
    options.tokens = options.tokens or (2_000 if options.quick else 4_000_000 if cuda else 24_000)
    options.rounds = options.rounds or (2 if options.quick else 5)
    options.stages = options.stages or [stage for stage in STAGES if cuda or stage not in _ON_GPUS]
    return options


def add_shared_options(parser: argparse.ArgumentParser) -> None:
    """Those of every comparison of encoders."""
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--tokens", type=int, help="size of each corpus")
    parser.add_argument("--rounds", type=int, help="times that each contestant runs")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="CPU threads of torch and ONNX Runtime")
    parser.add_argument("--note", default="", help="kept in the result, such as what else ran on the machine")
    parser.add_argument("--out", type=Path, help="where the JSON goes")


def hardware(device: str, threads: int) -> Result:
    """What computes."""
    found: Result = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": threads,
        "load_average_before": os.getloadavg(),
        "amx": _has_amx(),
        "python": platform.python_version(),
    }
    return found


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _on_this_gpu() -> list[Precision]:
    return ["bf16", "fp16"] if fp8_lacks(torch.device("cuda")) else ["bf16", "fp16", "fp8"]


def _has_amx() -> bool:
    """Whether half precision pays on this CPU."""
    info = Path("/proc/cpuinfo")
    return info.exists() and "amx_bf16" in info.read_text()


def versions() -> dict[str, str]:
    """Of the libraries that compute, the peers too."""
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def table(found: Result) -> str:
    """The medians as one Markdown table, a column for each corpus."""
    columns = {lengths: dict(_rows(corpus)) for lengths, corpus in found["corpora"].items()}
    labels = list(dict.fromkeys(label for cells in columns.values() for label in cells))
    head = [f"{found['model']['name']}, {found['hardware']['device']}, {found['hardware']['threads']} threads", *columns]
    lines = [head, ["---"] * len(head), *([label, *(cells.get(label, "not measured") for cells in columns.values())] for label in labels)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _rows(corpus: Result) -> Iterator[tuple[str, str]]:
    stages = corpus["stages"]
    if stage := stages.get("tokenizer"):
        for name, speed in stage["megabytes_per_second"].items():
            yield f"tokenizer: {name}", f"{speed:.1f} MB/s, {stage['tokens_per_second'][name]:,.0f} tokens/s"
        yield "tokenizer: ratio", f"{stage['ratio']:.1f}, {stage['mismatches']} of {stage['texts']:,} texts cut otherwise"
    for precision, stage in stages.get("encoder", {}).items():
        if "not_measured" in stage:
            yield f"encoder {precision}", f"not measured: {stage['not_measured']}"
            continue
        yield f"encoder {precision}", f"{stage['tokens_per_second']:,.0f} tokens/s"
        peak = f"{stage['matrix_tflops']:.2f} TFLOP/s by {stage['matrix_products']}"
        yield f"encoder {precision}: share of the matrix rate", f"{stage['mfu']:.0%} of {peak}"
        yield f"pooling and copy {precision}: share of encoding", f"{stage['pooling_share']:.1%}"
    if stage := stages.get("write"):
        yield "shard write", f"{stage['rows_per_second']:,.0f} rows/s, {stage['megabytes_per_second']:.0f} MB/s"
    if stage := stages.get("launches"):
        for name in ("tokenize", "write"):
            [seconds, held, longest] = (
                1e3 * np.median([each[key] for each in stage[name]]) for key in ("seconds", "held_seconds", "longest")
            )
            yield f"launches held up beside: {name}", f"{held:.0f} of {seconds:.0f} ms, {longest:.0f} ms at most"
    if stage := stages.get("parquet"):
        for name, speed in stage["tokens_per_second"].items():
            yield name, f"{speed:,.0f} tokens/s"
        yield "Parquet to Parquet: share of the encoder alone", f"{stage['share_of_encoder_alone']:.1%}"
    if stage := stages.get("peers"):
        yield f"texts to vectors: {OURS}", f"{stage['tokens_per_second'][OURS]:,.0f} tokens/s"
        for name, times_faster in stage["ratio"].items():
            yield f"texts to vectors: {name}", f"{stage['tokens_per_second'][name]:,.0f} tokens/s; we are {times_faster:.2f}x as fast"
        for name, reason in stage["not_measured"].items():
            yield f"texts to vectors: {name}", f"not measured: {reason}"
    if stage := stages.get("memory"):
        grown = stage["grown_megabytes"]
        yield (
            f"worker memory, grown over {stage['units']} units",
            f"{grown['host']:+.1f} MB on the host, {grown['device']:+.1f} MB on the device",
        )
    if stage := stages.get("sharing"):
        for workers, speed in stage["tokens_per_second"].items():
            yield f"encoder, workers on the device: {workers}", f"{speed:,.0f} tokens/s in all"
    for one in stages.get("sweep", []):
        label = f"encoder {one['precision']}, batches of {one['batch_tokens']:,}{'' if one['compiled'] else ', not compiled'}"
        measured = f"{one.get('tokens_per_second', 0):,.0f} tokens/s, {one.get('mfu', 0):.0%}"
        yield label, f"not measured: {one['not_measured']}" if "not_measured" in one else measured
    for name, reason in corpus["not_measured"].items():
        yield name, f"not measured: {reason}"


if __name__ == "__main__":
    main()
