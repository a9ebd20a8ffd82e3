"""Whole jobs on corpora of every kind that is read, in this process: the same rows give the same vectors, ids and proof."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from embedding.errors import SettingsChangedError
from tests.run.here import embed_here, prove_here
from tests.support import corpora, outputs

TEXTS = [*corpora.sentences(20, seed=11), None, 'a "quoted" text, with\nlines', ""]
ROWS: list[dict[str, Any]] = [
    {"id": number, "title": f"no {number}" if number % 3 else None, "text": text, "lang": "en"} for number, text in enumerate(TEXTS)
]


def parquet_of(rows: list[dict[str, Any]], folder: Path) -> str:
    return corpora.Corpus({"a.parquet": corpora.parquet(pa.Table.from_pylist(rows), row_group_rows=7)}, []).write(folder)


def test_a_text_of_several_columns(tiny_model: Path, tmp_path: Path) -> None:
    joined = [
        {**row, "text": f"{row['title'] or ''}\n\n{row['text'] or ''}" if row["title"] or row["text"] is not None else None} for row in ROWS
    ]
    source, template = parquet_of(ROWS, tmp_path / "in"), r"{title}\n\n{text}"
    made, expected = str(tmp_path / "made"), str(tmp_path / "expected")
    embed_here(parquet_of(joined, tmp_path / "joined"), expected, tiny_model, keep_columns=["lang"])
    shards = embed_here(source, made, tiny_model, text_template=template, keep_columns=["lang"])
    assert outputs.table(made).equals(outputs.table(expected))
    assert embed_here(source, made, tiny_model, text_template=template, keep_columns=["lang"]) == []
    proof = prove_here(made)
    assert (proof.status, proof.details, proof.sampled, proof.shards) == ("proved", [], len(ROWS), len(shards))
    with pytest.raises(SettingsChangedError, match=r'text_column: null -> "text"; text_template: '):
        embed_here(source, made, tiny_model, keep_columns=["lang"])
