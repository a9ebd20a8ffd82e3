"""Tiny models with random weights and tokenizers trained on the spot, saved as ordinary model folders."""

from __future__ import annotations

import inspect
import json
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AlbertConfig,
    AutoModel,
    BertConfig,
    DistilBertConfig,
    ElectraConfig,
    Gemma3TextConfig,
    MistralConfig,
    ModernBertConfig,
    MPNetConfig,
    NomicBertConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    RobertaConfig,
    T5Config,
    T5EncoderModel,
    XLMRobertaConfig,
)

from embedding.config import JobConfig
from embedding.model.spec import ModelSpec, resolve_model

VOCABULARY = 400
POSITIONS = 160
WIDTH = 32

TEXTS = [
    "",
    "a",
    "Zebra stripes are not random.",
    "one two three four five six seven eight nine ten",
    "a text that spells <pad> and [PAD], <pad><pad> twice, and goes on",
    *(inspect.getdoc(function) or "" for function in vars(inspect).values() if callable(function)),
]
"""About a hundred real texts of all lengths, with an empty one."""


def tokenizer(kind: str, *, max_tokens: int = POSITIONS) -> PreTrainedTokenizerFast:
    """WordPiece as BERT's, byte-level BPE as RoBERTa's, or Unigram as XLM-R's."""
    special = {"wordpiece": ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]}.get(kind, ["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    trained = {"wordpiece": _wordpiece, "bpe": _bpe, "unigram": _unigram}[kind](special)
    if kind == "wordpiece":
        padding, unknown, first, last, mask = special
    else:
        first, padding, last, unknown, mask = special
    trained.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}", special_tokens=[(token, trained.token_to_id(token)) for token in (first, last)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=trained,
        pad_token=padding,
        unk_token=unknown,
        cls_token=first,
        sep_token=last,
        mask_token=mask,
        model_max_length=max_tokens,
    )


def _wordpiece(special: list[str]) -> Tokenizer:
    made = Tokenizer(models.WordPiece(unk_token=special[1]))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    made.train_from_iterator(TEXTS, trainers.WordPieceTrainer(vocab_size=VOCABULARY, special_tokens=special, show_progress=False))
    return made


def _bpe(special: list[str]) -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(TEXTS, trainer)
    return made


def _unigram(special: list[str]) -> Tokenizer:
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=VOCABULARY, special_tokens=special, unk_token=special[3], initial_alphabet=list(string.printable), show_progress=False
    )
    made.train_from_iterator(TEXTS, trainer)
    return made


_BERT_LIKE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": POSITIONS,
    "initializer_range": 0.3,  # large, so that each token's vector depends on the others and on its position
}
_IDS: dict[str, Any] = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
_AFTER_PADDING: dict[str, Any] = {"max_position_embeddings": POSITIONS + 2, **_IDS}

FAMILIES: dict[str, tuple[str, Callable[[], PreTrainedConfig]]] = {
    "bert": ("wordpiece", lambda: BertConfig(**_BERT_LIKE)),
    "electra": ("wordpiece", lambda: ElectraConfig(**_BERT_LIKE, embedding_size=16)),
    "albert": ("wordpiece", lambda: AlbertConfig(**_BERT_LIKE, embedding_size=16)),
    "distilbert": (
        "wordpiece",
        lambda: DistilBertConfig(
            vocab_size=VOCABULARY, dim=WIDTH, n_layers=2, n_heads=4, hidden_dim=64, max_position_embeddings=POSITIONS, initializer_range=0.3
        ),
    ),
    "roberta": ("bpe", lambda: RobertaConfig(**(_BERT_LIKE | _AFTER_PADDING))),
    "xlm-roberta": ("unigram", lambda: XLMRobertaConfig(**(_BERT_LIKE | _AFTER_PADDING))),
    "mpnet": ("bpe", lambda: MPNetConfig(**(_BERT_LIKE | _AFTER_PADDING))),
    "modernbert": (
        "bpe",
        lambda: ModernBertConfig(
            **(_BERT_LIKE | {"num_hidden_layers": 4, "global_attn_every_n_layers": 2}),
            local_attention=16,
            initializer_cutoff_factor=2.0,
            pad_token_id=1,
            bos_token_id=0,
            eos_token_id=2,
            cls_token_id=0,
            sep_token_id=2,
        ),
    ),
    "nomic_bert": ("wordpiece", lambda: NomicBertConfig(**_BERT_LIKE)),
    "qwen3": (
        "bpe",
        lambda: Qwen3Config(**_BERT_LIKE, **_IDS, num_key_value_heads=2, head_dim=8),
    ),
    "mistral": ("bpe", lambda: MistralConfig(**_BERT_LIKE, **_IDS, num_key_value_heads=2, sliding_window=16)),
    "gemma3_text": (
        "bpe",
        lambda: Gemma3TextConfig(
            **_BERT_LIKE,
            **_IDS,
            num_key_value_heads=1,
            head_dim=16,
            query_pre_attn_scalar=16,
            use_bidirectional_attention=True,  # as EmbeddingGemma
            sliding_window=32,
            layer_types=["sliding_attention", "full_attention"],
        ),
    ),
    "t5": (
        "unigram",
        lambda: T5Config(vocab_size=VOCABULARY, d_model=WIDTH, d_kv=8, d_ff=64, num_layers=2, num_heads=4, pad_token_id=1, eos_token_id=2),
    ),
}
"""Model type -> (kind of tokenizer, configuration)."""


def save_model(folder: Path, family: str) -> Path:
    """A bare transformers folder."""
    kind, make_config = FAMILIES[family]
    torch.manual_seed(0)
    config = make_config()
    model = T5EncoderModel(config) if isinstance(config, T5Config) else AutoModel.from_config(config)
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if name.endswith("bias"):  # zeros otherwise, which would hide a bias that is not applied
                weights.normal_(std=0.1)
    model.save_pretrained(folder)
    tokenizer(kind).save_pretrained(folder)
    if family == "qwen3":  # as published: weights of a whole causal language model
        saved = json.loads((folder / "config.json").read_text())
        write_json(folder / "config.json", saved | {"architectures": ["Qwen3ForCausalLM"]})
    return folder


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def spec_of(folder: Path, **options: Any) -> ModelSpec:
    config = JobConfig.build(input=("corpus.parquet",), output="vectors", model=str(folder), **options)
    return resolve_model(config, precision="fp32")
