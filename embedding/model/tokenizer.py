"""Texts -> token ids, flat and without padding."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from huggingface_hub.errors import StrictDataclassError
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from embedding.errors import ModelError
from embedding.model.batching import distinct_rows, gather_rows, join_rows, longest_first, offsets_of, split_rows
from embedding.model.spec import ModelSpec
from embedding.model.wordpiece import Encode, Ids, Offsets, by_nanotoken

log = logging.getLogger(__name__)

_PARITY_TEXTS = 1000
_PARITY_CHARS = 1 << 14
"""Of each text: the reference takes a minute, and a hundred times the text, for 10 MB without a place to cut."""

_CHUNK_CHARS = 1 << 20
"""Text that is handed to `tokenizers` at once: its own records of a token are some hundred bytes large."""

_HEAD_CHARS_PER_TOKEN = 16
"""First guess of how much of a long text holds max_tokens tokens; English has 4 to 5 characters a token."""

_CLOSED = r"[!-~\u00a1-\u00ac\u00ae-\u05ff\u0606-\u06dc\u06de-\u070e\u0710-\u088f\u0892-\u08e1\u08e3-\u0d4d\u0d4f-\u1fff\u2e80-\ud7ff]"
"""Characters that no normalizer joins with a blank after them; the gaps are format characters and such that are put before another."""
_CUT_BEFORE_SPACE = rf"(?<={_CLOSED})(?= )"
_CUT_BEFORE_BLANK = rf"(?<={_CLOSED})(?=[ \t\n\r])"
_CUT_AS_BERT = rf"{_CUT_BEFORE_BLANK}|(?<=[!-/:-@\[-`{{-~ \t\n\r])(?=[ -~\t\n\r])|(?<=[\u4e00-\u9fff])(?=[\u4e00-\u9fff])"
"""BERT's words end at blanks, and every ASCII punctuation mark and every ideograph is a word of its own."""

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

    @cached_property
    def distinct(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The first row of each kind, and for every row the place of its kind among them."""
        return distinct_rows(self.ids, self.offsets)

    @property
    def once(self) -> TokenizedTexts:
        """Rows of the same tokens once: these themselves where no two are the same."""
        rows, places_R = self.distinct
        return self._firsts if len(rows) < len(places_R) else self  # not cached: what holds itself stays until Python looks for cycles

    @cached_property
    def _firsts(self) -> TokenizedTexts:
        return self.take(self.distinct[0])

    @cached_property
    def longest_first(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """(row numbers by falling length, the flat ids of the rows in that order, their offsets)."""
        order = longest_first(self.lengths)
        return order, *gather_rows(self.ids, self.offsets, order)

    def prepare(self) -> None:
        """Make what encoding the rows needs of them, and keep it: for who wants that done before a device is taken."""
        _ = self.once.longest_first

    def take(self, rows: npt.NDArray[np.int64]) -> TokenizedTexts:
        """These rows, in that order."""
        return TokenizedTexts(*gather_rows(self.ids, self.offsets, rows), self.truncated[rows])


class Tokenizer:
    """The model's own tokenizer, as sentence-transformers applies it. Safe to call from several threads."""

    def __init__(self, spec: ModelSpec, folder: Path) -> None:
        """Raises ModelError: the tokenizer cannot be loaded, or its rows need more than ids."""
        slow = _load(folder / spec.transformer_path, spec)
        reference: FastTokenizer = slow.backend_tokenizer
        reference.no_padding()
        reference.no_truncation()  # done in numpy below: `tokenizers` would keep the rest of a long text too
        if spec.lower_case:
            _lowercase_first(reference)
        self._prompt = spec.prompt
        self._max_tokens = spec.max_tokens
        self._cuts_left = slow.truncation_side == "left"
        self._prefix, self._suffix = _special_tokens(reference, slow, spec)
        self._cuts = None if self._cuts_left else _Cuts.of(reference)
        self._head_chars = None if self._cuts is None else _HEAD_CHARS_PER_TOKEN * spec.max_tokens
        self._exact = _by_tokenizers(reference)
        self._encode = by_nanotoken(reference) or self._exact
        self._checked = not self.is_fast
        self.prompt_tokens = 0 if spec.include_prompt or not spec.prompt else self._count_prompt_tokens(slow)

    @property
    def is_fast(self) -> bool:
        """Whether nanotoken does the work, and not `tokenizers`."""
        return self._encode is not self._exact

    def __call__(self, texts: Sequence[str]) -> TokenizedTexts:
        """Tokenize the prompt followed by each text, cut to max_tokens.

        The first call compares the fast path with the reference on the first of its texts.
        """
        if not self._checked:
            self.check_parity([text[:_PARITY_CHARS] for text in texts[:_PARITY_TEXTS]])
        return self._tokenize(texts, self._encode)

    def by_reference(self, texts: Sequence[str]) -> TokenizedTexts:
        """The same by `tokenizers`, whether or not the fast path is trusted."""
        return self._tokenize(texts, self._exact)

    def lengths(self, texts: Sequence[str]) -> Offsets:
        """[R] tokens of the prompt followed by each text, special tokens included, however many. One text at least."""
        return np.diff(self._encode([self._prompt + text for text in texts])[1])

    def own_lengths(self, texts: list[str]) -> Offsets:
        """[R] tokens of each text alone: without prompt and special tokens, however many. One text at least."""
        return np.diff(self._encode(texts)[1]) - self._prefix - self._suffix

    def check_parity(self, texts: Sequence[str]) -> None:
        """Give up the fast path where it differs from the reference on one of these texts, and say so in the log."""
        found, expected = (self._tokenize(texts, encode) for encode in (self._encode, self._exact))
        if not (np.array_equal(found.offsets, expected.offsets) and np.array_equal(found.ids, expected.ids)):
            log.warning("nanotoken splits texts of this corpus differently from tokenizers; using the slower tokenizers instead")
            self._encode = self._exact
        self._checked = True

    def _tokenize(self, texts: Sequence[str], encode: Encode) -> TokenizedTexts:
        chunks = [self._cut(*self._encode_heads(chunk, encode, self._head_chars)) for chunk in self._chunks(texts)]
        if not chunks:
            return TokenizedTexts(np.empty(0, np.int32), np.zeros(1, np.int64), np.empty(0, np.bool_))
        ids, lengths, truncated = (np.concatenate(parts) for parts in zip(*((c.ids, c.lengths, c.truncated) for c in chunks), strict=True))
        return TokenizedTexts(ids, offsets_of(lengths), truncated)

    def _chunks(self, texts: Sequence[str]) -> Iterator[list[str]]:
        """The prompted texts, so many at a time that their heads have about _CHUNK_CHARS characters."""
        chunk: list[str] = []
        size = 0
        for text in texts:
            chunk.append(self._prompt + text)
            size += len(text) if self._head_chars is None else min(len(text), self._head_chars)
            if size >= _CHUNK_CHARS:
                yield chunk
                chunk, size = [], 0
        if chunk:
            yield chunk

    def _encode_heads(self, texts: list[str], encode: Encode, head_chars: int | None) -> tuple[Ids, Offsets]:
        """All tokens of the head of each text; a head without tokens enough to fill its row grows."""
        heads = texts if self._cuts is None or head_chars is None else [self._cuts.head(text, head_chars) for text in texts]
        ids, offsets = encode(heads)
        enough = (np.diff(offsets) > self._max_tokens).tolist()
        unfilled = [row for row, text in enumerate(texts) if not enough[row] and len(heads[row]) < len(text)]
        if head_chars is None or not unfilled:
            return ids, offsets
        rows = split_rows(ids, offsets)
        for row in unfilled:
            rows[row], _ = self._encode_heads([texts[row]], encode, 8 * head_chars)
        return join_rows(rows)

    def _cut(self, ids: Ids, offsets: Offsets) -> TokenizedTexts:
        """Keep max_tokens of each row, among them all special tokens that frame it, as `tokenizers` does."""
        lengths = np.diff(offsets)
        excess = lengths - self._max_tokens
        truncated = excess > 0
        if not truncated.any():
            return TokenizedTexts(ids, offsets, truncated)
        place = np.arange(len(ids)) - np.repeat(offsets[:-1], lengths)
        first_gone = self._prefix if self._cuts_left else self._max_tokens - self._suffix
        kept = (place < first_gone) | (place >= first_gone + np.repeat(excess.clip(min=0), lengths))
        return TokenizedTexts(ids[kept], offsets_of(lengths.clip(max=self._max_tokens)), truncated)

    def _count_prompt_tokens(self, slow: PreTrainedTokenizerFast) -> int:
        """As sentence-transformers counts: the prompt alone, without a special token at its end."""
        prompt = self._cut(*self._exact([self._prompt])).ids
        return len(prompt) - (int(prompt[-1]) in slow.all_special_ids)


@dataclass(frozen=True)
class _Cuts:
    """Where a text can be cut so that what comes before gives the first tokens of the whole text."""

    pattern: re.Pattern[str]
    added_tokens: tuple[str, ...]
    """Found in a text before it is cut into words, so that no cut may go through one."""

    @classmethod
    def of(cls, fast: FastTokenizer) -> _Cuts | None:
        """None where there may be no such place.

        Words must be cut at blanks before anything else looks at them, the normalizers look no further than a few characters,
        and no added token holds a blank or depends on what is beside it.
        """
        settings = json.loads(fast.to_str())
        splitters = _steps(settings["pre_tokenizer"], "pretokenizers")
        steps = _steps(settings["normalizer"], "normalizers")
        replaces = [step for step in steps if step["type"] == "Replace"]
        tokens = settings["added_tokens"]
        possible = (
            any(_is_wordwise(step) for step in splitters)
            and all(step["type"] in _WORDWISE for step in splitters)
            and _LOCAL_NORMALIZERS.issuperset(step["type"] for step in steps if step["type"] != "Replace")
            and all(step["pattern"] in ({"Regex": " {2,}"}, {"String": "``"}, {"String": "''"}) for step in replaces)
            and not any(token["single_word"] or re.search(r"\s", token["content"]) for token in tokens)
        )
        if not possible:
            return None
        pattern = _CUT_BEFORE_BLANK
        if any(step["type"] == "Metaspace" for step in splitters):
            pattern = _CUT_BEFORE_SPACE
        elif not replaces and {step["type"] for step in splitters} == {"BertPreTokenizer"}:
            pattern = _CUT_AS_BERT if any(step.get("handle_chinese_chars") for step in steps) else _CUT_BEFORE_BLANK
        return cls(re.compile(pattern), tuple(token["content"] for token in tokens))

    def head(self, text: str, head_chars: int) -> str:
        """The beginning of a long text: `head_chars` characters, and on to the next place where it can be cut."""
        if len(text) <= head_chars:
            return text
        for match in self.pattern.finditer(text, head_chars):
            if not self._goes_through_a_token(text, match.start()):
                return text[: match.start()]
        return text

    def _goes_through_a_token(self, text: str, cut: int) -> bool:
        return any(token in text[max(0, cut - len(token) + 1) : cut + len(token) - 1] for token in self.added_tokens)


def _by_tokenizers(reference: FastTokenizer) -> Encode:
    def encode(texts: list[str]) -> tuple[Ids, Offsets]:
        return join_rows([np.array(encoding.ids, dtype=np.int32) for encoding in reference.encode_batch_fast(texts)])

    return encode


def _load(folder: Path, spec: ModelSpec) -> PreTrainedTokenizerFast:
    try:
        found = AutoTokenizer.from_pretrained(folder, trust_remote_code=spec.trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError, StrictDataclassError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"the tokenizer of {spec.source.name!r} cannot be loaded ({reason}); check its files") from error
    if not isinstance(found, PreTrainedTokenizerFast):
        raise ModelError(
            f"the tokenizer of {spec.source.name!r} has no tokenizer.json; load it with AutoTokenizer and save it again to create one"
        )
    return found


def _special_tokens(reference: FastTokenizer, slow: PreTrainedTokenizerFast, spec: ModelSpec) -> tuple[int, int]:
    """How many special tokens come before and after a text's own."""
    probe = reference.encode("a")
    if any(probe.type_ids) and "token_type_ids" in slow.model_input_names:
        raise ModelError(
            f"the tokenizer of {spec.source.name!r} gives types to tokens, which this job does not support; choose another model"
        )
    mask = probe.special_tokens_mask
    own = mask.index(0) if 0 in mask else len(mask)
    prefix, suffix = own, len(mask) - own - mask.count(0)
    if prefix + suffix >= spec.max_tokens:
        raise ModelError(f"--max-tokens={spec.max_tokens} leaves no room next to the {prefix + suffix} special tokens; raise it")
    return prefix, suffix


def _lowercase_first(fast: FastTokenizer) -> None:
    """Lowercase before any other normalization, as sentence-transformers does for do_lower_case."""
    present = fast.normalizer
    if any(step["type"] == "Lowercase" for step in _steps(json.loads(fast.to_str())["normalizer"], "normalizers")):
        return
    fast.normalizer = normalizers.Lowercase() if present is None else normalizers.Sequence([normalizers.Lowercase(), present])


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
