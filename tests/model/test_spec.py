"""What is known of a model before anything of it is loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from embedding.errors import ModelError
from embedding.model import spec
from embedding.model.spec import ModelSpec
from tests.model.tiny import FAMILIES, save_model, spec_of

_MORE: dict[str, Callable[[dict[str, Any]], object]] = {
    "as it is": lambda _said: None,
    "a causal head": lambda said: said.update(architectures=["RobertaForCausalLM"]),
    "a head that is not causal": lambda said: said.update(architectures=["RobertaForCausalLM"], is_causal=False),
    "no architectures": lambda said: said.pop("architectures", None),
    "no padding": lambda said: said.update(pad_token_id=None),
    "a number left out": lambda said: said.pop("max_position_embeddings", None),
}
"""What can be done to a config.json, by name."""


@pytest.mark.parametrize("change", _MORE)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_configuration_is_read_as_transformers_reads_it(
    family: str, change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_model(tmp_path / family, family)
    said = json.loads((folder / "config.json").read_text())
    _MORE[change](said)
    (folder / "config.json").write_text(json.dumps(said))
    found = _spec_or_refusal(folder)
    monkeypatch.setattr(spec, "_READ_AS_SAID", frozenset())
    assert found == _spec_or_refusal(folder)


def _spec_or_refusal(folder: Path) -> ModelSpec | str:
    try:
        return spec_of(folder)
    except ModelError as error:
        return str(error)


def test_torch_is_not_needed_to_plan_a_common_model(tmp_path: Path) -> None:
    asked = """
import sys
from embedding.config import JobConfig
from embedding.model.spec import resolve_model
resolve_model(JobConfig(input=("x",), output="y", model=sys.argv[1]), precision="fp32")
print("torch" in sys.modules)
"""

    def loads_torch(family: str) -> str:
        command = [sys.executable, "-c", asked, str(save_model(tmp_path / family, family))]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    assert loads_torch("roberta") == "False"
    assert loads_torch("distilbert") == "True"  # whose configuration has names of its own
