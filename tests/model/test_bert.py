"""Which models run on the encoder of the job's own, which on that of transformers, and what the first does not load."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForSequenceClassification
from transformers.models.mpnet.modeling_mpnet import MPNetEncoder

from embedding.errors import ModelError
from embedding.model import bert
from embedding.model.bert import read_bert
from embedding.model.embedder import Embedder
from embedding.model.relative import relative_bias
from tests.model.test_families import plain_vectors, worst_cosine
from tests.model.tiny import FAMILIES, TEXTS, save_model, spec_of, write_json

OWN = {"bert", "distilbert", "mpnet", "roberta", "xlm-roberta"}


def runs_on_own(folder: Path, **options: Any) -> bool:
    return read_bert(spec_of(folder, **options), folder, torch.device("cpu"), torch.float32) is not None


def vectors(folder: Path) -> np.ndarray[Any, np.dtype[np.float32]]:
    embedder = Embedder(spec_of(folder))
    return embedder.embed(embedder.tokenize(TEXTS), 1000).vectors_RD


def configure(folder: Path, **changes: Any) -> Path:
    """Change the configuration of a saved model, and nothing else of it."""
    write_json(folder / "config.json", json.loads((folder / "config.json").read_text()) | changes)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_which_families_are_of_the_layout(family: str, tmp_path: Path) -> None:
    assert runs_on_own(save_model(tmp_path, family)) == (family in OWN)


@pytest.mark.parametrize("family", sorted(OWN))
@pytest.mark.parametrize(
    ("changes", "own"), [({}, True), ({"relu": 1}, True), ({"silu": 1}, False), ({"auto_map": {"AutoModel": "x.Y"}}, False)]
)
def test_a_configuration_that_asks_for_more_is_left_to_transformers(
    family: str, changes: dict[str, Any], own: bool, tmp_path: Path
) -> None:
    folder = save_model(tmp_path, family)
    key = "activation" if family == "distilbert" else "hidden_act"
    configure(folder, **({key: next(iter(changes))} if {"relu", "silu"} & changes.keys() else changes))
    assert runs_on_own(folder) == own
    spec = spec_of(folder)
    assert worst_cosine(vectors(folder), plain_vectors(folder, TEXTS, spec.max_tokens)) > 0.99999


@pytest.mark.parametrize(
    "changes",
    [{"auto_map": {"AutoModel": "x.Y"}}, {"is_decoder": True}, {"add_cross_attention": True}, {"quantization_config": {"bits": 4}}],
)
def test_what_bert_can_also_be(changes: dict[str, Any], tmp_path: Path) -> None:
    assert not runs_on_own(configure(save_model(tmp_path, "bert"), **changes))


def test_mpnet_with_other_padding_is_left_to_transformers(tmp_path: Path) -> None:
    assert not runs_on_own(configure(save_model(tmp_path, "mpnet"), pad_token_id=0))


def test_mpnet_has_no_use_for_a_kernel_that_takes_no_bias(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_model(tmp_path, "mpnet")
    monkeypatch.setattr(bert, "has_kernel", lambda *_: True)
    assert runs_on_own(folder)
    assert worst_cosine(vectors(folder), plain_vectors(folder, TEXTS, spec_of(folder).max_tokens)) > 0.99999


def test_a_table_of_relative_positions_of_another_size_is_left_to_transformers(tmp_path: Path) -> None:
    folder = save_model(tmp_path, "mpnet")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = "encoder.relative_attention_bias.weight"
    save_file(tensors | {name: torch.cat([tensors[name], tensors[name]])}, file, metadata={"format": "pt"})
    configure(folder, relative_attention_num_buckets=64)
    assert not runs_on_own(folder)
    assert worst_cosine(vectors(folder), plain_vectors(folder, TEXTS, spec_of(folder).max_tokens)) > 0.99999


def test_the_bias_is_that_of_transformers_at_every_distance() -> None:
    table_BH, positions = torch.randn(32, 3, generator=torch.Generator().manual_seed(0)), 600
    distance = torch.arange(positions)[None, :] - torch.arange(positions)[:, None]
    buckets = MPNetEncoder.relative_position_bucket(distance)
    assert len(buckets.unique()) == 31  # no key that comes later has the distance 0
    torch.testing.assert_close(relative_bias(table_BH, positions), table_BH[buckets].permute(2, 0, 1), rtol=0, atol=0)


def renamed(folder: Path, new_name: Callable[[str], str]) -> None:
    file = folder / "model.safetensors"
    save_file({new_name(name): tensor for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})


def test_names_of_old_checkpoints(tmp_path: Path) -> None:
    folder = save_model(tmp_path, "bert")
    expected = vectors(folder)
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    renamed(folder, lambda name: next((name.replace(new, was) for new, was in old.items() if new in name), name))
    assert "embeddings.LayerNorm.gamma" in load_file(folder / "model.safetensors")
    assert runs_on_own(folder)
    np.testing.assert_array_equal(vectors(folder), expected)


@pytest.mark.parametrize("family", sorted(OWN))
def test_a_model_that_was_saved_with_a_head(family: str, tmp_path: Path) -> None:
    folder = save_model(tmp_path, family)
    torch.manual_seed(1)
    AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(folder)
    assert all("." in name for name in load_file(folder / "model.safetensors"))
    assert runs_on_own(folder)
    assert worst_cosine(vectors(folder), plain_vectors(folder, TEXTS, spec_of(folder).max_tokens)) > 0.99999


def test_half_precision_weights_are_computed_with_as_whole_ones(tmp_path: Path) -> None:
    folder = save_model(tmp_path, "bert")
    file = folder / "model.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    half = vectors(folder)
    save_file({name: tensor.float() for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    np.testing.assert_array_equal(half, vectors(folder))


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    folder = save_model(tmp_path, "bert")
    configure(folder, intermediate_size=65)
    with pytest.raises(ModelError, match="cannot be loaded"):
        Embedder(spec_of(folder))


_WHAT_IS_LOADED = """
import sys
from pathlib import Path
from embedding.config import JobConfig
from embedding.model.embedder import Embedder
from embedding.model.spec import resolve_model
spec = resolve_model(JobConfig.build(input=("x",), output="y", model=sys.argv[1]), precision="fp32")
embedder = Embedder(spec)
embedder.embed(embedder.tokenize(["a text"]), 100)
print(*(name for name in ("transformers", "transformers.modeling_utils", "torch._dynamo", "scipy") if name in sys.modules))
"""


def test_the_large_half_of_transformers_is_not_loaded(tmp_path: Path) -> None:
    def loaded(family: str) -> list[str]:
        command = [sys.executable, "-c", _WHAT_IS_LOADED, str(save_model(tmp_path / family, family))]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()

    assert loaded("bert") == ["transformers"]
    assert "transformers.modeling_utils" in loaded("electra")
