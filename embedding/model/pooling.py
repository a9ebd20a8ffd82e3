"""Token vectors -> one vector per row, in float32, with sentence-transformers' meanings."""

# Shape suffixes: T packed tokens, R rows, D width.

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import linear, normalize

from embedding.errors import ModelError
from embedding.model.folder import DenseSpec
from embedding.model.packing import PackedBatch
from embedding.model.spec import ModelSpec
from embedding.names import Pooling


class Head:
    """Pooling, Dense modules, truncation and normalization: everything after the transformer."""

    def __init__(self, spec: ModelSpec, folder: Path, device: torch.device, *, prompt_tokens: int) -> None:
        """`prompt_tokens`: leading tokens of each row that pooling leaves out, 0 where it reads the prompt too."""
        self._modes = spec.pooling
        self._prompt_tokens = prompt_tokens
        self._dense = [Dense(module, folder).to(device) for module in spec.dense]
        self._columns = spec.columns
        self._normalize = spec.normalize

    def __call__(self, hidden_TD: Tensor, batch: PackedBatch) -> Tensor:
        """float32 [R, dimensions] from hidden states of any float type; further vectors of a row lie behind its first."""
        vectors_RD = pool(hidden_TD.float(), batch, self._modes, self._prompt_tokens)
        for dense in self._dense:
            vectors_RD = dense(vectors_RD)
        found = [vectors_RD[:, :dimensions] for dimensions in self._columns]
        found = [normalize(each_RD, dim=1) for each_RD in found] if self._normalize else found
        return found[0] if len(found) == 1 else torch.cat(found, dim=1)


def pool(hidden_TD: Tensor, batch: PackedBatch, modes: Sequence[Pooling], prompt_tokens: int) -> Tensor:
    """Pool each row by each mode and join the results: [R, len(modes) * D].

    Segment reductions, one thread of work per row and column: no atomic additions, so the same batch gives the same bits.
    A row without any token left beside the prompt gets what sentence-transformers gives it: its first token for cls, -inf
    for max, zeros for the others.

    Formulas: sentence-transformers 6.2, `Pooling._forward_padded`.
    """
    lengths_R = (batch.lengths_R - prompt_tokens).clamp(min=0)
    positions_T = batch.positions_T
    starts_R, ends_R = batch.offsets[:-1].long(), batch.offsets[1:].long()
    has_text_R = (lengths_R > 0).unsqueeze(1)
    body_TD = hidden_TD
    if prompt_tokens:
        in_body = batch.body_indices(prompt_tokens)
        body_TD, positions_T = hidden_TD[in_body], positions_T[in_body]

    def reduce(how: str, values_TD: Tensor) -> Tensor:
        return torch.segment_reduce(values_TD, how, lengths=lengths_R, unsafe=True)

    def one(mode: Pooling) -> Tensor:
        match mode:
            case "mean":
                return reduce("sum", body_TD) / lengths_R.clamp(min=1).unsqueeze(1)
            case "mean_sqrt_len":
                return reduce("sum", body_TD) / lengths_R.clamp(min=1).sqrt().unsqueeze(1)
            case "weightedmean":  # a token weighs its place in the row, counted from 1
                weights_T1 = (positions_T + 1).float().unsqueeze(1)
                return reduce("sum", body_TD * weights_T1) / reduce("sum", weights_T1).clamp(min=1)
            case "max":
                return reduce("max", body_TD)
            case "cls":
                return hidden_TD[starts_R + prompt_tokens * (lengths_R > 0)]
            case "lasttoken":
                return hidden_TD[ends_R - 1] * has_text_R

    return torch.cat([one(mode) for mode in modes], dim=1)


class Dense(nn.Module):
    """sentence-transformers' Dense module: activation(x W^T + b), plus x (or x V^T) where it has a residual."""

    def __init__(self, spec: DenseSpec, folder: Path) -> None:
        super().__init__()
        weights = load_file(folder / spec.path / "model.safetensors")
        self.weight = nn.Buffer(weights["linear.weight"].float())
        self.bias = nn.Buffer(weights["linear.bias"].float()) if spec.bias else None
        projection = weights.get("residual.weight") if spec.residual else None
        self.projection = nn.Buffer(projection.float()) if projection is not None else None
        self.residual = spec.residual
        self.activation = _activation(spec.activation)

    def forward(self, x_RD: Tensor) -> Tensor:
        """float32 [R, in_features] -> float32 [R, out_features]."""
        result: Tensor = self.activation(linear(x_RD, self.weight, self.bias))
        if not self.residual:
            return result
        return result + (x_RD if self.projection is None else linear(x_RD, self.projection))


def _activation(path: str) -> nn.Module:
    """An instance of the torch.nn class with this import path.

    Raises:
        ModelError: there is no such class.
    """
    module, _, name = path.rpartition(".")
    found = getattr(import_module(module), name, None)
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ModelError(
            f"a Dense module of the model uses the activation {path!r}, which is not a class of torch.nn; choose another model"
        )
    return found()
