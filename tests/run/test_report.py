"""The report of a run: its figures are those of the records, it stands alone, and it cannot fail a run."""

from __future__ import annotations

import io
import logging
import threading
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedding.corpus.ledger import Ledger, parquet_bytes
from embedding.corpus.output import JobSettings, rejected_name
from embedding.corpus.storage import Storage
from embedding.run.report import publish
from embedding.run.report.publish import make_report, write_report
from embedding.run.summary import Summary
from embedding.run.worker import rejected_table
from tests.run.conftest import Embed
from tests.support import corpora, outputs
from tests.support.made_output import SETTINGS, MadeOutput, empty_output, made_output

VOID = {"meta", "link", "br"}


class Page(HTMLParser):
    """Tables by the heading above them, elements and texts of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self._heading = ""
        self._text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.tables.setdefault(self._heading, []).append([])
        if tag in ("td", "th", "h1", "h2", "h3"):
            self._text = ""

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self._text += data

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag in ("td", "th"):
            self.tables[self._heading][-1].append(self._text.strip())
        if tag in ("h1", "h2", "h3"):
            self._heading = self._text.strip()

    def rows(self, heading: str) -> dict[str, list[str]]:
        """The rows of a table by their first cell, its head left out."""
        return {first: rest for first, *rest in self.tables[heading][1:]}


def html_of(made: MadeOutput) -> str:
    return make_report(made.output, made.summary, SETTINGS, made.shards, model="some/model")


def test_the_figures_are_those_of_the_records(tmp_path: Path) -> None:
    made = made_output(str(tmp_path / "out"), shards=5)
    page = Page(html_of(made))
    assert page.open == []
    records = made.records
    assert page.rows("What became of the rows") == {
        "with a vector": ["600", "99.2%"],
        "of these, truncated at max_tokens": [str(sum(record.truncated for record in records)), "0.8%"],
        "of these, equal to an earlier row of their unit": ["0", "0.0%"],
        "rejected": ["5", "0.8%"],
    }
    lengths = page.rows("Rows by length in tokens")
    assert sum(int(rows) for [rows] in lengths.values()) == 600
    assert lengths["64 to 79"] == [str(sum(record.truncated for record in records))]
    workers = page.rows("Workers")
    assert {name: cells[:2] for name, cells in workers.items()} == {
        f"host:{parity}": [str(len(records[parity::2])), f"{sum(record.tokens for record in records[parity::2]):,}"] for parity in (0, 1)
    }
    assert workers["host:0"][3] == "50.0%"  # 3 units of 4 s within 24 s
    count, first = page.rows("Rejected rows by reason")["text is null"]
    assert (count, first.partition(".")[2]) == ("5", "parquet row 120")
    assert page.rows("Slowest units")["part-0.parquet"][-5:] == ["0.25", "0.50", "4.00", "0.00", "4.75"]
    [run] = page.rows("Runs").values()
    assert run[:4] == ["complete", "605", "5", f"{made.summary.tokens:,}"]
    assert page.rows("Settings")["model"] == ["some/model"]
    assert page.rows("Settings")["fingerprint"] == [SETTINGS.fingerprint]


def test_each_reason_has_its_own_first_row(tmp_path: Path) -> None:
    made = empty_output(str(tmp_path / "out"))
    unit = made.add(np.eye(4, dtype=np.float32), {"id": list("abcd")}, rejected=24)
    widths = {row: f"the row has {row} values, but the header has 2" for row in range(7, 28)}
    listed = rejected_table(unit, None, {4: "text is null", **dict.fromkeys((5, 6), "the row has 1 value, but the header has 2"), **widths})
    made.output.storage.put(rejected_name(unit.id), parquet_bytes(listed))
    reasons = Page(html_of(made.close())).rows("Rejected rows by reason")
    first = {reason: (int(rows), int(row.rpartition(" ")[2])) for reason, (rows, row) in reasons.items()}
    assert list(first.items())[:3] == [
        ("the row has 1 value, but the header has 2", (2, 5)),
        ("text is null", (1, 4)),
        ("the row has 7 values, but the header has 2", (1, 7)),
    ]
    assert len(first) == 20  # of 23: a file of another kind may give one for each width of its rows


def test_the_page_stands_alone_and_is_the_same_each_time(tmp_path: Path) -> None:
    made = made_output(str(tmp_path / "out"))
    html = html_of(made)
    assert html == html_of(made)
    page = Page(html)
    assert {tag for tag, _ in page.elements}.isdisjoint({"script", "img", "iframe", "object", "base", "form"})
    references = [
        value or "" for _, attributes in page.elements for name, value in attributes.items() if name in ("href", "src", "xlink:href")
    ]
    assert references
    assert [reference for reference in references if not reference.startswith(("#", "data:,"))] == []
    assert "@import" not in html
    assert html.count("url(") == html.count("url(#")
    [policy] = [
        attributes["content"] or "" for tag, attributes in page.elements if attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy.startswith("default-src 'none'; ")
    ids = [attributes["id"] for _, attributes in page.elements if attributes.get("id")]
    assert len(set(ids)) == len(ids)
    assert {reference.removeprefix("#") for reference in references if reference.startswith("#")} <= set(ids)
    figures = [attributes for tag, attributes in page.elements if tag == "svg"]
    assert len(figures) == 5
    assert all(set((figure["aria-labelledby"] or "").split()) <= set(ids) and figure["role"] == "img" for figure in figures)
    assert len(html) < 300_000


def test_what_comes_from_data_is_shown_and_not_run(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>\"'&<b onmouseover=x> $\\frac$ \x00\x07 {{ 7 * 7 }}"
    made = empty_output(str(tmp_path / evil.replace("/", "")[:20]))
    vectors = np.random.default_rng(0).normal(size=(60, 8)).astype(np.float32)
    made.add(
        vectors, {"id": [f"{evil}{row}" for row in range(60)], "topic": [evil, "b"] * 30, "text": [f"{evil} {row}" for row in range(60)]}
    )
    made.records[0] = replace(made.records[0], worker=f"{evil}:1", note=evil)
    made.close()
    made.summary.status = "failed units"
    made.summary.failures.append({"source": f"file:///{evil}", "first_row": 0, "rows": 3, "reason": evil})
    made.summary.units_failed = 1
    html = html_of(made)
    page = Page(html)
    assert {tag for tag, _ in page.elements}.isdisjoint({"script", "b onmouseover"})
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert html.count("&lt;script&gt;") > 10
    assert "49" not in [cell for rows in page.tables.values() for row in rows for cell in row]
    assert page.tables["Failed units"][1][-1].startswith("<script>alert(1)</script>")


@pytest.mark.parametrize(
    "columns",
    [{"source": ["file:///a"] * 3, "row_index": [0, 1, 2]}, {"id": [None, 2, 3], "nothing": pa.nulls(3, pa.string())}],
    ids=["no id", "nulls"],
)
def test_outputs_with_little_to_show(columns: dict[str, list[object]], tmp_path: Path) -> None:
    made = empty_output(str(tmp_path / "out"))
    made.add(np.ones((3, 4), np.float32), columns)
    assert "Health" in Page(html_of(made.close())).tables


def test_an_output_without_rows_or_records_has_a_report(tmp_path: Path) -> None:
    made = empty_output(str(tmp_path / "out"))
    assert "Settings" in Page(html_of(made)).tables
    made.add(np.empty((0, 4), np.float32), {"id": pa.array([], pa.int64())}, rejected=2)
    assert Page(html_of(made.close())).rows("What became of the rows")["rejected"] == ["2", "100.0%"]
    made.output.storage.delete(list(made.output.storage.list("_control/records")))
    assert "The records of 1 shard are lost" in html_of(made)


def test_a_complete_output_is_counted_by_its_manifest(tmp_path: Path) -> None:
    """The records of a driver that was killed are lost, or too many to be read in time."""
    made = empty_output(str(tmp_path / "out"))
    units = [made.add(np.eye(4, dtype=np.float32), {"id": [1, 2, 3, 4]}, rejected=2) for _ in range(3)]
    made.close().output.complete(units, made.output.shards(), lambda: None)
    made.output.storage.delete(list(made.output.storage.list("_control/records")))
    html = html_of(made)
    assert "12 of 18 rows have a vector; 6 were rejected." in html
    assert "The records of 3 shards are lost or were not read: speed and texts below leave them out." in html
    made.summary.status = "failed units"
    assert "The records of 3 shards are lost or were not read: the counts here leave them out." in html_of(made)


def test_a_resumed_output_is_reported_whole(tmp_path: Path) -> None:
    made = made_output(str(tmp_path / "out"))
    later = Summary(made.summary.output, "20260101T000000Z-ffffff", status="complete", rows_skipped=363, units_skipped=3)
    html = make_report(made.output, later, SETTINGS, made.shards, model="m")
    assert f"This run had nothing to embed; run {made.summary.run} encoded 3 units" in html
    assert Page(html).rows("What became of the rows")["with a vector"] == ["360", "99.2%"]


def test_collapsed_vectors_are_warned_of(tmp_path: Path) -> None:
    made = empty_output(str(tmp_path / "out"))
    vectors = 100 + np.random.default_rng(0).normal(size=(100, 16)).astype(np.float32)
    made.add(vectors, {"id": range(100)})
    html = html_of(made.close())
    assert "Any two vectors are nearly the same" in html
    assert "The vectors are not normalized" in html
    assert "Any two vectors" not in html_of(made_output(str(tmp_path / "healthy")))


def test_clipped_numbers_are_shown_and_warned_of(tmp_path: Path) -> None:
    made = empty_output(str(tmp_path / "out"))
    made.add(np.random.default_rng(0).normal(size=(100, 16)).astype(np.float32), {"id": range(100)})
    steps = replace(SETTINGS, vectors={**SETTINGS.vectors, "output_dtype": "int8"}, calibration={"embedding": [[-1.0] * 16, [1.0] * 16]})
    made.records[0] = replace(made.records[0], clipped=16)
    row = "Numbers clipped to the int8 ranges"

    def shown(settings: JobSettings) -> tuple[list[str] | None, bool]:
        html = make_report(made.output, made.summary, settings, made.shards, model="m")
        return Page(html).rows("Health").get(row), "of the numbers lie outside the int8 ranges" in html

    made.close()
    assert shown(steps) == (["1.0%"], False)
    assert shown(SETTINGS)[0] is None
    made.records[0] = replace(made.records[0], clipped=17)
    made.close()
    assert shown(steps) == (["1.1%"], True)


def test_a_file_that_could_not_be_read_is_no_unit(tmp_path: Path) -> None:
    """Nobody knows its rows."""
    made = made_output(str(tmp_path / "out"))
    made.summary.status, made.summary.files_failed = "failed units", 1
    made.summary.failures.append({"unit": None, "source": "file:///a.parquet", "first_row": None, "rows": None, "reason": "0 bytes"})
    html = html_of(made)
    assert "</b> 1 source file could not be read.</h1>" in html
    assert Page(html).tables["Unreadable source files"][1] == ["a.parquet", "", "", "0 bytes"]
    made.summary.units_failed, made.summary.rows_failed = 2, 30
    html = html_of(made)
    assert "</b> 2 units with 30 rows failed and 1 source file could not be read.</h1>" in html
    assert "Failed units and unreadable source files" in Page(html).tables


def test_a_long_ledger_is_read_to_a_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = made_output(str(tmp_path / "out"))
    for number in range(3):
        older = Ledger(made.output.storage, f"1999-{number}")
        older.append(replace(made.records[0], unit=f"u{number}", worker="older"))
        older.flush()
    monkeypatch.setattr(publish, "_READ_SECONDS", (-1e9, 10, 10, 10))
    html = html_of(made)
    assert "older" not in html
    assert "host:0" in html


def test_a_report_that_can_not_be_made_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = made_output(str(tmp_path / "out"))
    folder = tmp_path / "out" / "_control" / "runs" / made.summary.run
    (folder / "report.html").mkdir()
    with caplog.at_level(logging.INFO):
        write_report(made.output, made.summary, SETTINGS, made.shards, model="m")
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "the report could not be made" in caplog.text
    (folder / "report.html").rmdir()

    caplog.clear()
    held = threading.Event()
    real = Storage.read
    monkeypatch.setattr(Storage, "read", lambda storage, name: held.wait(60) and real(storage, name))
    monkeypatch.setattr(publish, "_PATIENCE_SECONDS", 0.2)
    write_report(made.output, made.summary, SETTINGS, made.shards, model="m")
    assert "was not finished within" in caplog.text
    held.set()


def test_runs_that_end_have_one_and_others_do_not(embed: Embed, tmp_path: Path) -> None:
    root, output = tmp_path / "in", str(tmp_path / "out")
    corpora.plain(rows=40, files=2, row_group_rows=20).write(root)
    whole = (root / "part-0.parquet").read_bytes()
    (root / "part-0.parquet").write_bytes(whole[:40] + b"\xff" * 60 + whole[100:])

    failed = embed(input=str(root), output=output, report="yes", keep_columns=["text"])
    page = Page((tmp_path / "out" / "_control" / "runs" / failed.run / "report.html").read_text())
    assert len(page.tables["Failed units"]) == 1 + failed.units_failed == 3
    found = pq.read_table(io.BytesIO(next(iter(outputs.shards(output).values()))))
    assert page.rows("What became of the rows")["with a vector"][0] == "20"
    assert found.num_rows == 10

    (root / "part-0.parquet").write_bytes(whole)
    second = embed(input=str(root), output=output, report="yes", keep_columns=["text"])
    page = Page((tmp_path / "out" / "_control" / "runs" / second.run / "report.html").read_text())
    assert page.rows("What became of the rows")["with a vector"] == ["40", "100.0%"]
    assert len(page.rows("Runs")) == 2
    embed(input=str(root), output=output, report="yes", keep_columns=["text"])  # nothing to do
    embed(input=str(root), output=output, report="yes", keep_columns=["text"], dry_run=True)
    assert len(list((tmp_path / "out").rglob("report.html"))) == 2
