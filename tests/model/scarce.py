"""An encoder that runs out of memory."""

from __future__ import annotations

import pytest
from torch import Tensor

from embedding.model.encoder import Encoder
from embedding.model.packing import PackedBatch


def limit_memory(monkeypatch: pytest.MonkeyPatch, error: Exception, tokens: int) -> list[int]:
    """Let the encoder run out of memory above this many tokens; returns the sizes of all batches tried."""
    run, tried = Encoder.__call__, []

    def limited(self: Encoder, batch: PackedBatch) -> Tensor:
        tried.append(len(batch.ids_T))
        if len(batch.ids_T) > tokens:
            raise error
        return run(self, batch)

    monkeypatch.setattr(Encoder, "__call__", limited)
    return tried
