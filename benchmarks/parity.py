"""Whether the fast tokenizer gives the ids of `tokenizers`, on real texts and on random ones: `python -m benchmarks.parity --help`.

A start-up check on a few rows of the corpus guards every worker; this is the long proof behind it.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from benchmarks.bench import circumstances
from benchmarks.data import find_model
from benchmarks.setting import Result
from embedding.model.batching import split_rows
from embedding.model.tokenizer import TokenizedTexts, Tokenizer

_AT_ONCE = 20_000
_SEED = 20_261_123
_RANGES = {
    "any character": (0x0, 0x110000),
    "basic plane": (0x0, 0x10000),
    "Latin and marks": (0x20, 0x370),
    "right to left": (0x590, 0x900),
    "Indic": (0x900, 0xE00),
    "CJK and Kana": (0x3000, 0xA000),
    "Hangul": (0x1100, 0x1200),
    "compatibility forms": (0xF900, 0x10000),
    "symbols and emoji": (0x1F000, 0x1FB00),
}
_SURROGATES = range(0xD800, 0xE000)
"""No text that Python can encode holds one."""
_BETWEEN = [" ", "", "", "\u0301", "\u200d", "[SEP]", "don't", "a", "\t"]


def main(words: Sequence[str] | None = None) -> Result:
    """Run what the command line asks for."""
    options = _options(words)
    begun = circumstances(words, options)
    with tempfile.TemporaryDirectory() as scratch:
        model = find_model(options.model, Path(scratch))
        tokenizer = Tokenizer(model.spec("fp32"), model.folder)
        tokenizer(["a text"])  # the start-up check
        if not tokenizer.is_fast:
            raise SystemExit("the fast tokenizer does not read this model's vocabulary; there is nothing to compare")
        found: Result = {
            **begun,
            "model": model.name,
            "real": compare(tokenizer, islice(real_texts(options.corpus), options.rows)),
            "random": compare(tokenizer, random_texts(options.random)),
        }
    for name in ("real", "random"):
        part = found[name]
        speed = f"{part['seconds']['tokenizers'] / part['seconds']['nanotoken']:.1f} times as fast"
        sys.stdout.write(f"{name}: {part['texts']:,} texts, {part['tokens']:,} tokens, {part['mismatches']} cut otherwise, {speed}\n")
    if options.out:
        options.out.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    return found


def real_texts(files: Sequence[Path]) -> Iterator[str]:
    """The distinct lines and paragraphs, and the whole texts, of the column `text` of Parquet files."""
    seen = set[str]()
    for file in files:
        for text in pq.read_table(file, columns=["text"])["text"].to_pylist():
            for part in (text, *text.split("\n\n"), *text.split("\n")):
                if part.strip() and part not in seen:
                    seen.add(part)
                    yield part


def random_texts(count: int) -> Iterator[str]:
    """Words of characters drawn from one part of Unicode each, with what is hard to cut between them."""
    choose = random.Random(_SEED)
    ranges = list(_RANGES.values())
    for _ in range(count):
        words = []
        for _ in range(choose.randint(1, 12)):
            low, high = choose.choice(ranges)
            drawn = (choose.randrange(low, high) for _ in range(choose.randint(1, 8)))
            words.append("".join(chr(code) for code in drawn if code not in _SURROGATES) + choose.choice(_BETWEEN))
        yield choose.choice(["", " "]).join(words)


def compare(tokenizer: Tokenizer, texts: Iterator[str]) -> Result:
    """Tokenize all texts both ways, cut and framed as the job does it."""
    ways: dict[str, Callable[[list[str]], TokenizedTexts]] = {"nanotoken": tokenizer, "tokenizers": tokenizer.by_reference}
    seconds = dict.fromkeys(ways, 0.0)
    rows = tokens = 0
    different: list[str] = []
    while chunk := list(islice(texts, _AT_ONCE)):
        ids = []
        for name, tokenize in ways.items():
            started = time.perf_counter()
            found = tokenize(chunk)
            seconds[name] += time.perf_counter() - started
            ids.append(split_rows(found.ids, found.offsets))
        rows, tokens = rows + len(chunk), tokens + sum(map(len, ids[0]))
        different += [text for text, ours, theirs in zip(chunk, *ids, strict=True) if not np.array_equal(ours, theirs)]
    return {"texts": rows, "tokens": tokens, "mismatches": len(different), "first": different[:20], "seconds": seconds}


def _options(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parity", description=__doc__)
    parser.add_argument("corpus", nargs="+", type=Path, help="Parquet files with a column text")
    parser.add_argument("--model", default="minilm", help="the folder of a model, or minilm; tiny is for the tests")
    parser.add_argument("--rows", type=int, default=1_000_000, help="real texts at most")
    parser.add_argument("--random", type=int, default=100_000, help="random texts")
    parser.add_argument("--note", default="", help="kept in the result, such as what else ran on the machine")
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    parser.set_defaults(device="cpu", threads=0, rounds=1)
    return parser.parse_args(words)


if __name__ == "__main__":
    main()
