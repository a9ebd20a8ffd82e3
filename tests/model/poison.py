"""A model that brings its own code and does to its process what bugs and full machines do, for texts that spell the poison."""

from __future__ import annotations

import json
from pathlib import Path

from tests.model.tiny import save_model

KILL, RAISE, NAN, MEMORY_ERROR, NOT_ENOUGH = "z z", "x x", "y y", "j j", "k k"
"""What a text has to spell; no word of the tests' corpora begins with these letters."""
FITTING_TOKENS = 32
"""Larger batches with MEMORY_ERROR or NOT_ENOUGH in them do not fit; one text does, also filled up to the step of oneDNN."""

_CODE = """
import os, signal
from transformers import BertModel


class PoisonedModel(BertModel):
    def forward(self, input_ids=None, **others):
        def spelled(letter):
            token = self.config.poison[letter]
            flat = input_ids.flatten()
            return bool(((flat[:-1] == token) & (flat[1:] == token)).any())

        if spelled("z"):
            os.kill(os.getpid(), signal.SIGKILL)
        if spelled("x"):
            raise RuntimeError("the encoder broke\\nin two lines")
        if spelled("j") and input_ids.numel() > FITTING:
            raise MemoryError
        if spelled("k") and input_ids.numel() > FITTING:
            raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes.")
        output = super().forward(input_ids=input_ids, **others)
        if spelled("y"):
            output.last_hidden_state[input_ids == self.config.poison["y"]] = float("nan")
        return output
"""


def save_poisoned_model(folder: Path) -> Path:
    """The tiny BERT in a class of its own, which `--trust-remote-code` lets run."""
    save_model(folder, "bert")
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    config = json.loads((folder / "config.json").read_text())
    config["poison"] = {letter: vocabulary[letter] for letter in "zxyjk"}
    config["auto_map"] = dict.fromkeys(("AutoModel", "AutoModelForTextEncoding"), "poisoned.PoisonedModel")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "poisoned.py").write_text(_CODE.replace("FITTING", str(FITTING_TOKENS)))
    return folder
