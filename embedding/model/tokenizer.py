"""Texts -> token ids, flat and without padding."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from embedding.errors import ModelError
from embedding.model.batching import offsets_of
from embedding.model.spec import ModelSpec

_CHUNK_CHARS = 1 << 20
"""Text that is handed to `tokenizers` at once: its own records of a token are some hundred bytes large."""

_HEAD_CHARS_PER_TOKEN = 16
"""First guess of how much of a long text holds max_tokens tokens; English has 4 to 5 characters a token."""

_WORDWISE = frozenset(["BertPreTokenizer", "ByteLevel", "Digits", "Metaspace", "Punctuation", "Whitespace", "WhitespaceSplit"])
_LOCAL_NORMALIZERS = frozenset(
    ["BertNormalizer", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "Precompiled", "Prepend", "Strip", "StripAccents"]
)


@dataclass(frozen=True)
class TokenizedTexts:
    """Token ids of R texts: row r is `ids[offsets[r]:offsets[r + 1]]`, special tokens included."""

    ids: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]
    truncated: npt.NDArray[np.bool_]
    """[R]; True where the text had more than max_tokens tokens."""

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """[R] tokens in each row."""
        return np.diff(self.offsets)


class Tokenizer:
    """The model's own tokenizer, as sentence-transformers applies it. Safe to call from several threads."""

    def __init__(self, spec: ModelSpec, folder: Path) -> None:
        """Raises ModelError: the tokenizer cannot be loaded, or its rows need more than ids."""
        slow = _load(folder / spec.transformer_path, spec)
        self._fast: FastTokenizer = slow.backend_tokenizer
        self._fast.no_padding()
        self._fast.no_truncation()  # done in numpy below: `tokenizers` would keep the rest of a long text too
        if spec.lower_case:
            _lowercase_first(self._fast)
        self._prompt = spec.prompt
        self._max_tokens = spec.max_tokens
        self._cuts_left = slow.truncation_side == "left"
        self._prefix, self._suffix = self._special_tokens(slow, spec)
        self._head_chars = 0 if self._cuts_left or not _splits_before_spaces(self._fast) else _HEAD_CHARS_PER_TOKEN * spec.max_tokens
        self.prompt_tokens = 0 if spec.include_prompt or not spec.prompt else self._count_prompt_tokens(slow)

    def __call__(self, texts: Sequence[str]) -> TokenizedTexts:
        """Tokenize the prompt followed by each text, cut to max_tokens."""
        rows: list[npt.NDArray[np.int32]] = []
        truncated: list[bool] = []
        chunk: list[str] = []
        size = 0
        for text in texts:
            chunk.append(self._prompt + text)
            size += len(text)
            if size >= _CHUNK_CHARS:
                self._add_rows(chunk, rows, truncated)
                chunk, size = [], 0
        self._add_rows(chunk, rows, truncated)
        ids = np.concatenate(rows) if rows else np.empty(0, dtype=np.int32)
        lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
        return TokenizedTexts(ids, offsets_of(lengths), np.array(truncated, dtype=np.bool_))

    def _add_rows(self, texts: list[str], rows: list[npt.NDArray[np.int32]], truncated: list[bool]) -> None:
        heads = [self._head(text, self._head_chars) for text in texts]
        for text, head, encoding in zip(texts, heads, self._fast.encode_batch_fast(heads), strict=True):
            ids = encoding.ids
            window = self._head_chars
            while len(head) < len(text) and len(ids) <= self._max_tokens:
                window *= 8
                head = self._head(text, window)
                ids = self._fast.encode(head).ids
            truncated.append(len(ids) > self._max_tokens)
            rows.append(np.array(self._cut(ids), dtype=np.int32))

    def _head(self, text: str, window: int) -> str:
        """The beginning of a long text, up to a space where no tokenizer we do this for joins what is before and after."""
        if not window or len(text) <= window:
            return text
        cut = text.find(" ", window)
        while cut != -1 and not _is_plain(text[cut - 1]):
            cut = text.find(" ", cut + 1)
        return text if cut == -1 else text[:cut]

    def _cut(self, ids: list[int]) -> list[int]:
        """Keep max_tokens, among them all special tokens that frame the row, as `tokenizers` does."""
        if len(ids) <= self._max_tokens:
            return ids
        if self._cuts_left:
            return ids[: self._prefix] + ids[len(ids) - self._max_tokens + self._prefix :]
        return ids[: self._max_tokens - self._suffix] + ids[len(ids) - self._suffix :]

    def _special_tokens(self, slow: PreTrainedTokenizerFast, spec: ModelSpec) -> tuple[int, int]:
        """How many special tokens come before and after a text's own."""
        probe = self._fast.encode("a")
        if any(probe.type_ids) and "token_type_ids" in slow.model_input_names:
            raise ModelError(f"the tokenizer of {spec.source.name!r} gives tokens types, which this job cannot use; choose another model")
        mask = probe.special_tokens_mask
        own = mask.index(0) if 0 in mask else len(mask)
        prefix, suffix = own, len(mask) - own - mask.count(0)
        if prefix + suffix >= spec.max_tokens:
            raise ModelError(f"--max-tokens={spec.max_tokens} leaves no token beside the {prefix + suffix} special ones; raise it")
        return prefix, suffix

    def _count_prompt_tokens(self, slow: PreTrainedTokenizerFast) -> int:
        """As sentence-transformers counts: the prompt alone, without a special token at its end."""
        ids = self._cut(self._fast.encode(self._prompt).ids)
        return len(ids) - (ids[-1] in slow.all_special_ids)


