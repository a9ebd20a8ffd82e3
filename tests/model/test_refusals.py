"""A model that cannot be run, or an option that does not fit it, is refused in one sentence."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from embedding.config import JobConfig
from embedding.errors import ModelError
from embedding.model.embedder import Embedder
from embedding.model.spec import resolve_model
from embedding.names import DEFAULT_MODEL
from tests.model.tiny import POSITIONS, WIDTH, save_model, spec_of, write_json


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("saved"), "roberta")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def refused(folder: Path | str, sentence: str, **options: Any) -> None:
    with pytest.raises(ModelError, match=sentence) as caught:
        spec_of(Path(folder), **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["no/such/folder", "/no/such/folder", "no-such-org/no-such-model"])
def test_no_such_model(name: str) -> None:
    refused(name, "is neither a folder nor")


def test_options_that_do_not_fit(folder: Path) -> None:
    refused(folder, f"--dimensions=33 is above the model's {WIDTH}", dimensions=WIDTH + 1)
    refused(folder, f"--max-tokens=161 is above the model's {POSITIONS} positions", max_tokens=POSITIONS + 1)
    refused(folder, "--prompt-name=query is not a prompt of the model, which has none; use --prompt", prompt_name="query")
    refused(folder, "--revision=main needs a hub id", revision="main")
    assert spec_of(folder, max_tokens=POSITIONS).max_tokens == POSITIONS
    with pytest.raises(ModelError, match="--max-tokens=2 leaves no room next to the 2 special tokens"):
        Embedder(spec_of(folder, max_tokens=2))


def test_only_safetensors_are_loaded(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, r"pytorch_model.bin only; convert them once")
    (folder / "pytorch_model.bin").unlink()
    refused(folder, "has no model.safetensors")


def test_missing_files(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    refused(folder, "has no tokenizer.json")
    (folder / "config.json").write_text("{")
    refused(folder, "is not valid JSON")
    (folder / "config.json").write_text("[]")
    refused(folder, "is not a configuration that transformers can read")
    (folder / "config.json").unlink()
    refused(folder, "has no config.json")


def test_a_configuration_that_transformers_refuses(folder: Path) -> None:
    said = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", said | {"hidden_size": "wide"})
    refused(folder, "is not a configuration that transformers can read")
    write_json(folder / "config.json", said | {"num_attention_heads": "many"})  # which only a worker looks at
    with pytest.raises(ModelError, match=r"the tokenizer of .* cannot be loaded .*num_attention_heads.*; check its files"):
        Embedder(spec_of(folder))


@pytest.mark.parametrize(
    ("modules", "sentence"),
    [
        (["Transformer"], "modules.json lists Transformer, but only"),
        (["Transformer", "Pooling", "Normalize", "Dense"], "Normalize -> Dense, but only"),
        (["StaticEmbedding"], "StaticEmbedding"),
    ],
)
def test_modules_that_cannot_be_run(folder: Path, modules: list[str], sentence: str) -> None:
    write_json(folder / "modules.json", [{"path": name, "type": f"sentence_transformers.models.{name}"} for name in modules])
    refused(folder, sentence)


def test_a_module_from_elsewhere_is_not_run(folder: Path) -> None:
    pooling = {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}
    write_json(folder / "modules.json", [{"path": "", "type": "custom_st.Transformer"}, pooling])
    refused(folder, "custom_st.Transformer")


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"module_input_name": "token_embeddings"}, "turns token_embeddings into token_embeddings"),
        ({"activation_function": "os.system"}, "only classes of torch.nn"),
        ({"in_features": WIDTH + 1}, f"reads {WIDTH + 1} numbers but gets {WIDTH}"),
        ({}, None),
    ],
)
def test_dense_modules(folder: Path, config: dict[str, Any], sentence: str | None) -> None:
    names = ["Transformer", "Pooling", "Dense"]
    paths = ["", "1_Pooling", "2_Dense"]
    write_json(
        folder / "modules.json",
        [{"path": path, "type": f"sentence_transformers.models.{name}"} for path, name in zip(paths, names, strict=True)],
    )
    write_json(folder / "1_Pooling" / "config.json", {"embedding_dimension": WIDTH, "pooling_mode": "mean"})
    write_json(folder / "2_Dense" / "config.json", {"in_features": WIDTH, "out_features": 4, "bias": False} | config)
    save_file({"linear.weight": np.ones((4, WIDTH), np.float32)}, folder / "2_Dense" / "model.safetensors")
    if sentence is None:
        assert spec_of(folder).dimensions == 4
    else:
        refused(folder, sentence)


def test_weights_that_leave_gaps(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"no weights for encoder.layer.1.output.dense.weight"):
        Embedder(spec_of(folder))


def test_other_bytes_than_the_driver_saw(folder: Path) -> None:
    spec = spec_of(folder)
    tokenizer = folder / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + "\n")
    with pytest.raises(ModelError, match="tokenizer of model"):
        Embedder(spec)
    shutil.rmtree(folder)
    with pytest.raises(ModelError, match="is missing on this machine"):
        Embedder(spec)


def test_fingerprint_is_that_of_the_bytes_not_of_the_place(packaged_model: Path) -> None:
    packaged = resolve_model(JobConfig.build(input=("in",), output="out", model=DEFAULT_MODEL), precision="fp32")
    copied = spec_of(packaged_model)
    assert packaged.source.kind == "package"
    assert copied.source.kind == "folder"
    assert packaged.fingerprint_fields() == copied.fingerprint_fields()
    assert packaged.fingerprint_fields()["weights_sha256"] == "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    assert json.loads(json.dumps(packaged.fingerprint_fields())) == packaged.fingerprint_fields()
    assert len(pickle.dumps(packaged)) < 2000


@pytest.mark.parametrize(
    "options",
    [{"prompt": "a "}, {"dimensions": 8}, {"max_tokens": 9}, {"pooling": "cls"}, {"normalize": "yes"}, {"trust_remote_code": True}],
)
def test_each_option_that_changes_vectors_changes_the_fingerprint(saved: Path, options: dict[str, Any]) -> None:
    assert spec_of(saved, **options).fingerprint_fields() != spec_of(saved).fingerprint_fields()
