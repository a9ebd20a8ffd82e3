"""What an input names is found, each file once; what is no corpus is left out, and what cannot be read is not."""

from __future__ import annotations

import os
import re
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from embedding.corpus.sources import absolute, list_sources, require_unchanged
from embedding.corpus.storage import open_storage
from embedding.errors import ConfigError, CorpusError, SourceChangedError
from tests.support.s3_server import S3Server

CORPUS = ["a.parquet", "b.parq", "sub/c.PARQUET", "sub/deep/d.pq", "date=1/e.parquet", "_year=2025/f.parquet"]
OTHERS = ["_SUCCESS", "_temporary/x.parquet", ".crc/x.parquet", "sub/.a.parquet", "sub/_b.parquet", "README.md", "sub/list.csv", "parquet"]


@pytest.fixture
def corpus(storage_root: str) -> str:
    """URL of a folder with files of both kinds; listing needs no Parquet in them."""
    storage = open_storage(f"{storage_root}/in")
    for name in [*CORPUS, *OTHERS]:
        storage.put(name, b"content")
    return f"{storage_root}/in"


def paths(*inputs: str) -> list[str]:
    return [source.path for source in list_sources(inputs)]


def test_a_folder_is_read_to_the_bottom(corpus: str) -> None:
    assert paths(corpus) == paths(f"{corpus}/") == sorted(CORPUS)


def test_a_source_says_where_it_is_and_how_large(corpus: str) -> None:
    (source,) = list_sources([f"{corpus}/sub/deep"])
    assert (source.path, source.size) == ("d.pq", 7)
    assert source.uri.removeprefix("file://") == f"{corpus}/sub/deep/d.pq"
    assert source.version


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("*.parquet", ["a.parquet"]),
        ("[a-b].par*", ["a.parquet", "b.parq"]),
        ("sub/*", ["c.PARQUET", "deep/d.pq", "list.csv"]),  # files that the pattern names whatever their suffix, folders as folders
        ("**/*.parquet", ["_year=2025/f.parquet", "a.parquet", "date=1/e.parquet"]),
        ("date=*", ["date=1/e.parquet"]),
        ("_year=*/*", ["_year=2025/f.parquet"]),
        ("?ub/deep", ["sub/deep/d.pq"]),
        ("sub/_*.parquet", ["_b.parquet"]),  # asked for by name
        ("sub/_b.parquet", ["_b.parquet"]),
    ],
)
def test_globs(corpus: str, pattern: str, found: list[str]) -> None:
    assert paths(f"{corpus}/{pattern}") == found


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("train*.parquet", ["train-2.parquet", "train.parquet", "train_extra.parquet"]),
        ("train?extra.parquet", ["train_extra.parquet"]),
        ("train*", ["train-2.parquet", "train.parquet", "train_extra.parquet", "train_more/a.parquet"]),
        ("*/*.parquet", ["train_more/a.parquet"]),
        ("*/_*.parquet", ["train_more/_b.parquet"]),
        ("_o*", ["_old/c.parquet"]),
        ("**/?.parquet", ["train_more/a.parquet"]),
        ("train_more/**", ["a.parquet"]),
    ],
)
def test_what_is_hidden_begins_with_an_underscore_itself(storage_root: str, pattern: str, found: list[str]) -> None:
    """Not what is left of a name where the pattern's own beginning is taken away."""
    names = ["train.parquet", "train_extra.parquet", "train-2.parquet", "train_more/a.parquet", "train_more/_b.parquet", "_old/c.parquet"]
    for name in names:
        open_storage(f"{storage_root}/in").put(name, b"content")
    assert paths(f"{storage_root}/in/{pattern}") == found


def test_two_stars_are_a_part_of_their_own(corpus: str) -> None:
    with pytest.raises(CorpusError, match=r"/a\*\*\.parquet has 'a\*\*\.parquet', but \*\* stands for folders alone; "):
        list_sources([f"{corpus}/a**.parquet"])


def test_a_name_with_two_colons_is_a_name(storage_root: str) -> None:
    """And not the beginning of another URL, as fsspec has it."""
    open_storage(f"{storage_root}/in::of").put("a::b.parquet", b"content")
    [source] = list_sources([f"{storage_root}/in::of"])
    assert source.path == "a::b.parquet"
    require_unchanged(source)
    assert absolute(f"{storage_root}/in::of") == f"{storage_root}/in::of"


def test_a_file_may_have_a_glob_character_in_its_name(storage_root: str) -> None:
    open_storage(storage_root).put("in/a[1].parquet", b"content")
    assert paths(f"{storage_root}/in/a[1].parquet") == ["a[1].parquet"]


