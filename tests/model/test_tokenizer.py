"""Token ids are those of transformers, whatever the text."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nanotoken
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from embedding.model.tokenizer import TokenizedTexts, Tokenizer
from tests.model.tiny import TEXTS, save_model, spec_of

HOSTILE = [
    "",
    " ",
    "\0",
    "nul\0inside",
    "[CLS] [SEP][MASK] <s></s><pad> <mask>",
    "\u0600 prepended format character",
    "e\u0301 \u0301 combining \u200d\u200b\ufeff",
    "\n\t\r\u2028\u00a0",
    "x" * 5000,
    "漢字かな한글 ไทย العربية 🧑‍🚀🏳️‍🌈",
    *("".join(map(chr, range(plane << 16, (plane << 16) + 0xD800, 0x300))) for plane in range(17)),
]


@pytest.fixture(scope="module", params=["bert", "roberta", "xlm-roberta"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def tokenize(folder: Path) -> Tokenizer:
    return Tokenizer(spec_of(folder), folder)


def rows(tokens: TokenizedTexts) -> list[list[int]]:
    return [tokens.ids[start:end].tolist() for start, end in zip(tokens.offsets, tokens.offsets[1:], strict=False)]


def check(tokenize: Tokenizer, folder: Path, texts: list[str]) -> None:
    reference = AutoTokenizer.from_pretrained(folder)
    found = tokenize(texts)
    assert rows(found) == reference(texts, truncation=True)["input_ids"]
    full = reference(texts, truncation=False, verbose=False)["input_ids"]
    assert found.truncated.tolist() == [len(ids) > reference.model_max_length for ids in full]


def test_ids_are_those_of_transformers(tokenize: Tokenizer, folder: Path) -> None:
    check(tokenize, folder, TEXTS)


def test_hostile_texts(tokenize: Tokenizer, folder: Path) -> None:
    check(tokenize, folder, HOSTILE)


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"])) | st.text(" a.\n[CLS]é"), min_size=1, max_size=5))
def test_any_texts(tokenize: Tokenizer, folder: Path, texts: list[str]) -> None:
    check(tokenize, folder, texts)


@pytest.mark.parametrize(
    "text",
    [
        "word " * 4000,
        "a\u0301 b.\n  c  " * 3000,
        "   " * 8000 + "end",
        "unbroken" * 4000,
        "漢字 " * 5000,
        "\u0600 " * 9000,
        " ".join(sorted(vars(sys))) * 20,
        "few" + " " * 50_000 + "tokens",
        "few" + " " * 30_000 + "tokens, then many " * 2000,
        "no,blank.at;all" * 3000,
        "漢字かな" * 3000,
        "漢字" * 6000,
        "[CLS]" * 4000,
        "<s>[SEP]" * 3000,
        "слово " * 4000,
        "a\tb\nc\r\n" * 4000,
        "\u0600 \u06dd \u00ad \u200b \u0d4e " * 2000,
        "=\u0338 ;\u0301.\u0338-\u0301" * 2000,
    ],
)
def test_a_long_text_is_cut_as_if_it_had_been_read_whole(tokenize: Tokenizer, folder: Path, text: str) -> None:
    check(tokenize, folder, [text, "short", text[:-1]])


def test_a_huge_text_is_not_read_to_its_end(tokenize: Tokenizer) -> None:
    text = "Some ordinary words, again and again. " * 300_000
    found = tokenize([text])
    assert found.truncated.tolist() == [True]
    assert rows(found) == rows(tokenize([text[:100_000]]))


@pytest.mark.parametrize("unit", ["word ", "漢字", "no,blank.at;all", "[CLS]", "\t", " "])
def test_no_place_to_cut_is_missed_or_searched_for_in_vain(unit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is handed to BERT's tokenizer of 10 MB is its beginning; of blanks without end it is all, without a step for each."""
    folder = save_model(tmp_path, "bert")
    tokenize = Tokenizer(spec_of(folder), folder)
    tokenize(["a"])
    handed: list[int] = []
    encode = nanotoken.Tokenizer.encode_batch

    def counted(self: nanotoken.Tokenizer, texts: list[str]) -> nanotoken.RaggedIds:
        handed.extend(map(len, texts))
        return encode(self, texts)

    monkeypatch.setattr(nanotoken.Tokenizer, "encode_batch", counted)
    found = tokenize([unit * (10_000_000 // len(unit))])
    assert max(handed) < 100_000 or not unit.strip()
    assert found.lengths.tolist() == [160 if unit.strip() else 2]


def test_nanotoken_reads_wordpiece_and_nothing_else(tokenize: Tokenizer, folder: Path) -> None:
    assert tokenize.is_fast == (spec_of(folder).model_type == "bert")


def test_a_fast_path_that_differs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    folder = save_model(tmp_path, "bert")
    encode = nanotoken.Tokenizer.encode_batch

    def differs_on_zebras(self: nanotoken.Tokenizer, texts: list[str]) -> nanotoken.RaggedIds:
        return encode(self, [text.replace("Zebra", "Horse") for text in texts])

    monkeypatch.setattr(nanotoken.Tokenizer, "encode_batch", differs_on_zebras)
    tokenize = Tokenizer(spec_of(folder), folder)
    assert tokenize.is_fast
    check(tokenize, folder, TEXTS)
    assert not tokenize.is_fast
    assert caplog.text.count("nanotoken splits texts of this corpus differently") == 1


def test_threads_share_one_tokenizer(tokenize: Tokenizer) -> None:
    expected = tokenize(TEXTS).ids.tolist()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: tokenize(TEXTS).ids.tolist(), range(8)))
    assert found == [expected] * 8


def test_cutting_on_the_left(tmp_path: Path) -> None:
    folder = save_model(tmp_path, "bert")
    reference = AutoTokenizer.from_pretrained(folder)
    reference.truncation_side = "left"
    reference.save_pretrained(folder)
    check(Tokenizer(spec_of(folder), folder), folder, TEXTS)


def test_no_texts(tokenize: Tokenizer) -> None:
    found = tokenize([])
    assert (found.ids.tolist(), found.offsets.tolist(), found.truncated.tolist()) == ([], [0], [])
