"""The transformer: token ids -> hidden states."""

# Shape suffixes: T packed tokens, D width.

from __future__ import annotations

import logging
from pathlib import Path
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from embedding.errors import ModelError
from embedding.model.attention import keep_to_flash_attention
from embedding.model.bert import read_bert
from embedding.model.linear import fp8_lacks
from embedding.model.packing import PackedBatch
from embedding.model.spec import ModelSpec
from embedding.names import Precision

log = logging.getLogger(__name__)

DTYPES: Final[dict[Precision, torch.dtype]] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}
"""Of what lies between the products; those of fp8 are in 8 bits."""


class _Transformer(Protocol):
    packed: bool
    manner: str

    def __call__(self, batch: PackedBatch) -> Tensor: ...


class Encoder:
    """One loaded transformer in one precision on one device.

    Attributes:
        dtype: of the hidden states.
        packed: rows run without padding.
        manner: "packed" where all is as fast as it can be, else how batches run, and why.
        fitting_tokens: of a batch, what fits in the memory, once something did not.
    """

    def __init__(self, spec: ModelSpec, folder: Path, device: torch.device, precision: Precision) -> None:
        """Raises ModelError: the weights do not fill the model, or the device does not have the precision."""
        self.dtype = DTYPES[precision]
        fp8 = precision == "fp8"
        if fp8 and (lack := fp8_lacks(device)):
            raise ModelError(f"{lack}; use --precision bf16")
        keep_to_flash_attention(device)
        torch.set_float32_matmul_precision("highest")  # fp32 is fp32, whatever the environment allows: NVIDIA's containers allow TF32
        self.fitting_tokens: int | None = None
        self._model = _load(spec, folder, device, self.dtype, fp8=fp8)
        self.packed, self.manner = self._model.packed, self._model.manner
        if device.type == "cuda":
            torch.cuda.empty_cache()  # float32 weights, before they were cast: another worker may share this GPU
        if self.manner != "packed":
            log.warning("%s runs %s", spec.source.name, self.manner)

    def __call__(self, batch: PackedBatch) -> Tensor:
        """Hidden states [T, D] of the batch's tokens, in the order of its ids."""
        return self._model(batch)

    def budget(self, batch_tokens: int) -> int:
        """The tokens of a batch, where it is to have so many."""
        return batch_tokens if self.fitting_tokens is None else min(batch_tokens, self.fitting_tokens)

    def cells(self, batch_lengths: npt.NDArray[np.int64]) -> int:
        """Tokens that a batch costs, padding included."""
        return int(batch_lengths.sum()) if self.packed else len(batch_lengths) * int(batch_lengths[0])


def _load(spec: ModelSpec, folder: Path, device: torch.device, dtype: torch.dtype, *, fp8: bool) -> _Transformer:
    if (own := read_bert(spec, folder, device, dtype, fp8=fp8)) is not None:
        return own
    from embedding.model.generic import GenericEncoder  # takes seconds to import, which most models need not spend

    return GenericEncoder(spec, folder, device, dtype, fp8=fp8)
