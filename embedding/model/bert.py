"""The encoder of BERT and its relatives of the same layout, straight from their weights.

BERT, RoBERTa, XLM-RoBERTa, CamemBERT and DistilBERT, and so MiniLM, BGE, E5 and most models that embed texts. It computes what
the classes of transformers compute (tests/model/test_families.py) on packed rows, with one matrix product for query, key and value;
and a process that encodes with it need not load the half of transformers that trains and generates, which takes longer than torch itself.
"""

# Shape suffixes: T packed tokens, H heads, K head width, D width, F width of the feed-forward.

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import embedding, gelu, layer_norm, linear, relu
from transformers import AutoConfig

from embedding.model.attention import attend
from embedding.model.packing import PackedBatch, PackedRows
from embedding.model.spec import POSITIONS_FOLLOW_PADDING, ModelSpec

_ACTIVATIONS: Final[dict[str, Callable[[Tensor], Tensor]]] = {"gelu": gelu, "relu": relu}
_DISTILBERT_EPS: Final = 1e-12


@dataclass(frozen=True)
class _Names:
    """What a family calls the parts of a layer."""

    layer: str
    query: str
    key: str
    value: str
    attended: str
    attended_norm: str
    up: str
    down: str
    norm: str


_BERT: Final = _Names(
    layer="encoder.layer",
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    attended="attention.output.dense",
    attended_norm="attention.output.LayerNorm",
    up="intermediate.dense",
    down="output.dense",
    norm="output.LayerNorm",
)
_FAMILIES: Final = {
    **dict.fromkeys(["bert", "roberta", "xlm-roberta", "camembert"], _BERT),
    "distilbert": _Names(
        layer="transformer.layer",
        query="attention.q_lin",
        key="attention.k_lin",
        value="attention.v_lin",
        attended="attention.out_lin",
        attended_norm="sa_layer_norm",
        up="ffn.lin1",
        down="ffn.lin2",
        norm="output_layer_norm",
    ),
}


class BertEncoder:
    """Hidden states of packed rows; what `read_bert` gives."""

    packed = True
    reason = ""

    def __init__(self, module: _Bert, padding_offset: int | None) -> None:
        self.module = module
        self._padding_offset = padding_offset

    def __call__(self, batch: PackedBatch) -> Tensor:
        """float32 [T, D], in the order of the batch's ids."""
        hidden_TD: Tensor = self.module(batch.ids_T, batch.position_ids(self._padding_offset), batch.rows)
        return hidden_TD


def read_bert(spec: ModelSpec, folder: Path, device: torch.device, dtype: torch.dtype) -> BertEncoder | None:
    """The encoder with its matrices in `dtype`; None where the model is not exactly of this layout, in its configuration or weights."""
    path = folder / spec.transformer_path
    config = AutoConfig.from_pretrained(path, trust_remote_code=spec.trust_remote_code)
    if not _is_of_the_layout(config):
        return None
    try:
        tensors = _tensors(spec, folder)
        module = _Bert(tensors, _FAMILIES[config.model_type], config, dtype)
    except (StopIteration, KeyError, ValueError, SafetensorError):  # transformers says better what is wrong with them
        return None
    padding_offset = config.pad_token_id + 1 if config.model_type in POSITIONS_FOLLOW_PADDING else None
    if len(module.positions) - (padding_offset or 0) < spec.max_tokens:
        return None
    return BertEncoder(module.to(device), padding_offset)


def _is_of_the_layout(config: Any) -> bool:
    """Whether nothing in the configuration asks for what is not done here."""
    odd = ("auto_map", "quantization_config", "is_decoder", "add_cross_attention", "pruned_heads", "sinusoidal_pos_embds")
    return (
        config.model_type in _FAMILIES
        and _activation(config) in _ACTIVATIONS
        and getattr(config, "position_embedding_type", "absolute") in ("absolute", None)
        and config.hidden_size % config.num_attention_heads == 0
        and (config.model_type not in POSITIONS_FOLLOW_PADDING or isinstance(config.pad_token_id, int))
        and not any(getattr(config, name, None) for name in odd)
    )


def _activation(config: Any) -> str:
    return str(config.activation if config.model_type == "distilbert" else config.hidden_act)


