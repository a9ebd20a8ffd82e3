"""WordPiece by nanotoken: texts -> token ids, many times as fast as `tokenizers`."""

# Shape suffixes: T tokens, R rows.

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from typing import Any, Final, TypeAlias

import nanotoken
import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from embedding.model.batching import join_rows, split_rows

Ids: TypeAlias = npt.NDArray[np.int32]
Offsets: TypeAlias = npt.NDArray[np.int64]
Encode: TypeAlias = Callable[[list[str]], tuple[Ids, Offsets]]
"""Whole texts -> flat ids and their offsets."""

_CACHE_ENTRIES: Final = 1 << 17
"""Per thread and level; the default would let each thread keep 130 MiB, this 16."""
_FRAMED: Final = re.compile(r"[!-/:-@\[-`{-~].*[!-/:-@\[-`{-~]")
"""Between ASCII punctuation, each mark of which is a word of its own to BERT."""


def by_nanotoken(reference: Tokenizer) -> Encode | None:
    """None where nanotoken knows that it cannot do as the reference: it reads WordPiece only.

    A token that is looked for in normalized text, as MPNet's <unk> is, makes it a tenth as fast. Where such a token can be told by the
    ids that its text has without it, it is left out, and the few rows that have those ids are encoded again with it.
    """
    try:
        encode = _reader(settings := json.loads(reference.to_str()))
    except nanotoken.UnsupportedTokenizerError:
        return None
    nanotoken.set_cache_entries(_CACHE_ENTRIES)
    slowing = [token["content"] for token in settings["added_tokens"] if token["normalized"]]
    as_bert = settings["pre_tokenizer"] == {"type": "BertPreTokenizer"}
    if not slowing or not as_bert or not all(map(_FRAMED.fullmatch, slowing)):
        return encode
    without = settings | {"added_tokens": [token for token in settings["added_tokens"] if not token["normalized"]]}
    signs = split_rows(*_reader(without | {"post_processor": None})(slowing))
    encode_most = _reader(without)

    def encode_all(texts: list[str]) -> tuple[Ids, Offsets]:
        ids, offsets = encode_most(texts)
        again = rows_with(signs, ids, offsets)
        if not len(again):
            return ids, offsets
        rows = split_rows(ids, offsets)
        for row, found in zip(again.tolist(), split_rows(*encode([texts[row] for row in again])), strict=True):
            rows[row] = found
        return join_rows(rows)

    return encode_all


def rows_with(signs: Iterable[Ids], ids_T: Ids, offsets: Offsets) -> Offsets:
    """The rows, ascending, in which the ids of one of the `signs` follow one another."""
    found = [np.empty(0, np.int64)]
    for sign in signs:
        starts = np.flatnonzero(ids_T[: max(0, len(ids_T) - len(sign) + 1)] == sign[0])
        for place, part in enumerate(sign.tolist()):
            starts = starts[ids_T[starts + place] == part]
        found.append(np.searchsorted(offsets, starts, side="right") - 1)
    return np.unique(np.concatenate(found))


def _reader(settings: dict[str, Any]) -> Encode:
    """Raises UnsupportedTokenizerError."""
    fast = nanotoken.Tokenizer.from_json(json.dumps(settings))

    def encode(texts: list[str]) -> tuple[Ids, Offsets]:
        rows = fast.encode_batch(texts)
        return rows.ids.astype(np.int32), rows.offsets

    return encode
