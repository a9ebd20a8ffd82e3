"""A dataset of the hub as the corpus: one commit is read whatever is pushed meanwhile, and the token stays where it is."""

from __future__ import annotations

import gzip
import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from huggingface_hub import HfFileSystem, constants

from embedding.corpus import requests
from embedding.corpus.columns import Columns
from embedding.corpus.formats.names import Format
from embedding.corpus.plan import plan_units
from embedding.corpus.reader import read_layouts, read_unit
from embedding.corpus.sources import list_inputs, list_sources, open_source
from embedding.errors import AccessError, ConfigError, CorpusError, SourceChangedError, StorageError
from embedding.run.cli import run
from embedding.run.exchange import encode_units
from tests.run.here import embed_here, prove_here
from tests.support import corpora, outputs
from tests.support.hub import DatasetHub, dataset_hub

NAME = "owner/texts"
URL = f"hf://datasets/{NAME}"
TOKEN = "hf_PlantedTokenOfNobody0123456789"
CORPUS = corpora.plain(rows=30, files=3)
FILES = {f"data/{name}": data for name, data in CORPUS.files.items()} | {"README.md": b"# texts", ".gitattributes": b""}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[DatasetHub]:
    """A hub that has the corpus as its dataset, and is the one that the library asks."""
    with dataset_hub(NAME) as started:
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, started.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", started.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        HfFileSystem.clear_instance_cache()
        started.push(FILES, "v1.0")
        yield started
        HfFileSystem.clear_instance_cache()


def rows_of(url: str, kind: Format = Format.PARQUET) -> list[dict[str, object]]:
    """Every row that a run would read, in the order of the corpus."""
    columns = Columns("text", ("id",), format=kind)
    units = plan_units(read_layouts(list_sources([url]), columns), unit_rows=10, fingerprint="f")
    read = [read_unit(unit, columns) for unit in units]
    return [
        {"id": key, "text": text} for rows in read for key, text in zip(rows.copied["id"].to_pylist(), rows.text.to_pylist(), strict=True)
    ]


@pytest.mark.parametrize("path", ["", "@main", "@v1.0/", "/data", "/data/", "/data/*.parquet", "@v1.0/**/*.parquet", "/d*"])
@pytest.mark.parametrize("page", [1000, 1])
def test_what_an_input_names_is_found(server: DatasetHub, path: str, page: int) -> None:
    server.page = page
    listing = list_inputs([URL + path])
    assert [source.uri for source in listing.sources] == [f"{URL}/data/{name}" for name in sorted(CORPUS.files)]
    assert listing.versions == {URL + path: f"commit {server.revisions['main']}"}
    assert len({source.version for source in listing.sources}) == 3


def test_a_file_is_read_by_ranges(server: DatasetHub) -> None:
    [source] = list_sources([f"{URL}/data/{min(CORPUS.files)}"])
    server.requests.clear()
    assert rows_of(URL) == CORPUS.rows
    data = FILES[f"data/{source.path}"]
    assert source.size == len(data)
    asked = [request for request in server.requests if "/api/" in request]
    assert len(asked) <= 4  # for the dataset, whatever it has of files: reading one asks for its bytes alone


def test_a_file_is_a_file_like_others(server: DatasetHub) -> None:
    data = bytes(range(256)) * 100
    server.push({"a.parquet": data})
    [source] = list_sources([URL])
    with open_source(source) as stream:
        assert (stream.seek(-3, 2), stream.read(10), stream.read(1), stream.tell()) == (len(data) - 3, data[-3:], b"", len(data))
        assert (stream.seek(100), stream.seek(5, 1), stream.read(4)) == (100, 105, data[105:109])
        assert stream.read() == data[109:]
        assert stream.seekable()
    assert server.ranges == [("a.parquet", len(data) - 3, len(data) - 1), ("a.parquet", 105, 108), ("a.parquet", 109, len(data) - 1)]


@pytest.mark.parametrize("name", ["a.csv.gz", "a.csv", "a.arrow"])
def test_other_formats_are_read_too(name: str, server: DatasetHub) -> None:
    text = "id,text\n" + "".join(f"{number},text {number}\n" for number in range(30))
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, (table := pa.table({"id": range(30), "text": [f"text {number}" for number in range(30)]})).schema) as out:
        out.write_table(table, max_chunksize=7)
    server.push({name: {"a.csv.gz": gzip.compress(text.encode()), "a.csv": text.encode(), "a.arrow": sink.getvalue()}[name]})
    kind = Format.ARROW if name == "a.arrow" else Format.CSV
    assert [row["text"] for row in rows_of(URL, kind)] == [f"text {number}" for number in range(30)]


def test_a_run_resumes_and_then_has_nothing_to_do(server: DatasetHub, tiny_model: Path, tmp_path: Path) -> None:
    made, expected = str(tmp_path / "made"), str(tmp_path / "expected")
    assert len(embed_here(URL, made, tiny_model, limit_rows=20)) == 2
    assert len(embed_here(URL, made, tiny_model, run="second")) == 1
    embed_here(CORPUS.write(tmp_path / "in"), expected, tiny_model)
    assert outputs.table(made).equals(outputs.table(expected))
    server.push(FILES | {"README.md": b"# more about the texts"})
    assert embed_here(URL, made, tiny_model, run="third") == []  # no row is another
    assert prove_here(made).status == "proved"  # and no shard says which commit it was read at