def test_overlapping_inputs_give_each_file_once(corpus: str) -> None:
    inputs = [f"{corpus}/sub", corpus, f"{corpus}/a.parquet", f"{corpus}/*.parquet", f"{corpus}/sub/"]
    if not corpus.startswith("s3://"):  # where these are names of their own
        inputs += [f"{corpus}//sub", f"{corpus}/./sub", f"{corpus}/date=1/../sub/*.PARQUET", f"file://{corpus}", os.path.relpath(corpus)]
    sources = list_sources(inputs)
    assert len({source.uri for source in sources}) == len(sources) == len(CORPUS)
    assert sources == sorted(sources)


def test_an_input_is_named_the_same_from_everywhere(corpus: str) -> None:
    assert absolute(corpus) == absolute(f"{corpus}/") == corpus
    if not corpus.startswith("s3://"):
        assert (
            absolute(os.path.relpath(corpus)) == absolute(f"file://{corpus}") == absolute(f"{corpus}/sub/../*").removesuffix("/*") == corpus
        )


def test_the_order_of_inputs_does_not_matter_where_they_do_not_overlap(corpus: str) -> None:
    inputs = [f"{corpus}/sub", f"{corpus}/date=1", f"{corpus}/a.parquet"]
    assert list_sources(inputs) == list_sources(inputs[::-1])


@pytest.mark.parametrize("missing", ["nowhere", "nowhere/a.parquet", "a.parquet/below"])
def test_a_missing_input_is_named(corpus: str, missing: str) -> None:
    with pytest.raises(CorpusError, match=f"--input .*/in/{missing} does not exist; check the path$"):
        list_sources([corpus, f"{corpus}/{missing}"])


@pytest.mark.parametrize(
    ("nothing", "sentence"),
    [
        ("*.nothing", "no file; check the path"),
        ("nowhere/*.parquet", "no file; check the path"),
        ("others", r"no Parquet file \(\.parquet, \.parq, \.pq\); check the path, or set --input-format to csv"),
    ],
)
def test_an_input_that_matches_nothing_is_named(corpus: str, nothing: str, sentence: str) -> None:
    open_storage(corpus).put("others/list.csv", b"")
    with pytest.raises(CorpusError, match=rf"--input .*{re.escape(nothing)} matches {sentence}$"):
        list_sources([corpus, f"{corpus}/{nothing}"])


