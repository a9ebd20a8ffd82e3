"""The benchmark runs and says what it measured; how fast anything is, is no matter here."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import PreTrainedConfig

from benchmarks import eight_bits, families, jobs, lanes, parity, peers, scale, sharing, stages
from benchmarks.bench import main, table
from benchmarks.data import find_model, make_model, make_texts
from benchmarks.peers import OURS
from benchmarks.planning import plan_stage
from benchmarks.programs import PROGRAMS
from benchmarks.setting import Result, Setting
from benchmarks.timing import interleave, ratio
from embedding.errors import ModelError
from embedding.model.linear import fp8_lacks
from embedding.model.tokenizer import Tokenizer
from tests.support import outputs
from tests.support.ray_cluster import NO_TOKEN

CIRCUMSTANCES = {"date", "command", "hardware", "versions", "rounds"}
"""What every result says of its run."""


@pytest.fixture(autouse=True)
def _settings_stay() -> object:
    threads = torch.get_num_threads()
    with warnings.catch_warnings():
        yield
    torch.set_num_threads(threads)


def test_the_quick_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stages = ["tokenizer", "encoder", "write", "launches", "parquet"]
    words = ["--quick", "--model", "tiny", "--lengths", "lognormal:8", "--tokens", "300", "--precision", "fp32", "--stages", *stages]
    found = main([*words, "--note", "a test", "--out", str(tmp_path / "results" / "tiny.json")])
    assert json.loads((tmp_path / "results" / "tiny.json").read_text()).keys() == found.keys()
    assert {*CIRCUMSTANCES, "model", "corpora"} <= found.keys()
    assert found["hardware"]["note"] == "a test"
    corpus = found["corpora"]["lognormal:8"]
    assert list(corpus["stages"]) == stages
    assert corpus["not_measured"] == {}
    assert corpus["stages"]["tokenizer"]["mismatches"] == 0
    for stage in (corpus["stages"]["encoder"]["fp32"], *(corpus["stages"][name] for name in ("tokenizer", "write", "parquet"))):
        assert {len(rounds) for rounds in stage["seconds"].values()} == {found["rounds"]}
    for name in ("tokenize", "write"):
        assert all(0 < each["longest"] <= each["seconds"] >= each["held_seconds"] for each in corpus["stages"]["launches"][name])
    assert table(found) in capsys.readouterr().out


def test_a_precision_that_fails_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = stages.encoder_stage

    def fails_in_bf16(setting: Setting, **options: Any) -> Result:
        if setting.precision == "bf16":
            raise RuntimeError("no such kernel")
        return real(setting, **options)

    monkeypatch.setattr(stages, "encoder_stage", fails_in_bf16)
    words = [
        "--quick",
        "--model",
        "tiny",
        "--lengths",
        "lognormal:8",
        "--tokens",
        "100",
        "--precision",
        "fp32",
        "bf16",
        "--stages",
        "encoder",
    ]
    found = main([*words, "--out", str(tmp_path / "tiny.json")])
    measured = found["corpora"]["lognormal:8"]["stages"]["encoder"]
    assert measured["fp32"]["tokens_per_second"] > 0
    assert measured["bf16"] == {"not_measured": "RuntimeError: no such kernel"}
    assert "| encoder bf16 | not measured: RuntimeError: no such kernel |" in table(found)
    saved = stages.encoder_by_precision(Setting.of(make_model("tiny", tmp_path), ["a text"], "cpu", "fp32", 1, 1), ["bf16", "fp32"])
    assert list(next(saved)) == ["bf16"]  # which is written before the next one is begun


def test_a_worker_that_dies_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("tiny", tmp_path)
    setting = Setting.of(model, ["a text"], "cpu", "fp32", 1, 2)
    (model.folder / "config.json").unlink()
    monkeypatch.setattr(sharing, "_WORKERS", (2,))
    with pytest.raises(ModelError, match=r"has no config\.json"):
        sharing.sharing_stage(setting)


def measured_without(lacking: list[str], stages: list[str], folder: Path) -> Result:
    """What the quick form finds of a corpus on a machine that lacks these packages."""
    without = f"import sys; sys.modules |= dict.fromkeys({lacking}); from benchmarks.bench import main; main(sys.argv[1:])"
    out = folder / "found.json"
    words = ["--quick", "--model", "tiny", "--lengths", "lognormal:8", "--tokens", "100", "--precision", "fp32", "--out", str(out)]
    subprocess.run([sys.executable, "-c", without, *words, "--stages", *stages], check=True, timeout=240)
    corpus: Result = json.loads(out.read_text())["corpora"]["lognormal:8"]
    return corpus


def test_a_machine_with_little_installed(tmp_path: Path) -> None:
    """As docs/performance.md has it of a GPU machine without network."""
    asked = ["encoder", "sharing", "write", "launches", "parquet"]
    corpus = measured_without(["ray", "s3fs", "aiobotocore", "aioitertools", "botocore", "jmespath", "aiohttp"], asked, tmp_path)
    assert list(corpus["stages"]) == asked
    assert corpus["not_measured"] == {}
    assert min(corpus["stages"]["sharing"]["tokens_per_second"].values()) > 0


def test_a_stage_that_lacks_a_package_is_listed_with_the_reason(tmp_path: Path) -> None:
    corpus = measured_without(["fsspec"], ["write", "encoder"], tmp_path)
    assert list(corpus["stages"]) == ["encoder"]
    assert corpus["not_measured"] == {"write": "ModuleNotFoundError: import of fsspec halted; None in sys.modules"}


def test_families_beside_berts(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(layers: int, width: int) -> PreTrainedConfig:
        raise ValueError(f"no {layers} layers of {width}")

    monkeypatch.setitem(families.FAMILIES, "electra", fails)
    words = ["--families", "mpnet", "t5", "electra", "--layers", "1", "--width", "128", "--lengths", "lognormal:8", "--tokens", "200"]
    found = families.main([*words, "--rounds", "2", "--out", str(tmp_path / "families.json")])
    assert json.loads((tmp_path / "families.json").read_text())["families"] == found["families"]
    for family, manner in {"mpnet": "packed", "t5": "padded"}.items():
        measured = found["families"][family]
        assert measured["batches"].startswith(manner)
        assert min(measured["worst_cosine_to_this_project"][name] for name in measured["ratio"]) > 0.9999
        assert {"sentence-transformers", "transformers, padded"} <= measured["ratio"].keys()
    assert found["families"]["electra"] == {"not_measured": "ValueError: no 1 layers of 128"}
    printed = capsys.readouterr().out
    assert "mpnet: " in printed
    assert "electra: not measured: ValueError: no 1 layers of 128" in printed


def test_whole_jobs(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PROGRAMS, "nothing", lambda *_: None)  # not in the process that is to run it
    words = ["--model", "tiny", "--lengths", "lognormal:8", "--tokens", "300", "--rounds", "1", "--batch-rows", "8"]
    found = jobs.main([*words, "--peers", "sentence-transformers", "nothing", "--out", str(tmp_path / "jobs.json")])
    assert json.loads((tmp_path / "jobs.json").read_text())["seconds"] == found["seconds"]
    assert list(found["seconds"]) == [OURS, "sentence-transformers"]
    assert found["worst_cosine_to_this_project"]["sentence-transformers"] > 0.9999
    assert found["batch_rows"] == {"sentence-transformers": 8}
    printed = capsys.readouterr().out
    assert "| sentence-transformers | " in printed
    assert "| nothing | not measured: " in printed


def test_ray_data_as_others_write_it(tmp_path: Path) -> None:
    folder = make_model("tiny", tmp_path).folder
    runs = jobs.Jobs(folder, ["one text", "another one", "and one more"], tmp_path)
    runs.choose_batch("Ray Data", [8])
    runs.run("Ray Data", "few")
    found = ds.dataset(tmp_path / "Ray-Data").to_table().sort_by("id")
    expected = SentenceTransformer(str(folder), device="cpu").encode(["one text", "another one", "and one more"], normalize_embeddings=True)
    np.testing.assert_allclose(np.array(found["embedding"].to_pylist()), expected, rtol=0, atol=1e-5)


def test_a_model_of_ones_own(tmp_path: Path) -> None:
    """Whose layers are not BERT's: its share of the matrix rate cannot be told."""
    folder = families.make_family("qwen3", 1, 128, tmp_path).folder
    words = ["--quick", "--model", str(folder), "--lengths", "lognormal:8", "--tokens", "100", "--stages", "encoder", "peers"]
    found = main(words)
    assert found["model"] == {"name": "qwen3", "weights": "published", "layers, width, heads": (1, 128, 2)}
    corpus = found["corpora"]["lognormal:8"]
    assert corpus["not_measured"] == {}
    reason = "ValueError: the FLOP of qwen3 are not counted, as its layers are not BERT's"
    assert set(map(str, corpus["stages"]["encoder"].values())) == {str({"not_measured": reason})}
    assert f"not measured: {reason}" in table(found)
    assert "sentence-transformers" in corpus["stages"]["peers"]["ratio"]
    with pytest.raises(SystemExit, match="qwen3 has other products than BERT"):
        eight_bits.main(["no.parquet", "--model", str(folder)])


