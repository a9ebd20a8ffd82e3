"""A token that is looked for in normalized text, as MPNet's <unk> is, costs only the rows that have it."""

from __future__ import annotations

from pathlib import Path

import nanotoken
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import AutoTokenizer

from embedding.model.tokenizer import Tokenizer
from embedding.model.wordpiece import rows_with
from tests.model.tiny import TEXTS, save_model, spec_of

WITH_IT = [
    "<unk>",
    "a <unk> b",
    "x<UNK>y",
    "\u226eunk\u226f",
    "<u\0nk>",
    "<unk><unk>",
    "[CLS]<unk>[MASK]",
    "<\u00fcnk>",
    "<un\u212a>",
    "[<unk>]" * 9,
]
WITHOUT_IT = ["<unk", "unk>", "< unk>", "<u>nk>", "<pad>", "", "\u0301", *TEXTS]


def tokenizer_with(folder: Path, content: str) -> Tokenizer:
    save_model(folder, "bert")
    reference = AutoTokenizer.from_pretrained(folder)
    reference.add_tokens(AddedToken(content, normalized=True))
    reference.save_pretrained(folder)
    made = Tokenizer(spec_of(folder), folder)
    assert made.is_fast
    return made


@pytest.fixture(scope="module")
def tokenize(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return tokenizer_with(tmp_path_factory.mktemp("bert"), "<unk>")


def agree(tokenize: Tokenizer, texts: list[str]) -> bool:
    found, expected = tokenize(texts), tokenize.by_reference(texts)
    return tokenize.is_fast and np.array_equal(found.offsets, expected.offsets) and np.array_equal(found.ids, expected.ids)


def test_it_is_found_where_the_reference_finds_it(tokenize: Tokenizer) -> None:
    assert agree(tokenize, [*WITH_IT, *WITHOUT_IT])
    [own] = set(tokenize(["<unk>"]).ids.tolist()) - set(tokenize(["<", "unk", ">"]).ids.tolist())
    for text in WITH_IT:
        assert own in tokenize([text]).ids, text
    for text in WITHOUT_IT:
        assert own not in tokenize([text]).ids, text


@settings(deadline=None, max_examples=200)
@given(texts=st.lists(st.text("<>uUnkK\0 \u226e\u0301[") | st.sampled_from(WITH_IT), min_size=1, max_size=4))
def test_any_texts(tokenize: Tokenizer, texts: list[str]) -> None:
    assert agree(tokenize, texts)


def test_only_rows_that_have_it_are_read_twice(tokenize: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenize(["a"])
    handed: list[list[str]] = []
    encode = nanotoken.Tokenizer.encode_batch

    def noted(self: nanotoken.Tokenizer, texts: list[str]) -> nanotoken.RaggedIds:
        handed.append(texts)
        return encode(self, texts)

    monkeypatch.setattr(nanotoken.Tokenizer, "encode_batch", noted)
    texts = ["one", "<unk>", "<two>", "<UNK> three"]
    tokenize(texts)
    assert handed == [texts, ["<unk>", "<UNK> three"]]


def test_a_token_that_no_ids_betray_stays(tmp_path: Path) -> None:
    """Words begin and end at punctuation alone, so that `nk` may be found in the middle of one."""
    tokenize = tokenizer_with(tmp_path, "nk")
    assert agree(tokenize, ["chunks", "nk", "n k", "UNK", "a<unk>b"])
    assert len(set(tokenize(["nk"]).ids.tolist()) & set(tokenize(["chunks"]).ids.tolist())) == 3  # it and what frames a text


@pytest.mark.parametrize(
    ("signs", "rows"), [([[5, 6]], [0, 3]), ([[6, 6]], []), ([[7], [5, 6]], [0, 2, 3]), ([], []), ([[5, 6, 1, 5, 6, 7, 5, 6, 5, 6]], [])]
)
def test_rows_with(signs: list[list[int]], rows: list[int]) -> None:
    ids, offsets = np.array([5, 6, 1, 5, 7, 5, 6, 5], np.int32), np.array([0, 3, 4, 5, 8])
    assert rows_with([np.array(sign, np.int32) for sign in signs], ids, offsets).tolist() == rows


def test_a_sign_across_two_rows_counts_for_the_first() -> None:
    assert rows_with([np.array([6, 5], np.int32)], np.array([6, 5], np.int32), np.array([0, 1, 2])).tolist() == [0]
