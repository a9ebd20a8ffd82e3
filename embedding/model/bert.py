"""The encoder of BERT and its relatives of the same layout, straight from their weights.

BERT, RoBERTa, XLM-RoBERTa, CamemBERT, DistilBERT and MPNet, and so MiniLM, BGE, E5 and most models that embed texts. It computes what
the classes of transformers compute (tests/model/test_families.py) on packed rows, with one matrix product for query, key and value;
and a process that encodes with it need not load the half of transformers that trains and generates, which takes longer than torch itself.
"""

# Shape suffixes: T packed tokens, H heads, K head width, D width, F width of the feed-forward, S positions of a row.

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import embedding, layer_norm, relu

from embedding.model.attention import attend, has_kernel
from embedding.model.compiling import compiled, manner_compiled
from embedding.model.linear import Linear, filled, linear_for
from embedding.model.packing import PackedBatch, PackedRows
from embedding.model.relative import relative_bias
from embedding.model.spec import POSITIONS_FOLLOW_PADDING, ModelSpec, read_config

_ACTIVATIONS: Final[dict[str, Callable[[Linear, Tensor], Tensor]]] = {"gelu": lambda up, x: up.gelu(x), "relu": lambda up, x: relu(up(x))}
"""Of the feed-forward's first product."""
_DISTILBERT_EPS: Final = 1e-12
_MPNET_PADDING: Final = 1
"""Of its positions, whatever the configuration says."""


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
FAMILIES: Final = {
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
    "mpnet": replace(
        _BERT,
        query="attention.attn.q",
        key="attention.attn.k",
        value="attention.attn.v",
        attended="attention.attn.o",
        attended_norm="attention.LayerNorm",
    ),
}
"""Model type -> names."""


class BertEncoder:
    """Hidden states of packed rows; what `read_bert` gives.

    Attributes:
        manner: "packed", and why its layers are not compiled where they should be.
    """

    packed = True

    def __init__(self, module: _Bert, padding_offset: int | None) -> None:
        self.module = module
        self.manner = "packed"
        self._padding_offset = padding_offset

    def __call__(self, batch: PackedBatch) -> Tensor:
        """[T, D] in the type of the products, in the order of the batch's ids."""
        with torch.inference_mode():
            ids_T, positions_T = (filled(of_T, self.module.dtype) for of_T in (batch.ids_T, batch.position_ids(self._padding_offset)))
            hidden_TD: Tensor = self.module(ids_T, positions_T, batch.rows)
        return hidden_TD[: len(batch.ids_T)]

    def compile(self, config: Any, max_tokens: int, device: torch.device) -> None:
        """Run compiled layers where the compiler manages it; all of them and all batches share one piece of code."""
        self.manner = manner_compiled(self, config, max_tokens, device, self.module.product_dtype, self.module.run_compiled)


def read_bert(spec: ModelSpec, folder: Path, device: torch.device, dtype: torch.dtype, *, fp8: bool = False) -> BertEncoder | None:
    """The encoder, which computes in `dtype`, but its products in 8 bits where `fp8` asks for it.

    None where the model is not exactly of this layout, in its configuration or weights.
    """
    path = folder / spec.transformer_path
    config = read_config(path, trust_remote_code=spec.trust_remote_code)
    if not _is_of_the_layout(config):
        return None
    try:
        tensors = _tensors(spec, folder)
        module = _Bert(_Weights(tensors, device, dtype, fp8), FAMILIES[config.model_type], config, spec.max_tokens)
    except (StopIteration, KeyError, ValueError, SafetensorError):  # transformers says better what is wrong with them
        return None
    padding_offset = config.pad_token_id + 1 if config.model_type in POSITIONS_FOLLOW_PADDING else None
    if len(module.embeddings.positions) - (padding_offset or 0) < spec.max_tokens:
        return None
    encoder = BertEncoder(module, padding_offset)
    if module.by_kernel:
        encoder.compile(config, spec.max_tokens, device)
    return encoder


