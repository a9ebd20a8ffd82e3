"""An encoder that runs out of memory."""

from __future__ import annotations

import weakref
from threading import get_ident

import pytest
from torch import Tensor

from embedding.model.encoder import Encoder
from embedding.model.packing import PackedBatch


def limit_memory(monkeypatch: pytest.MonkeyPatch, error: Exception, tokens: int) -> list[int]:
    """Let the encoder run out of memory above this many tokens; returns the sizes of all batches tried."""
    run, tried = Encoder.__call__, []
    held: dict[int, weakref.ref[Tensor]] = {}
    """By thread, of which several compute at once."""

    def limited(self: Encoder, batch: PackedBatch) -> Tensor:
        if before := held.get(get_ident()):
            assert before() is None, "what a failed batch held is in memory still"
        tried.append(len(batch.ids_T))
        if len(batch.ids_T) > tokens:
            intermediate = batch.ids_T.clone()
            held[get_ident()] = weakref.ref(intermediate)
            raise type(error)(*error.args)
        return run(self, batch)

    monkeypatch.setattr(Encoder, "__call__", limited)
    return tried
