"""Windows of a long text: exact slices that fit, leave out nothing but blanks, and cut no word that fits."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer
from tokenizers import normalizers
from transformers import AutoTokenizer

from embedding.errors import ModelError
from embedding.model import windows
from embedding.model.embedder import Embedder
from embedding.model.spec import LongTexts
from embedding.model.tokenizer import Tokenizer
from embedding.model.windows import Windows
from tests.model.tiny import TEXTS, save_model, spec_of

PROMPT = "so: "
MAX_TOKENS = 24
LONG = "\n\n".join(TEXTS[:60])
HOSTILE = [
    "x" * 900,
    "Ab3+/" * 200,
    "a" + " " * 5000 + "b",
    "\n" * 3000,
    "漢字かな混じり文" * 100,
    "漢字、かな。" * 100,
    "e" + "\u0301" * 300,
    "👩‍🚀" * 100,
    "\u200b \u200d" * 500,
    "\ufdfa" * 50,
    "[CLS] [SEP] <s></s>" * 100,
    "\0 \x1c \x85 \u2029 a" * 200,
]
MARKS = "\u3001\u3002\uff01\uff0c\uff1b\uff1f\uff61\uff64"
CLOSERS = "\"')]}\u00bb\u2019\u201d\u300d\u300f\u3011\uff09\uff5d"
ANYTHING = st.text(st.characters(exclude_categories=["Cs"]))
SNIPPETS = ["a ", "zebra ", "stripes. ", "  \n\n", "漢字", "、", "。」", "x" * 70, "e\u0301", "👩\u200d🚀", "</s>", ".)"]
FRAGMENTS = ANYTHING | st.sampled_from(SNIPPETS)
LONG_TEXTS = st.builds(lambda parts, times: "".join(parts) * times, st.lists(FRAGMENTS, min_size=1, max_size=12), st.integers(1, 20))


class Case(NamedTuple):
    folder: Path
    tokenizer: Tokenizer

    def cut(self, text: str, overlap: int = 0, by: str = "words", max_tokens: int = MAX_TOKENS) -> list[str]:
        """The pieces' texts, after all that must be true of any of them is found so."""
        tokenizer = self.tokenizer if max_tokens == MAX_TOKENS else Tokenizer(spec_of(self.folder, max_tokens=max_tokens), self.folder)
        spans, tokens = Windows(tokenizer, max_tokens, LongTexts("chunk", overlap, by)).cut(text)  # type: ignore[arg-type]
        slices = [text[start:end] for start, end in spans]
        again = tokenizer(slices)
        assert np.array_equal(tokens.ids, again.ids)
        assert np.array_equal(tokens.offsets, again.offsets)
        assert [piece for piece, cut in zip(slices, tokens.truncated, strict=True) if cut and len(piece) > 1] == []
        assert all(here[0] < there[0] and here[1] < there[1] for here, there in pairwise(spans))
        for end, start in zip([0, *(end for _, end in spans)], [*(start for start, _ in spans), len(text)], strict=True):
            assert not text[end:start].strip()
        assert slices == [piece.strip() for piece in slices]
        for start, end in spans:
            for place in (start, end):
                self.assert_cuts_no_word(text, place, tokenizer, max_tokens)
        return slices

    @staticmethod
    def assert_cuts_no_word(text: str, place: int, tokenizer: Tokenizer, max_tokens: int) -> None:
        if place in (0, len(text)) or text[place - 1].isspace() or text[place].isspace():
            return
        behind = re.split(rf"[\s{MARKS}]", text[:place])[-1]
        ahead = re.findall(rf"[^\s{MARKS}]*[{MARKS}]*[{re.escape(CLOSERS)}]*", text[place:])[0]
        if behind.strip(CLOSERS):  # else it is behind a mark that ends a clause
            assert tokenizer.lengths([behind + ahead])[0] > max_tokens or len(behind + ahead) > 16 * max_tokens