def test_a_model_like_bert_in_a_folder(tmp_path: Path) -> None:
    made = make_model("tiny", tmp_path)
    found = find_model(str(made.folder), tmp_path)
    assert (found.layers, found.width, found.heads, found.max_tokens) == (made.layers, made.width, made.heads, made.max_tokens)
    assert found.flop(np.array([7])) == made.flop(np.array([7]))


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--model=bert-bass is no folder with a config.json; give one, or minilm, bert-base,"):
        find_model("bert-bass", tmp_path)


def test_a_peer_with_other_vectors_is_not_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def other(texts: list[str], rows: int) -> peers.Vectors:
        return np.full((len(texts), 32), 1 / rows, np.float32)

    monkeypatch.setattr(peers, "_peers", lambda *_: {"other": lambda: other})
    model = make_model("tiny", tmp_path)
    found = peers.peers_stage(Setting.of(model, ["one text", "and another"], "cpu", "fp32", 1, 1), tmp_path)
    assert found["ratio"] == {}
    assert "its vectors are others" in found["not_measured"]["other"]


def test_the_plan_of_many_files(storage_root: str) -> None:
    plan = plan_stage(storage_root, 30)
    assert (plan["files"], plan["units"]) == (30, 300)
    assert set(plan["complete"]["seconds"]) == {"list sources", "read footers", "cut units", "list shards", "ledger, manifest", "all"}
    assert outputs.control(f"{storage_root}/out", "manifest.parquet")["tokens"].to_pylist() == [80] * 300


