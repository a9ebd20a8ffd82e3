"""Texts -> vectors. Knows no corpus and no Ray."""

from embedding.model.embedder import EmbeddedTexts, Embedder
from embedding.model.spec import ModelSpec, resolve_model
from embedding.model.tokenizer import TokenizedTexts

__all__ = ["EmbeddedTexts", "Embedder", "ModelSpec", "TokenizedTexts", "resolve_model"]
