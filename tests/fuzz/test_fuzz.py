"""Thousands of damaged files: each is refused in one sentence or gives the rows that are in it, and nothing dies or hangs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.fuzz import formats
from tests.fuzz.mutants import damages, originals

MUTANTS = 5_600
OF_OTHER_FORMATS = 300
PROCESSES = 2
PEAK_BYTES = 512 * 2**20
"""Of a reading process: the libraries take 150 MiB of it, a mutant has some kilobytes."""


def read_mutants(first: int, folder: Path) -> list[dict[str, Any]]:
    """What the reading process says about every PROCESSES-th mutant from `first` on, an object a line."""
    place = folder / str(first)
    place.mkdir()
    command = [sys.executable, "-m", "tests.fuzz.reader", str(place), *map(str, (first, MUTANTS, PROCESSES))]
    process = subprocess.run(command, capture_output=True, text=True, timeout=800, check=False)
    lines = [json.loads(line) for line in process.stdout.splitlines()]
    assert process.returncode == 0, f"the reader died or hung at {lines[-1:]}\n{process.stderr[-3000:]}"
    return lines


@pytest.mark.timeout(900)  # 20 s where nothing else runs
def test_no_damaged_file_gives_a_wrong_row_or_ends_a_process(tmp_path: Path) -> None:
    with ThreadPoolExecutor(PROCESSES) as pool:
        said = [line for lines in pool.map(partial(read_mutants, folder=tmp_path), range(PROCESSES)) for line in lines]
    results = [line for line in said if "outcome" in line]
    assert [result for result in results if result["outcome"] == "wrong"] == []
    assert len({result["number"] for result in results}) == MUTANTS
    assert {(result["original"], result["damage"]) for result in results} == {(one.name, how) for one in originals() for how in damages()}

    # Not by refusing everything, nor by reading everything: some files lose some units only.
    outcomes = Counter(result["outcome"] for result in results)
    assert outcomes["rows"] > 0.15 * MUTANTS
    assert outcomes["some"] > 0.10 * MUTANTS
    assert outcomes["refused"] > 0.40 * MUTANTS
    assert [result for result in results if result["peak_bytes"] > PEAK_BYTES][:1] == []


def test_no_damaged_file_of_another_format_gives_a_wrong_row_or_ends_a_process(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.fuzz.formats", str(tmp_path), str(OF_OTHER_FORMATS)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    lines = [json.loads(line) for line in process.stdout.splitlines()]
    assert process.returncode == 0, f"the reader died or hung at {lines[-1:]}\n{process.stderr[-3000:]}"
    results = [line for line in lines if "outcome" in line]
    assert [result for result in results if result["outcome"] == "wrong"] == []
    assert process.stderr == ""
    assert len({result["number"] for result in results}) == OF_OTHER_FORMATS
    assert len({(result["original"], result["damage"]) for result in results}) == len(formats.originals()) * len(formats.DAMAGES)
    outcomes = Counter((result["original"], result["outcome"]) for result in results)
    mutants_each = OF_OTHER_FORMATS / len(formats.originals())
    for name in formats.originals():
        assert outcomes[name, "refused"] + outcomes[name, "some"] > 0.1 * mutants_each
        assert outcomes[name, "rows"] > 0.1 * mutants_each or name.endswith(".gz")  # which has a checksum
    assert all(outcomes[name, "some"] > 0 for name in ("a.jsonl", "a.csv"))
    assert [result for result in results if "needs more memory" in result["why"] and "arrow" not in result["original"]] == []
    assert [result for result in results if result["peak_bytes"] > PEAK_BYTES][:1] == []
