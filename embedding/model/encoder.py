"""The transformer: token ids -> hidden states, packed where the architecture allows it, else padded."""

# Shape suffixes: T packed tokens, R rows, D width.
# ruff: noqa: N802, N815

from __future__ import annotations

import logging
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING
from transformers.utils.logging import disable_progress_bar

from embedding.config import Precision
from embedding.errors import ModelError
from embedding.model.attention import PACKED, PackedRows
from embedding.model.batching import offsets_of
from embedding.model.spec import ModelSpec

log = logging.getLogger(__name__)

DTYPES: Final[dict[Precision, torch.dtype]] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_PROBE_LENGTHS = (160, 17, 17, 3, 1)
"""Rows on which packed is compared with padded at load; the longest is above the sliding window of ModernBERT."""
_EXACT_TOLERANCE: Final = 1e-3
"""Largest relative difference of a token's hidden state in fp32: rounding stays a hundred times below."""
_HALF_TOLERANCE: Final = 0.3
"""The same for half precision, whose own rounding is some hundredths: only a kernel that does something else is above."""


@dataclass(frozen=True)
class PackedBatch:
    """Rows of one batch, longest first, one after another; made by `pack`."""

    ids_T: Tensor
    """int64 token ids on the device."""
    offsets: Tensor
    """int32 [R + 1] on the device: where each row begins, and the end of the last."""
    lengths: npt.NDArray[np.int64]
    """[R] on the host."""

    @cached_property
    def lengths_R(self) -> Tensor:
        """The same on the device."""
        return self.offsets.diff().long()

    @cached_property
    def rows_T(self) -> Tensor:
        """The row of each token."""
        rows = torch.arange(len(self.lengths), device=self.ids_T.device)
        return rows.repeat_interleave(self.lengths_R, output_size=len(self.ids_T))  # the size given: no synchronisation

    @cached_property
    def positions_T(self) -> Tensor:
        """Each token's place in its row, from 0."""
        return torch.arange(len(self.ids_T), device=self.ids_T.device) - self.offsets[:-1].long()[self.rows_T]

    def body_indices(self, skipped: int) -> Tensor:
        """The tokens whose place in their row is `skipped` or more."""
        places = np.arange(self.lengths.sum()) - np.repeat(offsets_of(self.lengths)[:-1], self.lengths)
        return torch.from_numpy(np.flatnonzero(places >= skipped)).to(self.ids_T.device, non_blocking=True)


def pack(ids_T: Tensor, lengths: npt.NDArray[np.int64], device: torch.device) -> PackedBatch:
    """Bring one batch to the device. `ids_T`: int32 on the host, pinned where the copy shall not wait."""
    offsets = torch.from_numpy(offsets_of(lengths).astype(np.int32))
    if device.type == "cuda":
        offsets = offsets.pin_memory()
    return PackedBatch(ids_T.to(device, non_blocking=True).long(), offsets.to(device, non_blocking=True), lengths)


