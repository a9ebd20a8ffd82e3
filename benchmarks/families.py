"""Families of models beside BERT's, against their peers: `python -m benchmarks.families --help`.

One size for all of them, random weights, which cost the same time as trained ones, and one tokenizer, so that the rows compare encoders.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    DistilBertConfig,
    ElectraConfig,
    ModernBertConfig,
    MPNetConfig,
    NomicBertConfig,
    PreTrainedConfig,
    Qwen3Config,
    T5Config,
    XLMRobertaConfig,
)

from benchmarks.bench import add_shared_options, circumstances, quiet, save
from benchmarks.data import VOCABULARY, BenchModel, give_tokenizer, make_texts
from benchmarks.peers import OURS, peers_stage
from benchmarks.setting import Result, Setting, one_line
from embedding.model.generic import auto_class_of

_MAX_TOKENS = 512
_HEAD_WIDTH = 64
_IDS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
"""Those of the tokenizer."""


def _encoder(layers: int, width: int) -> dict[str, Any]:
    shape = {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": width // _HEAD_WIDTH}
    return shape | {"vocab_size": VOCABULARY, "intermediate_size": 4 * width, "max_position_embeddings": _MAX_TOKENS}


_AFTER_PADDING = _IDS | {"max_position_embeddings": _MAX_TOKENS + 2}

FAMILIES: dict[str, Callable[[int, int], PreTrainedConfig]] = {
    "distilbert": lambda layers, width: DistilBertConfig(
        vocab_size=VOCABULARY, dim=width, n_layers=layers, n_heads=width // _HEAD_WIDTH, hidden_dim=4 * width
    ),
    "electra": lambda layers, width: ElectraConfig(**_encoder(layers, width), embedding_size=width),
    "modernbert": lambda layers, width: ModernBertConfig(
        **_IDS | _encoder(layers, width) | {"intermediate_size": 3 * width // 2}, cls_token_id=2, sep_token_id=3
    ),
    "mpnet": lambda layers, width: MPNetConfig(**_encoder(layers, width) | _AFTER_PADDING | {"pad_token_id": 1}),
    "nomic_bert": lambda layers, width: NomicBertConfig(**_encoder(layers, width)),
    "qwen3": lambda layers, width: Qwen3Config(
        **_IDS | _encoder(layers, width) | {"intermediate_size": 3 * width},
        num_key_value_heads=width // _HEAD_WIDTH // 2,
        head_dim=_HEAD_WIDTH,
    ),
    "t5": lambda layers, width: T5Config(
        vocab_size=VOCABULARY,
        d_model=width,
        d_kv=_HEAD_WIDTH,
        d_ff=4 * width,
        num_layers=layers,
        num_heads=width // _HEAD_WIDTH,
        pad_token_id=_IDS["pad_token_id"],
        eos_token_id=_IDS["eos_token_id"],
    ),
    "xlm-roberta": lambda layers, width: XLMRobertaConfig(**_encoder(layers, width) | _AFTER_PADDING, type_vocab_size=1),
}
"""Model type -> configuration for (layers, width)."""


def main(words: Sequence[str] | None = None) -> Result:
    """Run what the command line asks for."""
    options = _options(words)
    quiet()
    found: Result = {
        **circumstances(words, options),
        "model": {"weights": "random", "layers, width, heads": (options.layers, options.width, options.width // _HEAD_WIDTH)},
        "lengths": options.lengths,
        "families": {},
    }
    for family in options.families:
        with tempfile.TemporaryDirectory() as scratch:
            try:
                measured = _measure(family, options, Path(scratch))
            except Exception as error:  # noqa: BLE001 - a line of the table, not the end of it
                measured = {"not_measured": one_line(error)}
        found["families"][family] = measured
        found["load_average_after"] = os.getloadavg()
        save(found, options.out)
        sys.stdout.write(f"{family}: {_line(measured)}\n")
        gc.collect()
        torch.cuda.empty_cache()
    return found


def _measure(family: str, options: argparse.Namespace, scratch: Path) -> Result:
    model = make_family(family, options.layers, options.width, scratch)
    texts = make_texts(options.lengths, model, options.tokens)
    torch.set_num_threads(options.threads)
    setting = Setting.of(model, texts, options.device, options.precision, options.rounds, options.threads)
    return peers_stage(setting, scratch) | {"texts": len(texts), "batch_tokens": setting.batch_tokens}


def make_family(family: str, layers: int, width: int, scratch: Path) -> BenchModel:
    """A folder with random weights."""
    torch.manual_seed(0)
    config = FAMILIES[family](layers, width)
    auto_class_of(config).from_config(config).save_pretrained(scratch / family)
    give_tokenizer(scratch / family)
    return BenchModel(family, scratch / family, _MAX_TOKENS, layers, width, width // _HEAD_WIDTH)


def _line(measured: Result) -> str:
    if "tokens_per_second" not in measured:
        return f"not measured: {measured['not_measured']}"
    ratios = [f"{times_faster:.2f}x {name}" for name, times_faster in measured["ratio"].items()]
    missing = [f"{name} not measured: {reason}" for name, reason in measured["not_measured"].items()]
    return "; ".join([f"{measured['tokens_per_second'][OURS]:,.0f} tokens/s ({measured['batches']})", *ratios, *missing])


def _options(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.families", description=__doc__)
    add_shared_options(parser)
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--layers", type=int)
    parser.add_argument("--width", type=int, help=f"of a token, a multiple of {2 * _HEAD_WIDTH}")
    parser.add_argument("--lengths", help="demo, lognormal:MEDIAN or uniform:LOW-HIGH, in tokens")
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"])
    options = parser.parse_args(words)
    cuda = options.device == "cuda"
    options.layers = options.layers or (12 if cuda else 6)
    options.width = options.width or (768 if cuda else 384)
    options.lengths = options.lengths or ("uniform:50-300" if cuda else "lognormal:32")
    options.precision = options.precision or ("bf16" if cuda else "fp32")
    options.tokens = options.tokens or (1_000_000 if cuda else 8_000)
    options.rounds = options.rounds or 5
    return options


if __name__ == "__main__":
    main()
