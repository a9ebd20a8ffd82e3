"""Whole jobs on corpora of every kind that is read, in this process: the same rows give the same vectors, ids and proof."""

from __future__ import annotations

import bz2
import gzip
import io
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pytest

from embedding.errors import CorpusError, SettingsChangedError
from tests.run.conftest import Embed
from tests.run.here import embed_here, prove_here
from tests.support import corpora, outputs

TEXTS = [*corpora.sentences(20, seed=11), None, 'a "quoted" text, with\nlines', ""]
ROWS: list[dict[str, Any]] = [
    {"id": number, "title": f"no {number}" if number % 3 else None, "text": text, "lang": "en"} for number, text in enumerate(TEXTS)
]


def parquet_of(rows: list[dict[str, Any]], folder: Path) -> str:
    return corpora.Corpus({"a.parquet": corpora.parquet(pa.Table.from_pylist(rows), row_group_rows=7)}, []).write(folder)


def arrow_of(rows: list[dict[str, Any]], stream: bool = False) -> bytes:
    table, sink = pa.Table.from_pylist(rows), io.BytesIO()
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=7)
    return sink.getvalue()


def jsonl_of(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps({key: value for key, value in row.items() if value is not None}) + "\n" for row in rows).encode()


def csv_of(rows: list[dict[str, Any]], delimiter: str = ",") -> bytes:
    """As pyarrow writes it: quotes round every string, nothing for null."""
    sink = io.BytesIO()
    pyarrow.csv.write_csv(pa.Table.from_pylist(rows), sink, pyarrow.csv.WriteOptions(delimiter=delimiter))
    return sink.getvalue()


KINDS: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    "a.arrow": arrow_of,
    "stream.arrow": partial(arrow_of, stream=True),
    "a.jsonl": jsonl_of,
    "a.ndjson.gz": lambda rows: gzip.compress(jsonl_of(rows)),
    "a.json.zst": lambda rows: pa.Codec("zstd").compress(jsonl_of(rows), asbytes=True),
    "csv.csv": csv_of,
    "csv.csv.bz2": lambda rows: bz2.compress(csv_of(rows)),
    "tsv.tsv": partial(csv_of, delimiter="\t"),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_gives_what_parquet_gives(name: str, tiny_model: Path, tmp_path: Path) -> None:
    made, expected = str(tmp_path / "made"), str(tmp_path / "expected")
    embed = partial(embed_here, model=tiny_model, keep_columns=["lang", "title"], token_columns=True)
    source = corpora.Corpus({name: KINDS[name](ROWS)}, []).write(tmp_path / "in")
    embed(parquet_of(ROWS, tmp_path / "parquet"), expected)
    assert embed(source, made, limit_rows=12)
    assert embed(source, made, run="second")
    assert embed(source, made, run="third") == []
    rows = outputs.table(made)
    if name.startswith(("csv", "tsv")):  # in which everything is a string
        rows = rows.set_column(0, "id", rows["id"].cast(pa.int64()))
    assert rows.equals(outputs.table(expected))
    proof = prove_here(made)
    assert (proof.status, proof.details, proof.sampled) == ("proved", [], len(ROWS) - 1)
    with pytest.raises(SettingsChangedError, match=r'input_format: "\w+" -> null'):  # or all its shards would be stale
        embed(parquet_of(ROWS, tmp_path / "in"), made)


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


def test_a_run_on_a_cluster_goes_on_without_a_line_that_is_broken(embed: Embed, tmp_path: Path) -> None:
    rows = [json.dumps({"id": f"{number:03}", "text": text}) for number, text in enumerate(TEXTS)]
    source, output = tmp_path / "in", str(tmp_path / "out")
    source.mkdir()
    (source / "a.jsonl").write_text("\n".join([*rows[:15], rows[15][:-4], *rows[16:]]))
    (source / "b.csv").write_text("id,text\n1,beside\n")
    with pytest.raises(CorpusError, match=r"CSV and JSON Lines files .* set --input-format to csv or jsonl"):
        embed(input=str(source), output=output)
    (source / "b.csv").unlink()
    summary = embed(input=str(source), output=output, bad_rows="fail")
    assert (summary.status, summary.units_failed) == ("failed units", 1)
    assert "2 rows cannot be embedded, the first being row 15: the line is not a JSON object; correct the source, or set" in str(
        summary.failures[0]
    )
    summary = embed(input=str(source), output=output)
    assert (summary.status, summary.rows_rejected, summary.rows_skipped + summary.rows_out) == ("complete", 2, len(TEXTS) - 2)
    assert outputs.control(output, "rejected").select(["row_index", "id", "reason"]).to_pylist() == [
        {"row_index": 15, "id": None, "reason": "the line is not a JSON object"},
        {"row_index": 20, "id": "020", "reason": "text is null"},
    ]
    expected = [f"{number:03}" for number, text in enumerate(TEXTS) if number != 15 and text is not None]
    assert outputs.table(output)["id"].to_pylist() == expected
