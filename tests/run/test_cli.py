"""The command line, without running a job: where options come from, what is refused, and how."""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from embedding.errors import ConfigError
from embedding.run.cli import parse, run
from embedding.run.options import require_known_variables
from embedding.run.proof.cli import parse as parse_proof
from tests.support import corpora
from tests.support.job import REPOSITORY, SCRIPT
from tests.support.terminal import on_terminal

NEEDED = ["--input", "corpus", "--output", "vectors"]
NO_VALUE = "has no value; write it after the option, or as"
EMPTY = "is invalid: use a value that is not empty, and look for a shell variable that is not set\n"


def test_the_command_line_wins_over_the_environment_and_that_over_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(
        "input: [a.parquet, b.parquet]\noutput: from-file\nbatch_tokens: 1\nunit_rows: 1\nid_column: id\nkeep_columns: [x, y]\n"
    )
    monkeypatch.setenv("EMBED_BATCH_TOKENS", "2")
    monkeypatch.setenv("EMBED_UNIT_ROWS", "2")
    config = parse(["--config", str(file), "--batch-tokens", "3"])
    assert config is not None
    assert (config.batch_tokens, config.unit_rows, config.id_column, config.output) == (3, 2, "id", "from-file")
    assert (config.input, config.keep_columns) == (("a.parquet", "b.parquet"), ("x", "y"))


