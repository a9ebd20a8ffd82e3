"""Proofs of whole runs, on the cluster and as a user asks for them: on a disk and on an S3 server."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from embedding.corpus.findings import Finding, Kind
from embedding.corpus.lease import Lease
from embedding.corpus.output import Output
from embedding.run.proof.cli import parse
from embedding.run.proof.config import VerifyConfig
from embedding.run.proof.result import Proof
from embedding.run.proof.verify import verify_corpus
from tests.run.conftest import Embed
from tests.run.here import found
from tests.support import corpora, outputs
from tests.support.damage import OF_A_SHARD, damage
from tests.support.job import REPOSITORY

SHARDS = len(OF_A_SHARD) + 3
OPTIONS: dict[str, Any] = {"keep_columns": ["text"], "token_columns": True, "normalize": "yes"}


def verify(*arguments: str) -> tuple[int, dict[str, Any], str]:
    """Exit code, summary and stderr of the command line."""
    command: list[str | Path] = [sys.executable, REPOSITORY / "jobs" / "verify_corpus.py", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    last = done.stdout.rstrip().rpartition("\n")[2]
    return done.returncode, json.loads(last) if last else {}, done.stderr


def test_damage_is_proved_and_repaired_and_the_next_run_makes_just_that_anew(storage_root: str, embed: Embed) -> None:
    source, output = corpora.plain(rows=10 * SHARDS, files=1, row_group_rows=10).write(f"{storage_root}/in"), f"{storage_root}/out"
    embed(input=source, output=output, **OPTIONS)
    whole = outputs.files(output, "data")
    ledger = set(outputs.files(output, "_control/records"))
    expected = damage(output, list(whole))
    before = outputs.files(output)

    exit_code, summary, stderr = verify(output, "--sample", "9999", "--json-summary", f"{storage_root}/proof.json")

    assert (exit_code, summary["status"]) == (3, "not proved"), stderr
    details = outputs.document(storage_root, "proof.json")["details"]
    assert {(finding["kind"], finding["name"]) for finding in details} == expected
    assert summary["findings"] == {kind: [each for each, _ in expected].count(kind) for kind in {each for each, _ in expected}}
    assert outputs.files(output) == before
    for kind, name in expected:
        assert f"{kind}: {name}" in stderr
    assert re.search(r"^damaged: \d+ shards, \d+ rows without a fault, but .*1 missing shard.*; use --repair, ", stderr, flags=re.MULTILINE)

    repaired = verify_corpus(VerifyConfig(output=output, sample=9999, repair=True))

    assert (repaired.status, repaired.exit_code, found(repaired)) == ("repaired", 3, expected)
    left = outputs.files(output)
    named = {name for _, name in expected if name in before}
    assert before.keys() - left.keys() == set(repaired.removed) == named | ledger | {"_SUCCESS", "_control/manifest.parquet"}
    bad = whole.keys() - left.keys()
    assert bad == {name for _, name in expected if name in whole}
    summary_of_run = embed(input=source, output=output, **OPTIONS)
    assert (summary_of_run.units_done, summary_of_run.units_skipped) == (len(bad), SHARDS - len(bad))
    assert outputs.files(output, "data") == whole
    proof = verify_corpus(VerifyConfig(output=output))
    assert (proof.status, proof.exit_code, proof.rows, proof.sampled) == ("proved", 0, 10 * SHARDS, 100)
    assert proof.worst_cosine is not None
    assert proof.worst_cosine > 0.99999


def test_repair_waits_for_no_run_and_a_proof_runs_beside_one(embed: Embed, tmp_path: Path) -> None:
    source, output = corpora.plain(rows=10, files=1).write(tmp_path / "in"), str(tmp_path / "out")
    embed(input=source, output=output)
    lease = Lease.acquire(Output(output).storage, "a-run", 30)
    try:
        exit_code, summary, stderr = verify(output, "--repair")
        assert (exit_code, summary) == (4, {})
        assert "is held by run a-run" in stderr
        assert "Traceback" not in stderr
        assert verify_corpus(VerifyConfig(output=output)).status == "proved"
    finally:
        lease.release()


def test_what_is_no_output_is_refused(tmp_path: Path) -> None:
    exit_code, summary, stderr = verify(str(tmp_path))
    assert (exit_code, summary) == (2, {})
    assert "is not an output of this job: it has no _control/job.json; check the path" in stderr
    assert stderr.count("\n") == 1


def test_the_verdict_is_told_to_people_and_the_summary_to_programs(embed: Embed, tmp_path: Path) -> None:
    source, output = corpora.plain(rows=20, files=2).write(tmp_path / "in"), str(tmp_path / "out")
    embed(input=source, output=output)
    exit_code, summary, stderr = verify(output)
    assert (exit_code, summary["status"]) == (0, "proved")
    assert re.fullmatch(r"proved: 2 shards, 20 rows, worst cosine (1\.0000000|0\.99999\d\d) of 20 rows", stderr.splitlines()[-1])
    Path(output, "_SUCCESS").unlink()
    exit_code, summary, stderr = verify(output, "--sample", "0")
    assert (exit_code, summary["status"]) == (3, "not proved")
    assert stderr.splitlines()[-1].startswith("run not finished: 2 shards, 20 rows without a fault, but 1 not complete; run the job ")


def test_a_file_that_the_run_set_aside_is_told_of_as_that(embed: Embed, tmp_path: Path) -> None:
    source, output = corpora.plain(rows=20, files=2).write(tmp_path / "in"), str(tmp_path / "out")
    embed(input=source, output=output)
    whole = outputs.files(output, "data")
    bad = tmp_path / "in" / "part-1.parquet"
    good = bad.read_bytes()
    bad.write_bytes(good[:-1])
    (tmp_path / "in" / "part-9.parquet").write_bytes(b"garbage")
    assert embed(input=source, output=output).files_failed == 2
    proof = verify_corpus(VerifyConfig(output=output, repair=True))
    assert proof.verdict.startswith(
        "sources unreadable: 1 shard, 10 rows without a fault, but 2 unreadable source, 1 not complete; restore "
    )
    assert (proof.exit_code, proof.removed, outputs.files(output, "data")) == (3, [], whole)
    (tmp_path / "in" / "part-9.parquet").unlink()
    bad.write_bytes(good)
    embed(input=source, output=output)
    assert verify_corpus(VerifyConfig(output=output)).status == "proved"


@pytest.mark.parametrize(
    ("kinds", "removed", "begin"),
    [
        ([], 0, "proved: 3 shards, 0 rows, no vectors compared"),
        ([Kind.WRONG_BYTES, Kind.NOT_COMPLETE, Kind.SOURCE_CHANGED], 0, "damaged: 3 shards, 0 rows without a fault, but 1 wrong bytes, "),
        ([Kind.WRONG_BYTES], 2, "repaired: 2 objects deleted; run the job"),
        ([Kind.SOURCE_CHANGED, Kind.NOT_COMPLETE], 0, "run not finished: "),
        ([Kind.FOREIGN_FILE, Kind.SOURCE_CHANGED], 0, "sources changed since: "),
        ([Kind.UNREADABLE_SOURCE], 0, "sources unreadable: "),
        ([Kind.FOREIGN_FILE], 0, "foreign files in data/: "),
    ],
)
def test_the_first_words_tell_the_cases_apart(kinds: list[Kind], removed: int, begin: str) -> None:
    proof = Proof("out", shards=3)
    proof.conclude([Finding(kind, "name", "what") for kind in kinds], ["name"] * removed)
    assert proof.verdict.startswith(begin)
    assert (proof.exit_code == 0) == (not kinds)


def test_every_finding_has_a_case() -> None:
    for kind in Kind:
        proof = Proof("out")
        proof.conclude([Finding(kind, "name", "what")], [])
        assert f"1 {kind}; " in proof.verdict
    assert Proof("out").verdict == "crashed: nothing is proved"


@pytest.mark.parametrize("arguments", [["vectors"], ["--output", "vectors"]])
def test_the_output_needs_no_option_name(arguments: list[str]) -> None:
    config = parse([*arguments, "--sample", "7", "--repair"])
    assert config == VerifyConfig(output="vectors", sample=7, repair=True)