def test_a_commit_gives_other_units_only_where_files_are_others(server: DatasetHub) -> None:
    def units() -> set[str]:
        return {unit.id for unit in plan_units(read_layouts(list_sources([URL]), Columns("text")), unit_rows=10, fingerprint="f")}

    before = units()
    changed = next(iter(corpora.plain(rows=5, files=1).files.values()))
    server.push(FILES | {"data/more.parquet": changed, f"data/{min(CORPUS.files)}": changed})
    assert (len(before), len(before & units()), len(units() - before)) == (3, 2, 2)


def test_what_is_pushed_in_mid_run_is_not_read(server: DatasetHub) -> None:
    columns = Columns("text", ("id",))
    units = list(plan_units(read_layouts(list_sources([URL]), columns), unit_rows=10, fingerprint="f"))
    server.push(dict.fromkeys(FILES, b"rubbish"))
    read = [row for unit in units for row in read_unit(unit, columns).copied["id"].to_pylist()]
    assert read == [row["id"] for row in CORPUS.rows]
    server.commits.clear()  # the dataset is deleted, or made private
    with pytest.raises(
        SourceChangedError,
        match=r"hf://datasets/owner/texts@\w{40}/data/.* is no longer on the hub, or hidden from this machine; set HF_TOKEN",
    ):
        read_unit(units[0], columns)


def test_requests_that_fail_are_tried_again(server: DatasetHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)  # the library's waits
    server.refusals.extend([503, 429, 502])
    server.faults.extend([500, 503, 206, 206])  # the last two: fewer bytes than were asked for
    assert rows_of(URL) == CORPUS.rows
    assert len(server.ranges) > 6


def test_a_hub_that_does_not_answer_is_one_sentence(server: DatasetHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    monkeypatch.setenv("EMBED_STORE_SECONDS", "0")
    monkeypatch.setattr(requests, "_WAIT", lambda _: 0)
    server.refusals.extend([503] * 100)
    with pytest.raises(StorageError, match=r"^asking the hub for --input hf://\S+ failed: .*; run the same command again to resume$"):
        list_sources([URL])


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("hf://datasets/owner/nothing", "is not a dataset that the hub shows you; check the spelling, or set HF_TOKEN if it is private"),
        (f"{URL}@v9", "has no revision 'v9'; name a branch, tag or commit of the dataset"),
        (f"{URL}/nowhere", "does not exist; check the path"),
        (f"{URL}/nowhere/*.parquet", "matches no file; check the path"),
        ("hf://datasets/texts", "is not a dataset on the hub; write hf://datasets/owner/name, followed by a path if needed"),
        (f"hf://{NAME}", "names a model on the hub, but only datasets can be read; write hf://datasets/owner/name"),
        ("hf://buckets/owner/texts", "names a bucket on the hub, but only datasets can be read; write hf://datasets/owner/name"),
    ],
)
@pytest.mark.usefixtures("server")
def test_what_is_not_there_is_one_sentence(url: str, said: str) -> None:
    with pytest.raises(CorpusError) as refused:
        list_sources([url])
    assert str(refused.value).startswith(f"--input {url} {said}")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("place", ["/api/datasets", "/tree/", "/resolve/"])
def test_a_gated_dataset_is_one_sentence(place: str, server: DatasetHub) -> None:
    server.gated = place
    with pytest.raises(
        AccessError, match=r"hf://datasets/\S+ is gated; accept the terms of the dataset on the hub, and set HF_TOKEN on every"
    ):
        rows_of(URL)


def test_two_revisions_of_a_dataset_are_not_mixed(server: DatasetHub) -> None:
    server.push(FILES | {f"data/{min(CORPUS.files)}": next(iter(corpora.plain(rows=5, files=1).files.values()))})
    with pytest.raises(CorpusError, match="in a different version than an earlier input does; use one revision of it"):
        list_sources([f"{URL}@v1.0", URL])
    assert len(list_sources([f"{URL}@main", URL])) == 3


def test_the_token_opens_a_private_dataset_and_is_written_nowhere(
    server: DatasetHub, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server.token = TOKEN
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    with pytest.raises(CorpusError, match=r"is not a dataset that the hub shows you; .* HF_TOKEN"):
        list_sources([URL])
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with caplog.at_level(logging.DEBUG, logger="embedding"):
        assert embed_here(URL, str(tmp_path / "out"), tiny_model)
    sources = list_sources([URL])
    shipped = encode_units([*plan_units(read_layouts(sources, Columns("text")), unit_rows=10, fingerprint="f")])
    written = b"".join(outputs.files(str(tmp_path / "out")).values())
    assert TOKEN not in caplog.text + json.dumps(shipped)
    assert TOKEN.encode() not in written
    assert URL.encode() in written


def test_a_hub_is_not_written(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--input", "in", "--output", "hf://datasets/owner/vectors"]) == 2
    assert (
        "--output='hf://datasets/owner/vectors' is invalid: the job cannot write to the hub; choose a local folder or an object store"
        in capsys.readouterr().err
    )


def test_a_hub_that_must_not_be_asked_is_not(server: DatasetHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="but HF_HUB_OFFLINE forbids access to it"):
        list_sources([URL])
    assert server.requests == []


def test_a_token_that_is_refused_is_one_sentence(server: DatasetHub) -> None:
    server.refusals.append(403)
    with pytest.raises(AccessError, match=r"^asking the hub for --input hf://\S+ is not allowed: 403 .*; check the credentials"):
        list_sources([URL])
