"""Whole jobs over text files with lines that are no rows, in this process: exactly those are rejected, and the proof agrees."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedding import JobConfig, embed_corpus
from embedding.corpus.columns import Columns
from embedding.corpus.formats.names import Format
from embedding.corpus.reader import UnitRows, read_unit
from embedding.run.exchange import decode_rows, encode_rows
from embedding.run.sample import embeddable_texts
from tests.corpus.reading import put_source, whole
from tests.run.here import embed_here, found, prove_here
from tests.support import corpora, outputs

ROWS = 24
TEXTS = corpora.sentences(ROWS, seed=5)
NO_NUMBER = "column 'id' is not int64, its type at the beginning of the corpus"
NO_TITLE = "column 'title' is not string, its type at the beginning of the corpus"


def jsonl_with(bad: dict[int, bytes]) -> bytes:
    rows = [json.dumps({"id": number, "title": f"t{number}", "text": text}).encode() for number, text in enumerate(TEXTS)]
    return b"\n".join(bad.get(number, row) for number, row in enumerate(rows))


def csv_with(bad: dict[int, bytes]) -> bytes:
    rows = [f'{number},t{number},"{text}"'.encode() for number, text in enumerate(TEXTS)]
    return b"\r\n".join([b"id,title,text", *(bad.get(number, row) for number, row in enumerate(rows))])


OF_JSON = {
    1: (b'{"id": 1, "title": "t1", "text": "cut of', None, "the line is not a JSON object"),
    7: (b'{"id": "7", "title": "t7", "text": "an id that is a string"}', None, NO_NUMBER),
    8: (b'{"id": 8, "title": 8, "text": "a title that is a number"}', "8", NO_TITLE),
    9: (b'{"id": 9, "title": "t9", "text": null}', "9", "text is null"),
    20: (b'{"id": 20, "title": "t20", "text": "\xff"}', "20", "text is not valid UTF-8"),
    21: (b'{"id": 21, "title": "\xff", "text": "a title that is no text"}', "21", "column 'title' is not valid UTF-8"),
}
OF_CSV = {
    1: (b"1,t1", None, "the row has 2 values, but the header has 3"),
    7: (b"7,t7,a comma, not quoted", None, "the row has 4 values, but the header has 3"),
    9: (b"9,t9,", "9", "text is null"),
    10: (b"\xff,t10,an id that is no text", None, "column 'id' is not valid UTF-8"),
    20: (b"20,t20,\xff", "20", "text is not valid UTF-8"),
}
KINDS = {
    "a.jsonl": (jsonl_with, OF_JSON),
    "a.csv.gz": (lambda bad: gzip.compress(csv_with(bad)), OF_CSV),
}


@pytest.mark.parametrize("name", KINDS)
def test_exactly_the_bad_lines_are_rejected(name: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: tuple[Callable[[dict[int, bytes]], bytes], dict[int, tuple[bytes, str | None, str]]] = KINDS[name]
    data, bad = made
    source = corpora.Corpus({name: data({number: line for number, (line, _, _) in bad.items()})}, []).write(tmp_path / "in")
    good = corpora.Corpus({name: data({})}, []).write(tmp_path / "good")
    output, expected = str(tmp_path / "out"), str(tmp_path / "expected")
    monkeypatch.setattr("ray.init", None)
    config = {"model": str(tiny_model), "id_column": "id", "keep_columns": ("title",), "unit_rows": 8}

    planned = embed_corpus(JobConfig.build(input=(source,), output=output, dry_run=True, **config))
    foretold = [
        row for row, (_, _, reason) in bad.items() if "UTF-8" not in reason or "text" in reason
    ]  # the kept columns are not read for it
    assert planned.plan["rejected share"] == pytest.approx(len(foretold) / ROWS, abs=1e-4)
    first = embed_here(source, output, tiny_model, keep_columns=["title"], unit_rows=8, limit_rows=8)
    second = embed_here(source, output, tiny_model, run="second", keep_columns=["title"], unit_rows=8)
    assert (len(first), len(second)) == (1, 2)
    assert embed_here(source, output, tiny_model, run="third", keep_columns=["title"], unit_rows=8) == []

    listed = outputs.control(output, "rejected").sort_by("row_index").to_pylist()
    assert [(row["row_index"], row["id"], row["reason"]) for row in listed] == [(row, *bad[row][1:]) for row in bad]
    embed_here(good, expected, tiny_model, keep_columns=["title"], unit_rows=8)
    kept = pa.array([number not in bad for number in range(ROWS)])
    rows, whole_rows = outputs.table(output), outputs.table(expected).filter(kept)
    assert rows.drop_columns("embedding").equals(whole_rows.drop_columns("embedding"))
    for found_vector, vector in zip(rows["embedding"].to_pylist(), whole_rows["embedding"].to_pylist(), strict=True):
        assert found_vector == pytest.approx(vector, abs=1e-6)  # other neighbours in the batch
    proof = prove_here(output)
    assert (proof.status, proof.details, proof.rows_rejected, proof.sampled) == ("proved", [], len(bad), ROWS - len(bad))


def test_a_proof_finds_a_bad_line_that_is_not_listed(tiny_model: Path, tmp_path: Path) -> None:
    source = corpora.Corpus({"a.jsonl": jsonl_with({1: OF_JSON[7][0]})}, []).write(tmp_path / "in")
    output = str(tmp_path / "out")
    [shard] = embed_here(source, output, tiny_model, unit_rows=ROWS)
    [name] = [name for name in outputs.files(output) if "/rejected/" in name]
    rows = pq.read_table(Path(output, name))
    assert prove_here(output, sample=0).status == "proved"
    for lie in ({"reason": "text is null"}, {"row_index": 2}, {"id": "1"}):
        pq.write_table(pa.Table.from_pylist([rows.to_pylist()[0] | lie], schema=rows.schema), Path(output, name))
        assert found(prove_here(output, sample=0)) == {("wrong rejected rows", shard)}, lie
    pq.write_table(pa.Table.from_pylist([rows.to_pylist()[0] | {"id": "None"}], schema=rows.schema), Path(output, name))
    assert prove_here(output, sample=0).status == "proved"  # as lists said it before there were ids that are null


def test_faults_travel_with_their_rows_and_no_sample_has_them(tmp_path: Path) -> None:
    source = put_source(str(tmp_path), jsonl_with({number: line for number, (line, _, _) in OF_JSON.items()}), "a.jsonl")
    schema = pa.schema({"id": pa.int64(), "title": pa.string(), "text": pa.string()})
    for kept in ((), ("id", "title")):
        rows = read_unit(whole(source, ROWS), Columns("text", kept, None, Format.JSONL, schema))
        there = decode_rows(encode_rows(rows))
        assert rows.faults == there.faults == {row: OF_JSON[row][2] for row in (1, 7, 8)}
        assert there.copied.equals(rows.copied, check_metadata=True)
        bad: set[int] = OF_JSON.keys() - ({21} if not kept else set())
        assert len(embeddable_texts(there)) == ROWS - len(bad)
        assert not {"an id that is a string", "a title that is a number"} & set(embeddable_texts(there).to_pylist())
    none: dict[str, Any] = {"text": pa.array(["a"], pa.large_string()), "copied": pa.table({"id": [1]})}
    assert decode_rows(encode_rows(UnitRows(**none))).faults == {}