def test_lists_can_be_repeated_or_given_at_once() -> None:
    config = parse(["--input", "a", "--input", "b", "--output", "o", "--keep-columns", "x", "y", "--restart", "--workers", "1:4"])
    assert config is not None
    assert (config.input, config.keep_columns, config.restart, config.worker_range()) == (("a", "b"), ("x", "y"), True, (1, 4))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--output", "o"], "--input is missing; set it on the command line, in the --config file or as EMBED_INPUT"),
        (["--inptu", "i", "--output", "o"], "Unknown option: --inptu. Did you mean --input?"),
        (["--input", "i", "--outptu=o"], "Unknown option: --outptu. Did you mean --output?"),
        (["--input", "i", "--zzz", "o"], "Unknown option: --zzz. --help lists them all."),
        ([*NEEDED, "--quiet", "--verbose"], "--quiet and --verbose are both given; keep one of them"),
        ([*NEEDED, "--batch-token", "5"], "Did you mean --batch-tokens?"),
        ([*NEEDED, "--batch-tokens", "0"], "--batch-tokens='0' is invalid: use auto or a number above 0"),
        ([*NEEDED, "--limit-rows", "0"], "--limit-rows='0' is invalid: use a number above 0"),
        ([*NEEDED, "--unit-rows", "1k"], "--unit-rows='1k' is invalid: use auto or a whole number"),
        ([*NEEDED, "--rate", "fast"], "--rate='fast' is invalid: use a number"),
        ([*NEEDED, "--chunk-overlap", "-1"], "--chunk-overlap='-1' is invalid: use a number of 0 or more"),
        ([*NEEDED, "--dimensions", "64", "x"], "--dimensions='x' is invalid: use a whole number"),
        ([*NEEDED, "--normalize", "maybe"], "--normalize='maybe' is invalid: use auto, yes or no"),
        (
            [*NEEDED, "--pooling", "median"],
            "--pooling='median' is invalid: use auto, mean, cls, max, weightedmean, mean_sqrt_len or lasttoken",
        ),
        ([*NEEDED, "--workers", "4:2"], "the minimum 4 is above the maximum 2; swap them"),
        ([*NEEDED, "--workers", "many"], "use auto, a number of 1 or more, or MIN:MAX"),
        ([*NEEDED, "--prompt", "q: ", "--prompt-name", "query"], "--prompt and --prompt-name are both given; keep one of them"),
        (
            [*NEEDED, "--text-column", "text", "--text-template", "{a}"],
            "--text-column and --text-template are both given; keep one of them",
        ),
        ([*NEEDED, "--max-tokens", "512", "--batch-tokens", "256"], "--batch-tokens=256 is below --max-tokens=512"),
        ([*NEEDED, "--keep-columns", "embedding"], "column 'embedding' has a name that is reserved for the shards' own columns"),
        ([*NEEDED, "--id-column", "a", "--keep-columns", "a"], "column 'a' is named twice"),
        ([*NEEDED, "--config", "nowhere.yaml"], "nowhere.yaml does not exist"),
        ([*NEEDED, "--gpus-per-worker", "2"], "--gpus-per-worker='2' is invalid: use auto or a number of 1 or less"),
        ([*NEEDED, "--gpus-per-worker", "-1"], "--gpus-per-worker='-1' is invalid: use auto or a number of 0 or more"),
        ([*NEEDED, "--max-tokens"], f"--max-tokens {NO_VALUE} --max-tokens=VALUE if it begins with a hyphen"),
        ([*NEEDED, "--max-tokens", "--quiet"], f"--max-tokens {NO_VALUE} --max-tokens=VALUE if it begins with a hyphen"),
        ([*NEEDED, "--config"], f"--config {NO_VALUE} --config=VALUE if it begins with a hyphen"),
        (["--input", "i", "--output"], f"--output {NO_VALUE} --output=VALUE if it begins with a hyphen"),
        (["--input", "--output", "o"], "--input has no value; give it at least one"),
        ([*NEEDED, "b.parquet", "c.parquet"], "'b.parquet' is not the value of an option; write the option before it, and quote a glob"),
        (["--input", "", "--output", "o"], f"--input='' {EMPTY}"),
        (["--input", "i", "", "--output", "o"], f"--input='' {EMPTY}"),
        (["--input", "i", "--output", ""], f"--output='' {EMPTY}"),
        ([*NEEDED, "--keep-columns", "a", ""], f"--keep-columns='' {EMPTY}"),
        ([*NEEDED, "--json-summary", ""], f"--json-summary='' {EMPTY}"),
        ([*NEEDED, "--id-column="], f"--id-column='' {EMPTY}"),
        ([*NEEDED, "--revision", ""], f"--revision='' {EMPTY}"),
    ],
)
def test_a_wrong_option_is_one_sentence_and_exit_code_2(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == 2
    printed = capsys.readouterr()
    assert sentence in printed.err
    assert printed.err.count("\n") == 1
    assert "Traceback" not in printed.err
    assert printed.out == ""


def test_a_value_may_begin_with_a_hyphen() -> None:
    config = parse([*NEEDED, "--prompt=- ", "--text-column=-x"])
    assert config is not None
    assert (config.prompt, config.text_column) == ("- ", "-x")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("EMBED_BATCHTOKENS", "did you mean EMBED_BATCH_TOKENS? Else unset it"),
        ("EMBED_batch_tokens", "did you mean EMBED_BATCH_TOKENS? Else unset it"),
        ("EMBED_SAMPEL", "did you mean EMBED_SAMPLE? Else unset it"),
        ("EMBED_STORE_SECOND", "did you mean EMBED_STORE_SECONDS? Else unset it"),
        ("EMBED_XYZ", "unset it, or see --help for the options"),
        ("EMBED_CONFIG", "give --config on the command line, and unset it"),
    ],
)
@pytest.mark.parametrize("command", [parse, parse_proof], ids=["embed", "verify"])
def test_a_mistyped_variable_is_not_ignored(
    command: Callable[[list[str]], object], name: str, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "512")
    with pytest.raises(ConfigError, match=f"^the variable {name} is set, but it is not an option; {re.escape(sentence)}$"):
        command(NEEDED if command is parse else ["vectors"])