def test_a_folder_without_any_corpus_is_told_what_is_one(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(CorpusError, match=r"matches no file that ends in \.parquet, .*\.jsonl, .*\.csv, \.tsv; check the path$"):
        list_sources([str(tmp_path)])


@pytest.mark.usefixtures("s3")
def test_a_missing_bucket_is_a_missing_input() -> None:
    with pytest.raises(CorpusError, match="s3://no-such-bucket/in does not exist"):
        list_sources(["s3://no-such-bucket/in"])


@pytest.mark.usefixtures("s3")
@pytest.mark.parametrize("url", ["gopher://host/in", "s3://not*a*bucket/in", "s3://NOT A BUCKET/in"])
def test_an_impossible_url_is_refused_in_one_sentence(url: str) -> None:
    with pytest.raises(ConfigError) as refused:
        list_sources([url])
    assert url in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_rewritten_file_has_another_version(corpus: str) -> None:
    before = list_sources([corpus])
    assert list_sources([corpus]) == before
    rewrite(corpus, "a.parquet", b"CONTENT")
    after = list_sources([corpus])
    assert [old.path for old, new in zip(before, after, strict=True) if old != new] == ["a.parquet"]
    assert [old.size for old in before] == [new.size for new in after]
    with pytest.raises(SourceChangedError, match=r"a\.parquet was replaced after it was listed"):
        require_unchanged(next(source for source in before if source.path == "a.parquet"))
    for source in after:
        require_unchanged(source)


def test_a_removed_file_is_noticed(corpus: str) -> None:
    (source,) = list_sources([f"{corpus}/a.parquet"])
    open_storage(corpus).delete(["a.parquet"])
    with pytest.raises(SourceChangedError, match=r"a\.parquet was removed after it was listed"):
        require_unchanged(source)


def test_a_file_and_a_listing_tell_the_same_version(corpus: str) -> None:
    assert list_sources([f"{corpus}/a.parquet"]) == [source for source in list_sources([corpus]) if source.path == "a.parquet"]


def test_a_folder_or_pipe_named_like_a_file_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.parquet")  # opening it would wait for ever
    (tmp_path / "empty.parquet").mkdir()
    (tmp_path / "spark.parquet").mkdir()
    (tmp_path / "spark.parquet" / "part-0.parquet").write_bytes(b"content")
    assert paths(str(tmp_path)) == ["spark.parquet/part-0.parquet"]
    assert paths(str(tmp_path / "spark.parquet")) == ["part-0.parquet"]


def test_a_placeholder_object_is_no_file(s3: S3Server) -> None:
    url = s3.folder()
    open_storage(url).put("a.parquet", b"content")
    for folder in ("/", "/folder.parquet/"):  # as consoles of object stores make them
        s3.client().put_object(Bucket=s3.shared_bucket, Key=url.rpartition("/")[2] + folder)
    assert paths(url) == ["a.parquet"]


@pytest.mark.usefixtures("unprivileged")
def test_a_folder_that_can_not_be_read_is_refused_not_left_out() -> None:
    with TemporaryDirectory() as folder:  # tmp_path is root's own
        (Path(folder) / "a.parquet").write_bytes(b"content")
        locked = Path(folder) / "locked"
        locked.mkdir(mode=0)
        for url in (folder, f"{folder}/*", f"{folder}/*/*.parquet", f"{folder}/**/*.parquet", f"{folder}/l*/*"):
            said = f"listing --input {re.escape(url)} is not allowed: .*'{locked}'; check the credentials"
            with pytest.raises(ConfigError, match=said):
                list_sources([url])


LINKS = {"linked.parquet": "../blobs/0", "latest": "2025", "up": "..", "2024": "../elsewhere"}
"""A file as the hub's cache keeps it, a folder by a second name, one above, and one that lies elsewhere."""


@pytest.fixture
def linked(tmp_path: Path) -> Path:
    for name in ("blobs/0", "elsewhere/a.parquet", "in/2025/b.parquet", "in/c.parquet"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"content")
    for name, target in LINKS.items():
        (tmp_path / "in" / name).symlink_to(target)
    return tmp_path / "in"


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("", ["2024/a.parquet", "2025/b.parquet", "c.parquet", "linked.parquet"]),
        ("/*.parquet", ["c.parquet", "linked.parquet"]),
        ("/**/*.parquet", ["2024/a.parquet", "2025/b.parquet", "c.parquet", "linked.parquet"]),
        ("/20*", ["2024/a.parquet", "2025/b.parquet"]),
        ("/latest", ["b.parquet"]),
        ("/l*/*", ["latest/b.parquet"]),
        ("/20*/*.parquet", ["2024/a.parquet", "2025/b.parquet"]),
    ],
)
def test_links_are_followed_and_each_file_is_read_once(linked: Path, pattern: str, found: list[str]) -> None:
    sources = list_sources([f"{linked}{pattern}"])
    assert [source.path for source in sources] == found
    for source in sources:
        require_unchanged(source)


def test_a_file_that_two_inputs_name_by_links_is_read_once(linked: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        assert paths(str(linked / "2025"), str(linked / "latest")) == ["b.parquet"]
    assert caplog.messages == ["left out 1 link to files that are read by another name"]


@pytest.mark.parametrize("target", ["nowhere", "broken.parquet", "c.parquet/x"])
def test_a_link_that_leads_nowhere_is_refused(linked: Path, target: str) -> None:
    (linked / "broken.parquet").symlink_to(target)
    (linked / "notes.txt").symlink_to("nowhere")  # is no corpus
    said = f"^file://{linked}/broken.parquet is a link to {target}, which does not exist; fetch that file, or remove the link$"
    for pattern in ("", "/*.parquet"):
        with pytest.raises(CorpusError, match=said):
            list_sources([f"{linked}{pattern}"])
    assert paths(f"{linked}/2025") == ["b.parquet"]


def test_a_name_that_is_no_utf8_is_refused(tmp_path: Path) -> None:
    Path(os.fsdecode(bytes(tmp_path) + b"/\xff.parquet")).write_bytes(b"content")
    with pytest.raises(CorpusError, match=r"\\udcff\.parquet' has a name that is not UTF-8; rename the file$"):
        list_sources([str(tmp_path)])


def rewrite(corpus: str, name: str, data: bytes) -> None:
    """Replace a file by one of another time: clocks of file systems tick in milliseconds only."""
    storage = open_storage(corpus)
    storage.put(name, data)
    if not corpus.startswith("s3://"):
        stat = Path(corpus, name).stat()
        os.utime(Path(corpus, name), ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**6))
