"""What README and docs say is what the code does: their commands parse, their Python runs, their tables and messages are the code's."""

from __future__ import annotations

import ast
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import get_args

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import embedding
from docs.tables import OPTIONS, README, TABLES, with_tables
from embedding.config import JobConfig
from embedding.names import Pooling
from embedding.run.cli import parse
from embedding.run.proof.cli import parse as parse_proof
from embedding.run.proof.result import ProofStatus
from embedding.run.summary import Status, Summary
from tests.model.tiny import FAMILIES
from tests.support.job import JobResult, run_job
from tests.support.pages import Block, commands, fenced, prose, section, sections, unfenced
from tests.support.ray_cluster import RayCluster

REPOSITORY = README.parent
ARCHITECTURE, MODELS = REPOSITORY / "docs" / "architecture.md", REPOSITORY / "docs" / "models.md"
PAGES = [README, REPOSITORY / "CHANGELOG.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
RECIPES, GUIDE = REPOSITORY / "docs" / "recipes.md", REPOSITORY / "docs" / "guide.md"
TROUBLES, RELIABILITY = REPOSITORY / "docs" / "troubleshooting.md", REPOSITORY / "docs" / "reliability.md"
SCRIPT = "jobs/embed_corpus.py"
RAY = Path(sys.executable).with_name("ray")

BLOCKS = [block for page in PAGES for block in fenced(page)]
BASH, PYTHON = ([block for block in BLOCKS if block.language == language] for language in ("bash", "python"))


def rows(text: str, header: str) -> list[list[str]]:
    """Cells of the Markdown table whose first header cell is `header`."""
    lines = text.partition(f"| {header} |")[2].splitlines()[2:]
    end = next((number for number, line in enumerate(lines) if not line.startswith("|")), len(lines))
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[:end]]


def quoted(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, ray_cluster: RayCluster) -> Iterator[Path]:
    """The folder in which README's reader works: its `corpus` and its `job.yaml` are there, and all commands run in it."""
    folder = tmp_path_factory.mktemp("reader")
    for number, path in enumerate(["part-0.parquet", "date=2025-01-01/part-0.parquet"]):
        file = folder / "corpus" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        text = [f"the text number {number}", None, ""]
        pq.write_table(pa.table({"id": range(3 * number, 3 * number + 3), "text": text, "lang": ["en"] * 3}), file)
    for block in BLOCKS:
        if block.language == "yaml":
            name = block.text.splitlines()[0].removeprefix("# ")
            (folder / name).write_text(block.text)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ray_cluster.environment().items():
            patch.setenv(name, value)
        patch.chdir(folder)
        yield folder


@pytest.fixture(scope="module")
def first_run(place: Path) -> JobResult:
    """The one run of this module: README's first command of the job, to the letter."""
    del place
    found = [words for block in fenced(README) if block.language == "bash" for words in commands(block) if words[:2] == ["python", SCRIPT]]
    return run_job(*found[0][2:], env={"EMBED_REPORT": "yes"})


def job_of(words: list[str], patch: pytest.MonkeyPatch) -> JobConfig | None:
    """The configuration that a command line of the job asks for; fails the test for a command that no test knows."""
    while re.match(r"[A-Z_]+=", words[0]):
        name, _, value = words.pop(0).partition("=")
        patch.setenv(name, value)
    match words:
        case ["python", "jobs/embed_corpus.py", *arguments]:
            return parse(arguments)
        case ["python", "jobs/verify_corpus.py", *arguments]:
            assert parse_proof(arguments) is not None
            return None
        case ["ray", "job", "submit", "--address", _, "--working-dir", ".", "--", *command]:
            return job_of(command, patch)
        case ["ray", "job", "submit", "--address", _, "--runtime-env", file, "--", "embed-corpus", *arguments]:
            assert any(block.text.startswith(f"# {file}\n") for block in BLOCKS)
            return parse(arguments)
        case ["ray", "job", "submit", "--address", _, "--", "embed-corpus", *arguments]:  # where the nodes have it installed
            return parse(arguments)
        case ["ray", "exec", file, command]:
            assert (REPOSITORY / file).is_file()
            return job_of(shlex.split(command), patch)
        case ["sbatch", *options] if any(option.endswith(".sbatch") for option in options):
            script = next(option for option in options if option.endswith(".sbatch"))
            assert (REPOSITORY / script).is_file()
            return parse(options[options.index(script) + 1 :])
        case ["ray", "up" | "down" | "get-auth-token" as command, *options]:
            files = [option for option in options if not option.startswith("-")]
            assert [file for file in files if not (REPOSITORY / file).is_file()] == []
            subprocess.run([RAY, command, *(set(options) - set(files)), "--help"], check=True, capture_output=True, timeout=60)
            return None
        case ["aws" | "docker" | "kubectl" | "pip", *options]:  # programs that are not here: the files that they are given are
            named = [option for option in options if re.match(r"(deploy|docs)/", option)]
            assert [file for file in named if not (REPOSITORY / file).is_file()] == []
            return None
        case ["export", assignment]:
            name, _, value = assignment.partition("=")
            assert name.startswith(("AWS_", "EMBED_", "RAY_AUTH_MODE"))
            patch.setenv(name, value)
            return None
        case ["make", target]:
            subprocess.run(["make", "--dry-run", target], cwd=REPOSITORY, check=True, capture_output=True, timeout=60)
            return None
        case _:
            pytest.fail(f"no test knows the command {shlex.join(words)}")