@pytest.fixture(scope="module", params=["bert", "roberta", "xlm-roberta"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = save_model(tmp_path_factory.mktemp(request.param), request.param)
    return Case(folder, Tokenizer(spec_of(folder, prompt=PROMPT, max_tokens=MAX_TOKENS), folder))


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A tokenizer to which each letter and mark is one token: a window of 5 tokens holds 3 of them."""
    folder = save_model(tmp_path_factory.mktemp("letters"), "bert")
    return Case(folder, Tokenizer(spec_of(folder, max_tokens=MAX_TOKENS), folder))


@pytest.mark.parametrize(
    ("text", "overlap", "by", "max_tokens", "pieces"),
    [
        ("a b c d e f g h", 0, "words", 5, ["a b c", "d e f", "g h"]),
        ("a b c d e f g h", 1, "words", 5, ["a b c", "c d e", "e f g", "g h"]),
        ("a b c d e f g h", 2, "words", 5, ["a b c", "b c d", "c d e", "d e f", "e f g", "f g h"]),
        (" a  b\n\nc d ", 0, "words", 5, ["a  b\n\nc", "d"]),
        ("a, b, c", 0, "words", 5, ["a,", "b, c"]),
        ("a b, c d", 1, "words", 5, ["a b,", "c d"]),  # the word that would be shared has two tokens
        ("a b. c d. e f g. h.", 0, "sentences", 8, ["a b. c d.", "e f g. h."]),
        ("a b. c d. e f. g.", 3, "sentences", 8, ["a b. c d.", "c d. e f.", "e f. g."]),
        ("a b. c d. e f g. h.", 3, "sentences", 8, ["a b. c d.", "e f g. h."]),  # with the overlap, the sentence would not fit
        ("a b c d e f. g.", 0, "sentences", 6, ["a b c d", "e f.", "g."]),  # a sentence that does not fit is cut at words
        ('a b." c d?\u201d e', 0, "sentences", 8, ['a b."', "c d?\u201d e"]),
        ("a b\n\nc d e", 0, "sentences", 6, ["a b", "c d e"]),
        ("a b\nc d e", 0, "sentences", 6, ["a b\nc d", "e"]),
        ("漢字、漢字。漢字", 0, "words", 6, ["漢字、", "漢字。", "漢字"]),
        ("漢字漢字漢字漢", 0, "words", 5, ["漢字漢", "字漢字", "漢"]),  # one word too long for a window
        ("e\u0301漢漢e\u0301漢漢e\u0301", 0, "words", 5, ["e\u0301漢漢", "e\u0301漢漢", "e\u0301"]),
        ("漢漢e\u0301漢漢漢", 0, "words", 5, ["漢漢", "e\u0301漢", "漢漢"]),
        ("  \n ", 0, "words", 5, [""]),
        ("", 0, "words", 5, [""]),
    ],
)
def test_windows_by_hand(letters: Case, text: str, overlap: int, by: str, max_tokens: int, pieces: list[str]) -> None:
    assert letters.cut(text, overlap, by, max_tokens) == pieces


@pytest.mark.parametrize("overlap", [0, 7])
@pytest.mark.parametrize("by", ["words", "sentences"])
@pytest.mark.parametrize("text", [LONG, *HOSTILE], ids=lambda text: ascii(text[:8]))
def test_hostile_texts(case: Case, text: str, overlap: int, by: str) -> None:
    assert len(case.cut(text, overlap, by)) > 1 or not text.strip() or case.tokenizer.lengths([text.strip()])[0] <= MAX_TOKENS


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=LONG_TEXTS, overlap=st.integers(0, 12), by=st.sampled_from(["words", "sentences"]))
def test_any_texts(case: Case, text: str, overlap: int, by: str) -> None:
    case.cut(text, overlap, by)


def test_a_piece_is_as_long_as_fits(case: Case) -> None:
    text = " ".join(word for word in LONG.split() if len(word) < 8)
    pieces, start = case.cut(text), 0
    for piece, following in pairwise(pieces):
        assert text.startswith(piece, start)
        start += len(piece) + 1
        assert case.tokenizer.lengths([f"{piece} {following.split()[0]}"])[0] > MAX_TOKENS
    assert " ".join(pieces) == text


def test_words_that_have_more_tokens_in_company_fit_all_the_same(tmp_path: Path) -> None:
    folder = save_model(tmp_path, "bert")
    reference = AutoTokenizer.from_pretrained(folder)
    backend = reference.backend_tokenizer
    backend.normalizer = normalizers.Sequence([normalizers.Replace("b c", "b x x x c"), backend.normalizer])
    reference.save_pretrained(folder)
    case = Case(folder, Tokenizer(spec_of(folder, max_tokens=MAX_TOKENS), folder))
    pieces = case.cut("a b c d e f " * 20)
    assert " ".join(pieces) == " ".join(["a b c d e f"] * 20)
    assert len(pieces) < 20


def test_pieces_share_as_much_as_is_allowed(letters: Case) -> None:
    text, overlap = " ".join(LONG.split()), 9
    spans, _ = Windows(letters.tokenizer, MAX_TOKENS, LongTexts("chunk", overlap)).cut(text)
    shared = [text[start:end].strip() for (_, end), (start, _) in pairwise(spans)]
    counted = letters.tokenizer.own_lengths(shared)
    assert counted.max() <= overlap
    assert np.mean(counted) > overlap / 2
    sentences, _ = Windows(letters.tokenizer, MAX_TOKENS, LongTexts("chunk", overlap, "sentences")).cut("Yes. No. One two. " * 40)
    assert {("Yes. No. One two. " * 40)[start:].split(" ")[0] for start, _ in sentences} <= {"Yes.", "No.", "One"}


def test_texts_that_fit_are_pieces_of_their_own(case: Case) -> None:
    texts = ["short", LONG, "", " a ", LONG[::-1], LONG]
    pieces = Windows(case.tokenizer, MAX_TOKENS, LongTexts("chunk", 5))(texts)
    assert pieces.texts_P.tolist() == sorted(pieces.texts_P.tolist())
    slices = [texts[text][start:end] for text, start, end in zip(pieces.texts_P, pieces.starts_P, pieces.ends_P, strict=True)]
    assert [piece for piece, text in zip(slices, pieces.texts_P, strict=True) if text in (0, 2, 3)] == ["short", "", " a "]
    of_long = [[piece for piece, text in zip(slices, pieces.texts_P, strict=True) if text == number] for number in (1, 5)]
    assert of_long[0] == of_long[1] != []
    reference = AutoTokenizer.from_pretrained(case.folder)
    ids = np.split(pieces.tokens.ids, pieces.tokens.offsets[1:-1])
    assert [row.tolist() for row in ids] == reference([PROMPT + piece for piece in slices])["input_ids"]


def test_pieces_are_ready_to_be_encoded_before_a_device_is_taken(case: Case) -> None:
    for how in ("truncate", "chunk", "average"):
        for part in Windows(case.tokenizer, MAX_TOKENS, LongTexts(how))(["short", LONG, "short"]).parts:
            assert "longest_first" in part.once.__dict__


def test_texts_are_rejected_or_cut_as_asked(letters: Case) -> None:
    texts = ["short", LONG, "fits"]
    rejected = Windows(letters.tokenizer, MAX_TOKENS, LongTexts("reject"))(texts)
    assert (rejected.texts_P.tolist(), rejected.too_long.tolist(), rejected.ends_P.tolist()) == ([0, 2], [1], [5, 4])
    truncated = Windows(letters.tokenizer, MAX_TOKENS, LongTexts())(texts)
    assert (truncated.texts_P.tolist(), truncated.tokens.truncated.tolist()) == ([0, 1, 2], [False, True, False])
    for how in ("reject", "chunk", "average"):
        assert len(Windows(letters.tokenizer, MAX_TOKENS, LongTexts(how))([]).texts_P) == 0


def test_a_prompt_that_fills_the_window_is_refused(letters: Case) -> None:
    full = Tokenizer(spec_of(letters.folder, max_tokens=6, prompt="a b c d "), letters.folder)
    with pytest.raises(ModelError, match="take 6 of max_tokens=6 and leave none for the text; shorten the prompt"):
        Windows(full, 6, LongTexts("chunk"))
    Windows(full, 6, LongTexts())


def test_many_tokens_are_encoded_in_parts(letters: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    cut = Windows(letters.tokenizer, MAX_TOKENS, LongTexts("chunk"))
    whole = cut([LONG, "short", LONG])
    assert whole.parts == [whole.tokens]
    monkeypatch.setattr(windows, "_PART_TOKENS", 1000)
    parts = cut([LONG, "short", LONG]).parts
    assert len(parts) > 5
    assert all(len(part.ids) < 1000 + MAX_TOKENS for part in parts)
    assert np.array_equal(np.concatenate([part.ids for part in parts]), whole.tokens.ids)
    assert np.array_equal(np.concatenate([part.lengths for part in parts]), whole.tokens.lengths)


def test_the_vectors_are_those_of_the_slices(letters: Case) -> None:
    embedder = Embedder(spec_of(letters.folder, max_tokens=MAX_TOKENS))
    pieces = embedder.windows(LongTexts("chunk", 6, "sentences"))([LONG])
    model = SentenceTransformer(str(letters.folder), device="cpu")
    model.max_seq_length = MAX_TOKENS
    slices = [LONG[start:end] for start, end in zip(pieces.starts_P, pieces.ends_P, strict=True)]
    np.testing.assert_allclose(embedder.embed(pieces.tokens, 500).vectors_RD, model.encode(slices), rtol=0, atol=3e-5)