def _tensors(spec: ModelSpec, folder: Path) -> dict[str, Tensor]:
    """The transformer's weights in float32, by today's names, without the prefix that they have in a model with a head.

    Raises:
        StopIteration: there is no table of words.
    """
    weights: dict[str, Tensor] = {}
    for name in spec.transformer_weight_files:
        weights |= load_file(folder / name)
    words = "embeddings.word_embeddings.weight"
    prefix = next(name for name in weights if name.endswith(words)).removesuffix(words)
    found = {name.removeprefix(prefix): tensor.float() for name, tensor in weights.items() if name.startswith(prefix)}
    return {name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias"): found[name] for name in found}


class _Affine(nn.Module):
    """Weight and bias, of a matrix product or of a normalization."""

    def __init__(self, tensors: Mapping[str, Tensor], *names: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> None:
        """Several `names` are joined at their first dimension.

        Raises:
            KeyError: one is not there.
            ValueError: they have other shapes.
        """
        super().__init__()
        self.weight = nn.Buffer(torch.cat([tensors[f"{name}.weight"] for name in names]).to(dtype))
        self.bias = nn.Buffer(torch.cat([tensors[f"{name}.bias"] for name in names]).to(dtype))
        if self.weight.shape != shape or self.bias.shape != shape[:1]:
            raise ValueError(f"{names[0]} has the shape {tuple(self.weight.shape)}, not {shape}")


class _Layer(nn.Module):
    """Attention and feed-forward, each added to what it reads and normalized (Devlin et al. 2018, Vaswani et al. 2017)."""

    def __init__(self, tensors: Mapping[str, Tensor], names: _Names, number: int, config: Any, dtype: torch.dtype) -> None:
        super().__init__()
        at = {part: f"{names.layer}.{number}.{name}" for part, name in vars(names).items()}
        width = config.hidden_size
        inner = config.hidden_dim if config.model_type == "distilbert" else config.intermediate_size
        self.query_key_value = _Affine(tensors, at["query"], at["key"], at["value"], shape=(3 * width, width), dtype=dtype)
        self.attended = _Affine(tensors, at["attended"], shape=(width, width), dtype=dtype)
        self.attended_norm = _Affine(tensors, at["attended_norm"], shape=(width,))
        self.up = _Affine(tensors, at["up"], shape=(inner, width), dtype=dtype)
        self.down = _Affine(tensors, at["down"], shape=(width, inner), dtype=dtype)
        self.norm = _Affine(tensors, at["norm"], shape=(width,))
        self.heads = config.num_attention_heads
        self.activation: Callable[[Tensor], Tensor] = _ACTIVATIONS[_activation(config)]
        self.eps = _eps(config)

    def forward(self, hidden_TD: Tensor, rows: PackedRows) -> Tensor:
        tokens, width = hidden_TD.shape
        dtype = self.up.weight.dtype
        mixed = linear(hidden_TD.to(dtype), self.query_key_value.weight, self.query_key_value.bias)
        query_THK, key_THK, value_THK = mixed.view(tokens, 3, self.heads, -1).unbind(1)
        attended = attend(query_THK, key_THK, value_THK, rows).view(tokens, width)
        hidden_TD = self._added(hidden_TD, attended, self.attended, self.attended_norm)
        inner_TF = self.activation(linear(hidden_TD.to(dtype), self.up.weight, self.up.bias))
        return self._added(hidden_TD, inner_TF, self.down, self.norm)

    def _added(self, hidden_TD: Tensor, found: Tensor, project: _Affine, norm: _Affine) -> Tensor:
        """In float32, as autocast does it."""
        added_TD = hidden_TD + linear(found, project.weight, project.bias)
        return layer_norm(added_TD, added_TD.shape[-1:], norm.weight, norm.bias, self.eps)


class _Bert(nn.Module):
    """Embeddings and layers."""

    def __init__(self, tensors: Mapping[str, Tensor], names: _Names, config: Any, dtype: torch.dtype) -> None:
        super().__init__()
        width = config.hidden_size
        self.words = nn.Buffer(tensors["embeddings.word_embeddings.weight"])
        positions = tensors["embeddings.position_embeddings.weight"]
        if config.model_type != "distilbert":  # all tokens are of the first type
            positions = positions + tensors["embeddings.token_type_embeddings.weight"][0]
        self.positions = nn.Buffer(positions)
        if self.words.shape != (config.vocab_size, width) or self.positions.shape[1] != width:
            raise ValueError(f"the table of words has the shape {tuple(self.words.shape)}, not {(config.vocab_size, width)}")
        self.norm = _Affine(tensors, "embeddings.LayerNorm", shape=(width,))
        self.layers = nn.ModuleList(_Layer(tensors, names, number, config, dtype) for number in range(config.num_hidden_layers))
        self.eps = _eps(config)

    def forward(self, ids_T: Tensor, positions_T: Tensor, rows: PackedRows) -> Tensor:
        hidden_TD = embedding(ids_T, self.words) + embedding(positions_T, self.positions)
        hidden_TD = layer_norm(hidden_TD, hidden_TD.shape[-1:], self.norm.weight, self.norm.bias, self.eps)
        for layer in self.layers:
            hidden_TD = layer(hidden_TD, rows)
        return hidden_TD


def _eps(config: Any) -> float:
    return _DISTILBERT_EPS if config.model_type == "distilbert" else float(config.layer_norm_eps)