@pytest.mark.parametrize("block", BASH, ids=str)
def test_commands_are_understood(block: Block, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    del place
    subprocess.run(["bash", "-n"], input=block.text, text=True, check=True, timeout=60)
    for words in commands(block):
        job_of(words, monkeypatch)


def test_the_configuration_file_means_what_it_says(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    del place
    [words] = [words for block in BASH for words in commands(block) if "--config" in words]
    config = job_of(words, monkeypatch)
    assert config is not None
    assert (config.normalize, config.workers, config.progress, config.max_tokens) == ("yes", "1:64", "log", 256)
    assert (len(config.input), config.keep_columns) == (2, ("lang",))


def test_the_first_command(first_run: JobResult) -> None:
    assert (first_run.summary["status"], first_run.summary["rows_out"], first_run.summary["rows_rejected"]) == ("complete", 4, 2)
    [shown] = [block.text for block in fenced(README) if '"status"' in block.text]
    assert set(re.findall(r'"(\w+)":', shown)) <= first_run.summary.keys() <= {field.name for field in fields(Summary)}


def test_every_status_is_named() -> None:
    assert set(get_args(Status)) <= set(quoted(section(README, "## Exit codes and summary")))
    assert set(get_args(ProofStatus)) <= set(quoted(unfenced(section(RELIABILITY, "## Verify an output"))))


def test_the_output_is_drawn_as_it_is(first_run: JobResult, place: Path) -> None:
    del first_run
    drawn = drawn_paths(next(block.text for block in fenced(README) if block.text.startswith("vectors/")))
    real = {path.relative_to(place).as_posix() + "/" * path.is_dir() for path in (place / "vectors").rglob("*")}
    leaves = {path for path in real if not any(other != path and other.startswith(path) for other in real)}
    assert [path for path in leaves if not any(re.fullmatch(pattern, path) for pattern in drawn)] == []
    assert [pattern for pattern in drawn if not any(re.fullmatch(pattern, path) for path in leaves)] == []


def drawn_paths(tree: str) -> list[str]:
    """A pattern for each leaf of a tree that is drawn by indentation: <word> stands for anything."""
    lines = [(len(line) - len(line.lstrip()), re.split(r"\s{2,}", line.strip())[0]) for line in tree.splitlines()]
    above: list[str] = []
    found = []
    for number, (indent, name) in enumerate(lines):
        above[indent // 2 :] = [name]
        if number + 1 == len(lines) or lines[number + 1][0] <= indent:
            found.append(re.sub(r"<[a-z ]+>", "[^/]+", "".join(above).replace(".", r"\.")))
    return found


@pytest.mark.parametrize("block", [block for block in PYTHON if block.page not in (RECIPES, GUIDE)], ids=str)  # they have their own tests
def test_python_runs(block: Block, first_run: JobResult, capsys: pytest.CaptureFixture[str]) -> None:
    del first_run
    names: dict[str, object] = {}
    exec(compile(block.text, str(block), "exec"), names)
    if "embed_corpus" in names:
        assert capsys.readouterr().out == "nothing to do 0 0\n"  # the command line had done it, with the same options
    if "matrix" in names:
        assert names["count"] == [(4,)]
        assert names["matrix"].shape == (4, 384)  # type: ignore[attr-defined]
        assert names["table"].num_rows == 4  # type: ignore[attr-defined]
    if "pieces" in names:
        assert capsys.readouterr().out == next(other.text for other in fenced(block.page) if other.language == "text")
    if "embedder" in names:
        assert capsys.readouterr().out == "packed\n"


@pytest.mark.usefixtures("place")
def test_the_guide_begins_as_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    """Its steps up to the second one, to the letter; the others need a store, a hub or a cluster."""
    statuses = []
    for block in sections(GUIDE)["1. Embed your own corpus on one machine"] + sections(GUIDE)["2. Look at the result"]:
        if block.language == "python":
            exec(compile(block.text, str(block), "exec"), {})
        else:
            runs = [run_job(*words[2:]) for words in commands(block)]
            statuses += [(run.summary["status"], run.summary["rows_out"], run.summary["rows_rejected"]) for run in runs]
    assert statuses == [("planned", 0, 0), ("complete", 2, 1)]
    assert capsys.readouterr().out == "['id', 'embedding'] 2\n"


def test_every_block_is_of_a_kind_that_is_checked() -> None:
    assert {block.language for block in BLOCKS} <= {"bash", "python", "yaml", "text"}


@pytest.mark.parametrize("page", TABLES, ids=lambda page: page.name)
def test_tables_are_those_of_the_code(page: Path) -> None:
    assert page.read_text() == with_tables(page), "run python docs/tables.py"


def test_the_main_options_are_there() -> None:
    named = [option for row in rows(section(README, "## Options"), "Option") for option in quoted(row[0])]
    every = {row[0].strip("`") for row in rows(section(OPTIONS, "## Job options"), "Option") if row[0].startswith("`")}
    assert len(named) > 20
    assert set(named) <= every


def test_every_option_is_said_to_change_vectors_or_not() -> None:
    first_cells = [row[0] for row in rows(OPTIONS.read_text(), "If you run again with a different ...")]
    named = [option for cell in first_cells for option in quoted(cell)]
    assert sorted([*named, "--restart"]) == sorted(f"--{name.replace('_', '-')}" for name in JobConfig.model_fields)


def test_tests_that_are_named_exist() -> None:
    named = [found for page in PAGES for found in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page.read_text())]
    assert len(named) >= 30
    functions = {
        path: {node.name for node in ast.walk(ast.parse((REPOSITORY / path).read_bytes())) if isinstance(node, ast.FunctionDef)}
        for path, _ in named
    }
    assert [f"{path}::{name}" for path, name in named if name not in functions[path]] == []


def skeletons() -> list[str]:
    """Every string of the code, with a NUL for what is filled in."""
    found = []
    for path in (REPOSITORY / "embedding").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%[sd]|%\.\df", "\0", node.value))
    return found


def test_messages_are_those_of_the_code() -> None:
    listed = [row for found in TROUBLES.read_text().split("\n## ") for row in rows(found, "Message")]
    messages = [message for row in listed for message in quoted(row[0])]
    patterns = {message: ".*".join(map(re.escape, message.split("…"))) for message in messages}
    known = skeletons()
    assert len(messages) >= 30
    common = rows(section(README, "## Troubleshooting"), "Message")
    assert common
    assert [row for row in common if row not in listed] == []
    assert [message for message, pattern in patterns.items() if not any(re.search(pattern, text, re.DOTALL) for text in known)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" not in target:
            path, _, anchor = target.partition("#")
            linked = (page.parent / path).resolve() if path else page
            assert linked.exists(), target
            assert not anchor or anchor in anchors(linked), target


def anchors(page: Path) -> set[str]:
    """Of each heading, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_modules_are_those_there_are() -> None:
    named = [row[0].strip("`") for row in rows(ARCHITECTURE.read_text(), "Module")]
    package = REPOSITORY / "embedding"
    assert sorted(named) == sorted(path.relative_to(package).as_posix() for path in package.rglob("*.py") if path.name != "__init__.py")


def test_the_fingerprint_is_over_what_is_said(first_run: JobResult, place: Path) -> None:
    del first_run
    named = [key for row in rows(section(ARCHITECTURE, "## Fingerprint"), "Key") for key in quoted(row[0])]
    assert sorted(named) == sorted(json.loads((place / "vectors" / "_control" / "job.json").read_text())["vectors"])


def test_families_are_those_that_are_tested() -> None:
    [packed] = re.findall(r"^NOT_PACKABLE = (.*)$", (REPOSITORY / "tests/model/test_families.py").read_text(), flags=re.MULTILINE)
    said = {row[0].strip("`"): row[1].startswith("packed") for row in rows(MODELS.read_text(), "Model type")}
    assert said == {family: family not in ast.literal_eval(packed) for family in FAMILIES}


def test_poolings_are_those_there_are() -> None:
    assert [row[0].strip("`") for row in rows(MODELS.read_text(), "`--pooling`")] == list(get_args(Pooling))


def test_the_changelog_knows_the_version() -> None:
    assert f"## [{embedding.__version__}]" in (REPOSITORY / "CHANGELOG.md").read_text()
