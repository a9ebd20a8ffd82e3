"""Long texts -> pieces that fit the model's window: slices of the text that cut no word.

What is encoded of a text that is too long is the prompt followed by a slice of it, tokenized anew, so that anyone can make the
vector again from the slice. A text that fits is one piece, the whole of it.
"""

# Shape suffixes: R texts, P pieces, W words.
# ruff: noqa: N815

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import numpy as np
import numpy.typing as npt

from embedding.errors import ModelError
from embedding.model.batching import offsets_of
from embedding.model.spec import LongTexts
from embedding.model.tokenizer import TokenizedTexts, Tokenizer

Int64Array = npt.NDArray[np.int64]

_CLAUSE_MARKS = "\u3001\u3002\uff01\uff0c\uff1b\uff1f\uff61\uff64"
"""End a clause in scripts that put no blank between words; no word goes on behind one."""
_CLOSERS = "\"')\\]}\u00bb\u2019\u201d\u300d\u300f\u3011\uff09\uff5d"
_WORD = re.compile(rf"[^\s{_CLAUSE_MARKS}]*+[{_CLAUSE_MARKS}]++[{_CLOSERS}]*+|[^\s{_CLAUSE_MARKS}]++")
_SENTENCE_END = re.compile(rf"[.!?\u2026\u3002\uff01\uff1f\uff61][{_CLOSERS}]*$")
_JOINER = "\u200d"

_WORDS_AT_ONCE = 1 << 14
"""`tokenizers` keeps about a kilobyte of each word that it is handed."""
_WORD_CHARS_PER_TOKEN = 16
"""A run without a blank that is longer than this times max_tokens is no word, and reading it at once may cost a hundred times its size."""
_PIECE_CHARS_PER_TOKEN = 4
"""First guess of how much of such a run fits."""
_PART_TOKENS = 1 << 25
"""Tokens that are encoded at once: 65,536 rows of 512. A unit of long texts has more, and sorting copies what it sorts."""


@dataclass(frozen=True)
class Pieces:
    """What is encoded of R texts: P pieces in the order of the texts, those of a text one after another."""

    tokens: TokenizedTexts
    texts_P: Int64Array
    """The number of each piece's text."""
    starts_P: Int64Array
    """Characters of the text before the piece."""
    ends_P: Int64Array
    too_long: Int64Array
    """Numbers of the texts that are to be rejected; they have no piece."""

    @cached_property
    def parts(self) -> list[TokenizedTexts]:
        """The pieces' tokens, so many at a time that none has many more than _PART_TOKENS; one part of all of them as a rule."""
        if len(self.tokens.ids) <= _PART_TOKENS:
            return [self.tokens]
        part_P = self.tokens.offsets[:-1] // _PART_TOKENS
        return [self.tokens.take(rows) for rows in np.split(np.arange(len(part_P)), np.flatnonzero(np.diff(part_P)) + 1)]


@dataclass(frozen=True)
class _Words:
    starts_W: Int64Array
    ends_W: Int64Array
    total: Int64Array
    """[W + 1] tokens of all words before each, the blanks before a word counted with it."""
    stops: Int64Array
    """Numbers of words, ascending, before which a piece may end; the last is W."""