class Encoder:
    """One loaded transformer in one precision on one device.

    Attributes:
        packed: rows run without padding.
        reason: why not, "" where they do.
    """

    def __init__(self, spec: ModelSpec, folder: Path, device: torch.device, precision: Precision) -> None:
        """Raises ModelError: the weights do not fill the model."""
        self.device = device
        self._dtype = torch.float32
        self._model = _load(spec, folder)
        self._model.to(device)  # type: ignore[arg-type]  # transformers wraps this method without its types
        self._padding_offset = _padding_offset(self._model, spec.max_tokens)
        self.packed = False
        self.reason = self._try_packing(spec, precision)
        if self.reason:
            log.warning("%s runs in padded batches: %s", spec.source.name, self.reason)

    def __call__(self, batch: PackedBatch) -> Tensor:
        """Hidden states [T, D] of the batch's tokens, in the order of its ids."""
        with torch.inference_mode(), self._autocast():
            return self._run_packed(batch) if self.packed else self._run_padded(batch)

    def cells(self, batch_lengths: npt.NDArray[np.int64]) -> int:
        """Tokens that a batch costs, padding included."""
        return int(batch_lengths.sum()) if self.packed else len(batch_lengths) * int(batch_lengths[0])

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, dtype=self._dtype, enabled=self._dtype != torch.float32)

    def _run_packed(self, batch: PackedBatch) -> Tensor:
        lengths, counts = np.unique(-batch.lengths, return_counts=True)
        groups = tuple(zip(counts.tolist(), (-lengths).tolist(), strict=True))
        output = self._model(
            input_ids=batch.ids_T.unsqueeze(0),
            position_ids=self._position_ids(batch).unsqueeze(0),
            packed_rows=PackedRows(batch.offsets, groups),
        )
        return output.last_hidden_state[0]  # type: ignore[no-any-return]

    def _run_padded(self, batch: PackedBatch) -> Tensor:
        rows, longest = len(batch.lengths), int(batch.lengths[0])
        cells_T = batch.rows_T * longest + batch.positions_T
        ids = batch.ids_T.new_full((rows * longest,), self._model.config.pad_token_id or 0)
        ids[cells_T] = batch.ids_T
        mask = torch.zeros_like(ids)
        mask[cells_T] = 1
        output = self._model(input_ids=ids.view(rows, longest), attention_mask=mask.view(rows, longest))
        return output.last_hidden_state.flatten(0, 1)[cells_T]  # type: ignore[no-any-return]

    def _position_ids(self, batch: PackedBatch) -> Tensor:
        """Places in the row; where they follow the padding index, a padding token that a text spells has no place of its own.

        Formula: RobertaEmbeddings.create_position_ids_from_input_ids of transformers 5.
        """
        if self._padding_offset is None:
            return batch.positions_T
        is_token_T = (batch.ids_T != self._padding_offset - 1).long()
        running_T = is_token_T.cumsum(0)
        starts_R = batch.offsets[:-1].long()
        before_R = running_T[starts_R] - is_token_T[starts_R]
        return (running_T - before_R[batch.rows_T]) * is_token_T + self._padding_offset - 1

    def _try_packing(self, spec: ModelSpec, precision: Precision) -> str:
        """Cast the weights, and switch to packed attention if that gives what padded batches give; else say why not.

        Compared in fp32 first, where a wrong mask or position cannot hide behind rounding, then in the job's precision.
        """
        if not self._model.is_backend_compatible():
            self._cast(precision)
            return f"the {spec.model_type} classes of transformers take no attention function"
        batch = self._probe_batch(spec.max_tokens)
        padded_TD = self(batch).float()
        padded_attention = self._model.config._attn_implementation
        self._model.set_attn_implementation(PACKED)
        self.packed = True
        try:
            reason = _difference(self(batch), padded_TD, _EXACT_TOLERANCE)
            self._cast(precision)
            reason = reason or _difference(self(batch), padded_TD, _HALF_TOLERANCE)
        except (TypeError, NotImplementedError, ValueError, KeyError) as error:
            self._cast(precision)
            reason = f"packed attention does not fit them ({type(error).__name__}: {error})"
        if reason:
            self.packed = False
            self._model.set_attn_implementation(padded_attention)
        return reason

    def _cast(self, precision: Precision) -> None:
        """Cast the matrices once; autocast would do it in every call. Everything else stays fp32, as autocast wants it."""
        self._dtype = DTYPES[precision]
        for module in self._model.modules():
            if isinstance(module, nn.Linear):
                module.to(self._dtype)

    def _probe_batch(self, max_tokens: int) -> PackedBatch:
        lengths = np.minimum(np.array(_PROBE_LENGTHS, dtype=np.int64), max_tokens)
        padding = self._model.config.pad_token_id
        vocabulary = np.array([token for token in range(min(self._model.config.vocab_size, 1000)) if token != padding], dtype=np.int32)
        ids = np.random.default_rng(0).choice(vocabulary, int(lengths.sum()))
        return pack(torch.from_numpy(ids), lengths, self.device)


def _difference(found_TD: Tensor, expected_TD: Tensor, tolerance: float) -> str:
    """A sentence if a token's hidden state is off by more than `tolerance` of how far tokens lie apart, else ""."""
    spread = (expected_TD - expected_TD.mean(0)).norm(dim=1).mean()
    difference = float(((found_TD.float() - expected_TD).norm(dim=1) / spread).max())
    return "" if difference <= tolerance else f"packed and padded hidden states differ by {difference:.2g} of their spread"


def _load(spec: ModelSpec, folder: Path) -> PreTrainedModel:
    """The model in evaluation mode, float32, its weights frozen; of an encoder-decoder only the encoder."""
    disable_progress_bar()  # one for each worker would fill the job's log
    path = folder / spec.transformer_path
    config = AutoConfig.from_pretrained(path, trust_remote_code=spec.trust_remote_code)
    if hasattr(config, "use_cache"):
        config.use_cache = False
    # Both give the same classes, but for encoder-decoders such as T5 the first gives the encoder.
    auto_class = AutoModelForTextEncoding if type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING else AutoModel
    try:
        model, info = auto_class.from_pretrained(
            path,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=spec.trust_remote_code,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"model {spec.source.name!r} cannot be loaded ({str(error).splitlines()[0]}); check its files") from error
    # transformers fills what is missing with random numbers; only the pooler, which nothing here reads, may be missing.
    if missing := sorted(name for name in info["missing_keys"] if "pooler" not in name):
        raise ModelError(f"model {spec.source.name!r} has no weights for {missing[0]} and {len(missing) - 1} more; give the whole encoder")
    return model.eval().requires_grad_(False)  # type: ignore[no-any-return]


def _padding_offset(model: nn.Module, max_tokens: int) -> int | None:
    """padding_idx + 1 where positions follow the padding index (RoBERTa's family), else None.

    Only those embeddings keep a padding_idx beside a table of positions.

    Raises:
        ModelError: the table of positions is shorter than max_tokens.
    """
    for module in model.modules():
        table = getattr(module, "position_embeddings", None)
        if not isinstance(table, nn.Embedding):
            continue
        padding = getattr(module, "padding_idx", None)
        offset = padding + 1 if isinstance(padding, int) else 0
        if table.num_embeddings - offset < max_tokens:
            positions = table.num_embeddings - offset
            raise ModelError(f"--max-tokens={max_tokens} is above the model's {positions} positions; lower it")
        return offset if isinstance(padding, int) else None
    return None