def _is_of_the_layout(config: Any) -> bool:
    """Whether nothing in the configuration asks for what is not done here."""
    odd = ("auto_map", "quantization_config", "is_decoder", "add_cross_attention", "pruned_heads", "sinusoidal_pos_embds")
    return (
        config.model_type in FAMILIES
        and _activation(config) in _ACTIVATIONS
        and getattr(config, "position_embedding_type", "absolute") in ("absolute", None)
        and config.hidden_size % config.num_attention_heads == 0
        and (config.model_type not in POSITIONS_FOLLOW_PADDING or isinstance(config.pad_token_id, int))
        and (config.model_type != "mpnet" or config.pad_token_id == _MPNET_PADDING)
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


@dataclass(frozen=True)
class _Weights:
    """A model's tensors by name, checked and put where they are needed."""

    tensors: Mapping[str, Tensor]
    device: torch.device
    dtype: torch.dtype
    """Of the products, and of what lies between them."""
    fp8: bool
    """Products in 8 bits instead."""

    def linear(self, *names: str, shape: tuple[int, ...]) -> Linear:
        """A matrix product."""
        weight, bias = self.affine(*names, shape=shape)
        return linear_for(weight.to(self.dtype), bias.to(self.dtype), fp8=self.fp8)

    def affine(self, *names: str, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """(weight, bias) of a matrix product or a normalization, float32; several `names` are joined at their first dimension.

        Raises:
            KeyError: one is not there.
            ValueError: they have other shapes.
        """
        weight, bias = (torch.cat([self.tensors[f"{name}.{part}"] for name in names]) for part in ("weight", "bias"))
        if weight.shape != shape or bias.shape != shape[:1]:
            raise ValueError(f"{names[0]} has the shape {tuple(weight.shape)}, not {shape}")
        return weight.to(self.device), bias.to(self.device)


class _Norm(nn.Module):
    """Layer normalization, its sums in float32 and its result in the type of what it reads."""

    def __init__(self, weight: Tensor, bias: Tensor, eps: float) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = nn.Buffer(weight), nn.Buffer(bias), eps

    def forward(self, hidden_TD: Tensor) -> Tensor:
        if hidden_TD.is_cpu:  # its kernel reads weights of another type
            return layer_norm(hidden_TD, self.weight.shape, self.weight, self.bias, self.eps)
        return layer_norm(hidden_TD.float(), self.weight.shape, self.weight, self.bias, self.eps).to(hidden_TD.dtype)


class _Layer(nn.Module):
    """Attention and feed-forward, each added to what it reads and normalized (Devlin et al. 2018, Vaswani et al. 2017).

    What lies between the products has their type, where autocast would keep float32: docs/architecture.md says why.
    """

    def __init__(
        self,
        weights: _Weights,
        names: _Names,
        number: int,
        config: Any,
        *,
        by_kernel: bool,
        bias_HSS: Tensor | None,
    ) -> None:
        super().__init__()
        at = {part: f"{names.layer}.{number}.{name}" for part, name in vars(names).items()}
        width, eps = config.hidden_size, _eps(config)
        inner = config.hidden_dim if config.model_type == "distilbert" else config.intermediate_size
        shapes = {"attended": (width, width), "up": (inner, width), "down": (width, inner)}
        self.query_key_value = weights.linear(at["query"], at["key"], at["value"], shape=(3 * width, width))
        self.attended, self.up, self.down = (weights.linear(at[part], shape=shapes[part]) for part in shapes)
        self.attended_norm, self.norm = (_Norm(*weights.affine(at[part], shape=(width,)), eps) for part in ("attended_norm", "norm"))
        self.heads = config.num_attention_heads
        self.by_kernel = by_kernel
        self.bias_HSS = bias_HSS
        self.activation = _ACTIVATIONS[_activation(config)]

    def forward(self, hidden_TD: Tensor, rows: PackedRows) -> Tensor:
        tokens, width = hidden_TD.shape
        query_THK, key_THK, value_THK = self.query_key_value(hidden_TD).view(tokens, 3, self.heads, -1).unbind(1)
        attended_THK = attend(query_THK, key_THK, value_THK, rows, by_kernel=self.by_kernel, bias_HSS=self.bias_HSS)
        hidden_TD = self.attended_norm(self.attended.added(attended_THK.view(tokens, width), hidden_TD))
        inner_TF = self.activation(self.up, hidden_TD)
        return self.norm(self.down.added(inner_TF, hidden_TD))  # type: ignore[no-any-return]


class _Embeddings(nn.Module):
    """Words and positions, added and normalized."""

    def __init__(self, weights: _Weights, config: Any) -> None:
        super().__init__()
        tensors, device, width = weights.tensors, weights.device, config.hidden_size
        self.words = nn.Buffer(tensors["embeddings.word_embeddings.weight"].to(device))
        positions = tensors["embeddings.position_embeddings.weight"]
        if config.model_type not in ("distilbert", "mpnet"):  # all tokens are of the first type
            positions = positions + tensors["embeddings.token_type_embeddings.weight"][0]
        self.positions = nn.Buffer(positions.to(device))
        if self.words.shape != (config.vocab_size, width) or self.positions.shape[1] != width:
            raise ValueError(f"the table of words has the shape {tuple(self.words.shape)}, not {(config.vocab_size, width)}")
        self.norm = _Norm(*weights.affine("embeddings.LayerNorm", shape=(width,)), _eps(config))
        self.dtype = weights.dtype

    def forward(self, ids_T: Tensor, positions_T: Tensor) -> Tensor:
        hidden_TD: Tensor = self.norm(embedding(ids_T, self.words) + embedding(positions_T, self.positions))
        return hidden_TD.to(self.dtype)


class _Bert(nn.Module):
    """Embeddings and layers."""

    def __init__(self, weights: _Weights, names: _Names, config: Any, max_tokens: int) -> None:
        super().__init__()
        self.embeddings = _Embeddings(weights, config)
        self.dtype = weights.dtype
        self.product_dtype = torch.float8_e4m3fn if weights.fp8 else weights.dtype
        bias_HSS = None
        if config.model_type == "mpnet":
            table_BH = weights.tensors["encoder.relative_attention_bias.weight"]
            bias_HSS = relative_bias(table_BH.to(weights.device, self.dtype), max_tokens)
        head_width = config.hidden_size // config.num_attention_heads
        self.by_kernel = bias_HSS is None and has_kernel(weights.device, self.dtype, head_width)
        self.layers = nn.ModuleList(
            _Layer(weights, names, number, config, by_kernel=self.by_kernel, bias_HSS=bias_HSS)
            for number in range(config.num_hidden_layers)
        )
        self.run_compiled(False)

    def run_compiled(self, on: bool) -> None:
        """Run what torch's compiler makes of the modules, or the modules as they are."""
        begin, *steps = (compiled(step, whole=True) if on else step for step in (self.embeddings, *self.layers))
        self._begin: Callable[[Tensor, Tensor], Tensor] = begin
        self._steps: list[Callable[[Tensor, PackedRows], Tensor]] = steps

    def forward(self, ids_T: Tensor, positions_T: Tensor, rows: PackedRows) -> Tensor:
        hidden_TD = self._begin(ids_T, positions_T)
        for step in self._steps:
            hidden_TD = step(hidden_TD, rows)
        return hidden_TD


def _eps(config: Any) -> float:
    return _DISTILBERT_EPS if config.model_type == "distilbert" else float(config.layer_norm_eps)