class Windows:
    """Cuts texts to what the model reads at once. Safe to call from several threads."""

    def __init__(self, tokenizer: Tokenizer, max_tokens: int, long: LongTexts) -> None:
        """Raises ModelError: the prompt leaves no room for a text that is to be cut."""
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        self._long = long
        self._framing = int(tokenizer.lengths([""])[0])
        if long.cuts and self._framing >= max_tokens:
            taken = f"the prompt and the special tokens take {self._framing} of max_tokens={max_tokens}"
            raise ModelError(f"{taken} and leave none for the text; shorten the prompt or raise --max-tokens")

    def __call__(self, texts: Sequence[str]) -> Pieces:
        """The pieces of the texts, with their tokens."""
        tokens = self._tokenizer(texts)
        rows, ends = np.arange(len(texts)), np.fromiter(map(len, texts), np.int64, len(texts))
        over = np.flatnonzero(tokens.truncated) if self._long.how != "truncate" else rows[:0]
        if self._long.cuts and len(over):
            pieces = self._pieces(texts, tokens, over)
        elif len(over):
            rows = np.flatnonzero(~tokens.truncated)
            pieces = Pieces(tokens.take(rows), rows, np.zeros_like(rows), ends[rows], over)
        else:
            pieces = Pieces(tokens, rows, np.zeros_like(rows), ends, over)
        for part in pieces.parts:
            part.prepare()
        return pieces

    def cut(self, text: str) -> tuple[list[tuple[int, int]], TokenizedTexts]:
        """Start and end of each piece of a text, in characters, and the tokens of the pieces.

        Pieces begin and end at words: runs without a blank, which also end behind the punctuation of scripts that put no blank there.
        A word that does not fit on its own is cut inside, between characters. Blanks at the ends of a piece are left out of it; every
        other character is in a piece. A piece is as long as fits, its words counted one by one; the overlap with the piece before is as
        long as is allowed, and nothing where it leaves no room for what comes next.
        """
        if not text.strip():
            return [(0, 0)], self._tokenizer([""])
        words = self._words(text)
        window = self._max_tokens
        while True:
            groups = self._groups(text, words, window)
            spans = [(int(words.starts_W[first]), int(words.ends_W[end - 1])) for first, end in groups]
            tokens = self._tokenizer([text[start:end] for start, end in spans])
            if not any(cut and end - first > 1 for cut, (first, end) in zip(tokens.truncated.tolist(), groups, strict=True)):
                return spans, tokens
            window -= max(1, window // 16)  # words in company can have more tokens than alone, to a few tokenizers

    def _pieces(self, texts: Sequence[str], tokens: TokenizedTexts, over: Int64Array) -> Pieces:
        """Like `tokens`, but with the pieces of the texts `over` in the place of their beginnings."""
        ids, lengths, truncated, rows, spans = [], [], [], [], []
        done = 0
        for row in [*over.tolist(), len(texts)]:
            whole = slice(done, row)
            ids.append(tokens.ids[tokens.offsets[done] : tokens.offsets[row]])
            lengths.append(tokens.lengths[whole])
            truncated.append(tokens.truncated[whole])
            rows.append(np.arange(done, row))
            spans += [(0, len(text)) for text in texts[whole]]
            done = row + 1
            if row < len(texts):
                found, cut = self.cut(texts[row])
                ids.append(cut.ids)
                lengths.append(cut.lengths)
                truncated.append(cut.truncated)
                rows.append(np.full(len(found), row))
                spans += found
        joined = TokenizedTexts(np.concatenate(ids), offsets_of(np.concatenate(lengths)), np.concatenate(truncated))
        starts_P, ends_P = np.array(spans, np.int64).T
        return Pieces(joined, np.concatenate(rows), starts_P, ends_P, np.empty(0, np.int64))

    def _words(self, text: str) -> _Words:
        bounds = np.fromiter(chain.from_iterable(match.span() for match in _WORD.finditer(text)), np.int64).reshape(-1, 2)
        starts_W, ends_W = bounds[:, 0], bounds[:, 1]
        tokens_W = self._tokens_of(text, starts_W, ends_W)
        inside = {int(word): self._cuts_inside(text, *bounds[word].tolist()) for word in self._too_long(text, bounds, tokens_W)}
        if inside:
            words, cuts = np.repeat(list(inside), list(map(len, inside.values()))), list(chain.from_iterable(inside.values()))
            starts_W, ends_W = np.insert(starts_W, words + 1, cuts), np.insert(ends_W, words, cuts)
            tokens_W = self._tokens_of(text, starts_W, ends_W)
        stops = np.arange(1, len(starts_W) + 1)
        if self._long.by == "sentences":
            stops = stops[_end_sentences(text, starts_W, ends_W)]
        return _Words(starts_W, ends_W, offsets_of(tokens_W), stops)

    def _tokens_of(self, text: str, starts_W: Int64Array, ends_W: Int64Array) -> Int64Array:
        """[W] tokens of each word with the blanks before it; too many, uncounted, for what is no word any more."""
        most = _WORD_CHARS_PER_TOKEN * self._max_tokens
        before_W = np.maximum(np.concatenate([starts_W[:1], ends_W[:-1]]), starts_W - most)
        tokens_W = np.full(len(starts_W), self._max_tokens + 1)
        countable = np.flatnonzero(ends_W - starts_W <= most)
        for start in range(0, len(countable), _WORDS_AT_ONCE):
            some = countable[start : start + _WORDS_AT_ONCE]
            words = [text[left:right] for left, right in zip(before_W[some].tolist(), ends_W[some].tolist(), strict=True)]
            tokens_W[some] = self._tokenizer.own_lengths(words)
        return tokens_W

    def _too_long(self, text: str, bounds: Int64Array, tokens_W: Int64Array) -> Int64Array:
        """The words that do not fit on their own."""
        large = np.flatnonzero(2 * tokens_W > self._max_tokens - self._framing)  # no word has half of its tokens only behind another
        countable = bounds[large, 1] - bounds[large, 0] <= _WORD_CHARS_PER_TOKEN * self._max_tokens
        fits = [
            bool(counted) and self._length(text, *span) <= self._max_tokens
            for counted, span in zip(countable, bounds[large].tolist(), strict=True)
        ]
        return large[~np.array(fits, np.bool_)]

    def _cuts_inside(self, text: str, start: int, end: int) -> list[int]:
        """Where a word is cut that does not fit on its own: as far behind each other as a few tries find."""
        room, cuts = self._max_tokens - self._framing, list[int]()
        while True:
            place = _between_characters(text, start, min(end, start + _PIECE_CHARS_PER_TOKEN * room))
            while (tokens := self._length(text, start, place)) > self._max_tokens and place > start + 1:
                size = place - start
                place = _between_characters(text, start, start + max(1, min(size - 1, size * room // (tokens - self._framing))))
            if place == end:
                return cuts
            cuts.append(place)
            start = place

    def _length(self, text: str, start: int, end: int) -> int:
        return int(self._tokenizer.lengths([text[start:end]])[0])

    def _groups(self, text: str, words: _Words, window: int) -> list[tuple[int, int]]:
        """The first word of each piece, and the one after its last."""
        groups: list[tuple[int, int]] = []
        first = done = 0
        while done < len(words.starts_W):
            end = self._end(text, words, window, first, done)
            if end == done:  # the overlap leaves no room for what comes next
                first = done
                continue
            groups.append((first, end))
            first, done = self._overlapping(words, end), end
        return groups

    def _end(self, text: str, words: _Words, window: int, first: int, done: int) -> int:
        """The end of the piece that begins with the word `first`; `done` where it would hold nothing new."""
        room = window - self._length(text, int(words.starts_W[first]), int(words.ends_W[first]))
        end = max(first + 1, int(np.searchsorted(words.total, words.total[first + 1] + room, side="right")) - 1)
        places = int(np.searchsorted(words.stops, end, side="right"))
        stop = int(words.stops[places - 1]) if places else 0
        if stop > done:
            return stop
        return end if first == done else done

    def _overlapping(self, words: _Words, end: int) -> int:
        """The first word of the piece that follows the one before `end`."""
        if not self._long.overlap:
            return end
        start = int(np.searchsorted(words.total, words.total[end] - self._long.overlap))
        return min(end, int(words.stops[np.searchsorted(words.stops, start)]))


def _end_sentences(text: str, starts_W: Int64Array, ends_W: Int64Array) -> npt.NDArray[np.bool_]:
    """[W]; whether a sentence ends with the word: with the mark of an end, before an empty line, or with the text."""
    spans = zip(starts_W.tolist(), ends_W.tolist(), [*starts_W[1:].tolist(), len(text)], strict=True)
    ends = [bool(_SENTENCE_END.search(text, start, end)) or text.count("\n", end, following) > 1 for start, end, following in spans]
    return np.array([*ends[:-1], True])


def _between_characters(text: str, start: int, place: int) -> int:
    """The last place in (start, place] that parts no accent and no joined emoji from its letter; `place` if there is none near."""
    for cut in range(place, max(start, place - 32), -1):
        if cut == len(text) or not (_JOINER in text[cut - 1 : cut + 1] or unicodedata.category(text[cut]).startswith("M")):
            return cut
    return place