def test_the_quick_form_of_scale(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in NO_TOKEN.items():  # which this process would use on every later cluster too
        monkeypatch.setenv(name, value)
    words = ["--files", "3", "--units", "20", "--workers", "2", "--rounds", "3", "--stages", "plan", "rate", "memory"]
    found = scale.main([*words, "--out", str(tmp_path / "scale.json")])
    assert json.loads((tmp_path / "scale.json").read_text())["stages"] == found["stages"]
    assert found.keys() == {*CIRCUMSTANCES, "store", "stages"}
    assert found["command"].startswith("--files 3 ")
    rate, memory = found["stages"]["rate"], found["stages"]["memory"]
    assert (rate["units"], sum(rate["units_by_worker"])) == (20, 20)
    assert memory["object_store"]["peak_megabytes"] >= memory["unit_megabytes"]
    assert 0.0 < memory["efficiency"] <= 1.0
    printed = capsys.readouterr().out
    assert "plan: 30 units of 3 files" in printed
    assert "20 units without work" in printed


@pytest.mark.parametrize(("lengths", "low", "high"), [("lognormal:8", 3, 80), ("uniform:5-9", 5, 9)])
def test_texts_have_the_lengths_that_were_asked_for(lengths: str, low: int, high: int, tmp_path: Path) -> None:
    texts = make_texts(lengths, make_model("tiny", tmp_path), 500)
    sizes = [len(text.split()) + 2 for text in texts]  # a token a word, and two that frame them
    assert low <= min(sizes) <= max(sizes) <= high
    assert 500 <= sum(sizes) <= 500 + high
    assert len(set(texts)) == len(texts)


def test_lengths_that_are_unknown(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="say demo, lognormal:32 or uniform:50-300"):
        make_texts("normal:3", make_model("tiny", tmp_path), 10)


def test_rounds_are_interleaved() -> None:
    calls: list[str] = []
    times = interleave({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2)
    assert "".join(calls) == "ab" + "ab" + "ba"
    assert {name: len(found) for name, found in times.items()} == {"a": 2, "b": 2}
    assert ratio([1.0, 1.0, 1.0], [1.0, 2.0, 9.0]) == 2.0


def test_the_parity_of_tokenizers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = ["One line.\nAnother line.\n\nA paragraph.", "One line.", " "]
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    found = parity.main([str(tmp_path / "a.parquet"), "--model", "tiny", "--random", "300", "--out", str(tmp_path / "parity.json")])
    assert json.loads((tmp_path / "parity.json").read_text()).keys() == found.keys() == {*CIRCUMSTANCES, "model", "real", "random"}
    assert (found["real"]["texts"], found["real"]["mismatches"]) == (5, 0)
    assert (found["random"]["texts"], found["random"]["mismatches"]) == (300, 0)
    assert "random: 300 texts" in capsys.readouterr().out


def test_texts_that_are_cut_otherwise_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer(make_model("tiny", tmp_path).spec("fp32"), tmp_path / "tiny")
    monkeypatch.setattr(tokenizer, "by_reference", lambda texts: tokenizer([text.removesuffix("!") for text in texts]))
    assert parity.compare(tokenizer, iter(["same", "other!"]))["first"] == ["other!"]


@pytest.mark.skipif(bool(fp8_lacks(torch.device("cpu"))), reason="this torch has no fp8 on CPUs")
def test_what_eight_bits_would_cost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pq.write_table(pa.table({"text": ["One text.", "Another one, which is longer.", None]}), tmp_path / "a.parquet")
    found = eight_bits.main([str(tmp_path / "a.parquet"), "--model", "tiny", "--note", "a test", "--out", str(tmp_path / "found.json")])
    assert json.loads((tmp_path / "found.json").read_text()).keys() == found.keys()
    assert found.keys() == {*CIRCUMSTANCES, "model", "texts", "cosine with fp32"}
    assert found["hardware"]["note"] == "a test"
    least = {name: kept["least"] for name, kept in found["cosine with fp32"].items()}
    assert {"bf16", "fp8, all", "int8, all", "fp8, only up", "int8, only down"} < least.keys()
    assert all(0.99 < cosine < 1 for cosine in least.values())
    assert len(set(least.values())) == len(least)  # which of them is nearer is the processor's matter, in so small a model
    assert f"fp8, all: least {least['fp8, all']:.4f}" in capsys.readouterr().out


def test_what_many_lanes_would_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--lanes", "1", "3", "--batch-seconds", "0.02", "--rounds", "2", "--out", str(tmp_path / "lanes.json")]
    found = lanes.main(words)
    assert json.loads((tmp_path / "lanes.json").read_text())["lanes"] == {str(number): busy for number, busy in found["lanes"].items()}
    assert found.keys() == {*CIRCUMSTANCES, "seconds of a batch", "lanes"}
    assert [len(busy) for busy in found["lanes"].values()] == [2, 2]
    assert all(0 < share < 1 for busy in found["lanes"].values() for share in busy)
    assert "3 lanes: " in capsys.readouterr().out


def test_the_product_of_integers_is_the_product() -> None:
    generator = torch.Generator().manual_seed(0)
    found_TF, weight_OF, bias_O = (torch.randn(shape, generator=generator) for shape in ((5, 32), (48, 32), (48,)))
    made_TO, exact_TO = eight_bits.int8_product(found_TF, weight_OF, bias_O), torch.nn.functional.linear(found_TF, weight_OF, bias_O)
    assert made_TO.dtype == torch.bfloat16
    assert 0.9999 < torch.cosine_similarity(made_TO.float().flatten(), exact_TO.flatten(), dim=0) < 1
