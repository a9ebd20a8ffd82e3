"""What the tests of whole runs share: a tiny model, and a job that joins the shared Ray cluster."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from embedding import JobConfig, Summary, embed_corpus
from tests.model.tiny import save_model
from tests.support.ray_cluster import RayCluster

Embed: TypeAlias = Callable[..., Summary]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of two layers with random weights: 32 dimensions."""
    return save_model(tmp_path_factory.mktemp("model"), "bert")


@pytest.fixture
def embed(ray_cluster: RayCluster, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Embed:
    """`embed(input=..., output=..., **options)`: the Python call, in this process, on the shared cluster, with the tiny model."""
    for name, value in ray_cluster.environment().items():
        monkeypatch.setenv(name, value)

    def run(**options: Any) -> Summary:
        inputs = options.pop("input")
        defaults = {"model": str(tiny_model), "id_column": "id", "unit_rows": 10, "progress": "none", "report": "no"}
        return embed_corpus(JobConfig.build(input=(inputs,) if isinstance(inputs, str) else inputs, **(defaults | options)))

    return run
