"""What a proof finds, and that it finds nothing where nothing is wrong; in this process, on real shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from embedding.corpus.output import Output
from embedding.corpus.verify import repair
from tests.run.here import embed_here, found, prove_here
from tests.support import corpora, outputs
from tests.support.damage import OF_A_SHARD, damage

COLUMNS: dict[str, Any] = {"keep_columns": ("text",), "token_columns": True}
SHARDS = len(OF_A_SHARD) + 3


def corpus(folder: Path) -> str:
    return corpora.plain(rows=10 * SHARDS, files=1, row_group_rows=10).write(folder)


def test_each_damage_is_found_and_repaired_alone(tmp_path: Path, tiny_model: Path) -> None:
    source, output = corpus(tmp_path / "in"), str(tmp_path / "out")
    made = embed_here(source, output, tiny_model, **COLUMNS)
    assert len(made) == SHARDS
    whole = outputs.files(output)
    proof = prove_here(output)
    assert (proof.status, proof.findings, proof.rows, proof.sampled) == ("proved", {}, 10 * SHARDS, 10 * SHARDS)
    assert outputs.files(output) == whole

    expected = damage(output, made)
    before = outputs.files(output)
    proof = prove_here(output)

    assert found(proof) == expected
    assert len(proof.details) == len(expected)
    assert outputs.files(output) == before
    removed = repair(Output(output), proof.details)
    assert set(made) - set(outputs.shards(output)) == {name for _, name in expected if name in made}
    assert set(before) - set(removed) == set(outputs.files(output))
    assert embed_here(source, output, tiny_model, run="second", **COLUMNS) == [name for name in made if name != made[-1]]
    assert prove_here(output).status == "proved"
    again = outputs.files(output)
    assert {name: again[name] for name in [*made, "_control/manifest.parquet", "_SUCCESS"]} == {
        name: whole[name] for name in [*made, "_control/manifest.parquet", "_SUCCESS"]
    }
    assert [name for name in again if name.startswith("data/")] == made