def test_every_variable_of_the_project_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands share an environment, and pods have variables for each service of their namespace."""
    sources = [*REPOSITORY.glob("embedding/**/*.py"), *REPOSITORY.glob("jobs/*.py"), *REPOSITORY.glob("deploy/**/*.*")]
    pages = [REPOSITORY / "README.md", *REPOSITORY.glob("docs/*.md")]
    named = {name for file in (*sources, *pages) for name in re.findall(r"\bEMBED_[A-Z_]+\b", file.read_text())}
    assert {"EMBED_CACHE", "EMBED_STORE_SECONDS", "EMBED_BATCH_TOKENS", "EMBED_SAMPLE"} <= named
    pod = "EMBED_CORPUS_X7K2P_HEAD_SVC"
    ends = ["SERVICE_HOST", "SERVICE_PORT", "SERVICE_PORT_DASHBOARD", "PORT", "PORT_8265_TCP", "PORT_8265_TCP_ADDR", "PORT_8265_TCP_PROTO"]
    require_known_variables([*(named - {"EMBED_CONFIG"}), *(f"{pod}_{end}" for end in ends), "PATH"])
    with pytest.raises(ConfigError, match=f"^the variable {pod}_PORT is set"):
        require_known_variables([f"{pod}_PORT"])
    monkeypatch.setenv("EMBED_SAMPLE", "5")  # an option of the other command
    assert parse(NEEDED) is not None


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("input: [a]\noutput: o\nbatch_token: 5\n", "'batch_token' is not an option; did you mean 'batch_tokens'?"),
        ("input: [a", "is not valid YAML"),
        ("- input", "must contain one option per line"),
        ("input: [a]\noutput: o\nnormalize: maybe\n", "--normalize='maybe' is invalid"),
    ],
)
def test_a_wrong_file_is_one_sentence(text: str, sentence: str, tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as refusal:
        parse(["--config", str(file)])
    assert sentence in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_values_of_the_file_are_what_is_written_there(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(
        "input: corpus\noutput: o\nworkers: 1:3\nnormalize: no\nrestart: true\nid_column: null\nkeep_columns:\nmax_tokens: 64\n"
    )
    config = parse(["--config", str(file)])
    assert config is not None
    assert (config.worker_range(), config.normalize, config.restart, config.max_tokens) == ((1, 3), "no", True, 64)
    assert (config.input, config.id_column, config.keep_columns) == (("corpus",), None, ())


def test_restart_without_a_terminal_needs_yes(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*NEEDED, "--restart"]) == 2
    assert "--restart deletes everything in vectors; add --yes to allow it" in capsys.readouterr().err


@pytest.mark.parametrize("question", ["--help", "--version"])
def test_help_and_version_answer_on_stdout(question: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBED_BATCHTOKENS", "512")  # whoever asks may be looking for the right name
    assert run([question]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert ("--batch-tokens" if question == "--help" else "0.1.0") in printed.out


def test_help_is_in_groups_and_names_what_goes_where(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert run(["--help"]) == 0
    printed = capsys.readouterr().out
    titles = re.findall(r"^╭─ (.*?) ─", printed, flags=re.MULTILINE)
    assert titles == ["Corpus", "Output", "Model", "Speed and placement", "Run", "Configuration", "Help"]
    assert "--batch-tokens auto|N " in printed
    assert printed.startswith("Usage: embed_corpus.py --input PATH|URL... --output PATH|URL [OPTIONS]\n")
    assert {"--input PATH|URL ", "--output PATH|URL ", "--text-column NAME ", "--model PATH|URL|ID "} <= set(
        re.findall(r"--[a-z-]+ [A-Z|]+ ", printed)
    )
    assert re.findall(r" (?:STR|INT|FLOAT) ", printed) == []
    assert "CHOICE|" not in printed


def test_bash_completes_the_installed_program(tmp_path: Path) -> None:
    program, script = tmp_path / "embed-corpus", tmp_path / "completion"
    program.write_text("from embedding.run.cli import main\nmain()\n")
    command = [sys.executable, str(program), "--install-completion", "--shell", "bash", "--output", str(script)]
    env = {**os.environ, "HOME": str(tmp_path), "PYTHONPATH": str(REPOSITORY)}
    subprocess.run(command, check=True, capture_output=True, timeout=60, env=env)
    assert complete(script, "--batch") == ["--batch-tokens"]
    assert {"mean", "max"} <= set(complete(script, "--pooling", "m"))
    (tmp_path / "corpus").mkdir()
    with on_terminal(["bash", "--norc", "--noprofile", "-i"], {"PS1": "$ "}) as terminal:
        terminal.wait_for(lambda lines: lines[-1] == "$", what="the prompt")
        # Another prompt, as the first one also stands there until the command is echoed, and keys pressed that early spoil the screen.
        terminal.press(f"source {script}; cd {tmp_path}; PS1='> '; clear\n".encode())
        terminal.wait_for(lambda lines: lines == [">"], what="the script to be read")
        terminal.press(b"embed-corpus --input corp\t --output vec --output-d\tfloat1\t")
        wanted = "> embed-corpus --input corpus/ --output vec --output-dtype float16"
        terminal.wait_for(lambda lines: lines[0] == wanted, what=wanted)
        terminal.press(b"\x15exit\n")  # instead of the line: an interactive bash ignores SIGTERM
        terminal.wait()


def test_zsh_offers_files_where_there_is_no_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "embed-corpus")])
    assert run(["--install-completion", "--shell", "zsh", "--output", str(tmp_path / "_embed-corpus")]) == 0
    script = (tmp_path / "_embed-corpus").read_text()
    offers = dict(re.findall(r"--([\w-]+)\[.*\]:[\w-]+:([\w(]+)", script))
    assert {offers[name] for name in ("input", "output", "model", "calibration", "config")} == {"_files"}
    assert offers["input-format"] == "(auto"


@pytest.mark.skipif(shutil.which("fish") is None, reason="no fish on this machine: as root, make fish installs Debian's")
def test_fish_completes_after_the_value_of_an_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As its lines are generated, they want that no word was given yet but options."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "corpus").mkdir()
    program, script = tmp_path / "bin" / "embed-corpus", tmp_path / "completion.fish"
    program.touch(mode=0o755)  # fish completes programs that it finds
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "argv", [str(program)])
    assert run(["--install-completion", "--shell", "fish", "--output", str(script)]) == 0

    def offered(typed: str) -> list[str]:
        command = ["fish", "--no-config", "-c", f"source {script}; complete -C '{typed}'"]
        shown = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True, timeout=60).stdout
        return [line.partition("\t")[0] for line in shown.splitlines()]

    assert offered("embed-corpus --input corpus --batch") == ["--batch-tokens"]
    assert offered("embed-corpus --input corpus --output-dtype flo") == ["float16", "float32"]
    assert offered("embed-corpus --restart --input corp") == ["corpus/"]


def complete(script: Path, *words: str) -> list[str]:
    """What bash offers for the last of the words."""
    asked = f"source {script}; COMP_WORDS=(embed-corpus {' '.join(words)}); COMP_CWORD={len(words)}; _embed_corpus; echo ${{COMPREPLY[@]}}"
    return subprocess.run(["bash", "-c", asked], check=True, capture_output=True, text=True, timeout=60).stdout.split()


def test_quiet_leaves_errors_and_the_answer(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    source = corpora.plain(rows=6, files=1).write(tmp_path / "in")
    options = ["--input", source, "--output", str(tmp_path / "out"), "--model", str(tiny_model), "--dry-run", "--rate", "1"]
    assert run(options) == 0
    told = capsys.readouterr()
    assert re.search(r"1 source file, \d\.\d kB, 6 rows$", told.err, flags=re.MULTILINE)
    assert "1 unit of up to 2,048 rows: 0 done, 1 to do" in told.err
    assert run([*options, "--quiet"]) == 0
    quiet = capsys.readouterr()
    assert quiet.err == ""
    assert quiet.out.splitlines()[:-1] == told.out.splitlines()[:-1]
    assert run([*options, "--verbose"]) == 0
    assert logging.getLogger("embedding").level == logging.DEBUG
    capsys.readouterr()
    assert run([*options, "--quiet", "--text-column", "txt"]) == 2
    assert re.fullmatch(
        r"error: .* has no column 'txt'; set --text-column to one of its columns \(did you mean 'text'\?\): id, text\n",
        capsys.readouterr().err,
    )


@pytest.mark.parametrize(("env", "colour"), [({}, "red"), ({"NO_COLOR": "1"}, "default")])
def test_colour_is_for_those_who_want_it(env: dict[str, str], colour: str) -> None:
    with on_terminal([sys.executable, SCRIPT, "--output", "o"], env) as terminal:
        assert terminal.wait()[0].startswith("error: --input is missing")
        assert terminal.colour(line=0, column=0) == colour