def _load(folder: Path, spec: ModelSpec) -> PreTrainedTokenizerFast:
    try:
        found = AutoTokenizer.from_pretrained(folder, trust_remote_code=spec.trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"the tokenizer of {spec.source.name!r} cannot be loaded ({reason}); check its files") from error
    if not isinstance(found, PreTrainedTokenizerFast):
        raise ModelError(f"the tokenizer of {spec.source.name!r} has no tokenizer.json; AutoTokenizer converts it by loading and saving")
    return found


def _lowercase_first(fast: FastTokenizer) -> None:
    """Lowercase before any other normalization, as sentence-transformers does for do_lower_case."""
    present = fast.normalizer
    if any(step["type"] == "Lowercase" for step in _steps(json.loads(fast.to_str())["normalizer"], "normalizers")):
        return
    fast.normalizer = normalizers.Lowercase() if present is None else normalizers.Sequence([normalizers.Lowercase(), present])


def _splits_before_spaces(fast: FastTokenizer) -> bool:
    """Whether a text cut before a space gives the first tokens of the whole text.

    True where words are cut at spaces before anything else looks at them, the normalizers look no further than a few
    characters, and no added token holds a space. `_head` then cuts only after a plain ASCII character, so that no normalizer
    joins it with the space either.
    """
    settings = json.loads(fast.to_str())
    splitters = _steps(settings["pre_tokenizer"], "pretokenizers")
    replaces = [step for step in _steps(settings["normalizer"], "normalizers") if step["type"] == "Replace"]
    others = [step["type"] for step in _steps(settings["normalizer"], "normalizers") if step["type"] != "Replace"]
    return (
        any(_is_wordwise(step) for step in splitters)
        and all(step["type"] in _WORDWISE for step in splitters)
        and _LOCAL_NORMALIZERS.issuperset(others)
        and all(step["pattern"] in ({"Regex": " {2,}"}, {"String": "``"}, {"String": "''"}) for step in replaces)
        and not any(" " in token["content"] for token in settings["added_tokens"])
    )


def _is_wordwise(step: dict[str, Any]) -> bool:
    if step["type"] == "ByteLevel":
        return bool(step.get("use_regex", True))
    if step["type"] == "Metaspace":
        return bool(step.get("split", True))
    return step["type"] in {"BertPreTokenizer", "Whitespace", "WhitespaceSplit"}


def _steps(settings: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    if settings is None:
        return []
    return list(settings[key]) if settings["type"] == "Sequence" else [settings]


def _is_plain(character: str) -> bool:
    return character.isascii() and character.isprintable() and character != " "
