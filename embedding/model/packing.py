"""Rows of one batch laid one after another, without padding, on the device."""

# Shape suffixes: T packed tokens, R rows.
# ruff: noqa: N802, N815

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from embedding.model.batching import offsets_of


@dataclass(frozen=True)
class PackedRows:
    """Where the rows of a packed batch lie, as the attention kernels want to know it."""

    offsets: Tensor
    """int32 [R + 1], on the device of the tokens."""
    longest: int
    """Tokens of the longest row."""
    lengths: npt.NDArray[np.int64]
    """[R] on the host, falling."""

    @cached_property
    def groups(self) -> tuple[tuple[int, int], ...]:
        """(number of rows, their length) for each length, in the order of the rows."""
        lengths, counts = np.unique(-self.lengths, return_counts=True)
        return tuple(zip(counts.tolist(), (-lengths).tolist(), strict=True))


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
    def rows(self) -> PackedRows:
        """As attention wants to know them."""
        return PackedRows(self.offsets, int(self.lengths[0]), self.lengths)

    @cached_property
    def rows_T(self) -> Tensor:
        """The row of each token."""
        rows = torch.arange(len(self.lengths), device=self.ids_T.device)
        return rows.repeat_interleave(self.lengths_R, output_size=len(self.ids_T))  # the size given: no synchronisation

    @cached_property
    def positions_T(self) -> Tensor:
        """Each token's place in its row, from 0."""
        return torch.arange(len(self.ids_T), device=self.ids_T.device) - self.offsets[:-1].long()[self.rows_T]

    def position_ids(self, padding_offset: int | None) -> Tensor:
        """Places in the row; where they follow the padding index, a padding token that a text spells has no place of its own.

        `padding_offset`: padding_idx + 1 in RoBERTa's family, else None.
        Formula: RobertaEmbeddings.create_position_ids_from_input_ids of transformers 5.
        """
        if padding_offset is None:
            return self.positions_T
        is_token_T = (self.ids_T != padding_offset - 1).long()
        running_T = is_token_T.cumsum(0)
        starts_R = self.offsets[:-1].long()
        before_R = running_T[starts_R] - is_token_T[starts_R]
        return (running_T - before_R[self.rows_T]) * is_token_T + padding_offset - 1

    def body_indices(self, skipped: int) -> Tensor:
        """The tokens whose place in their row is `skipped` or more."""
        places = np.arange(self.lengths.sum()) - np.repeat(offsets_of(self.lengths)[:-1], self.lengths)
        indices = torch.from_numpy(np.flatnonzero(places >= skipped))
        return _on(self.ids_T.device, indices)


def pack(ids_T: Tensor, lengths: npt.NDArray[np.int64], device: torch.device) -> PackedBatch:
    """Bring one batch to the device. `ids_T`: int32 on the host, pinned where the copy shall not wait."""
    offsets = torch.from_numpy(offsets_of(lengths).astype(np.int32))
    return PackedBatch(ids_T.to(device, non_blocking=True).long(), _on(device, offsets), lengths)


def _on(device: torch.device, tensor: Tensor) -> Tensor:
    """A copy on the device that nobody waits for: of memory that is not pinned, it would wait for all that was launched before it."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)
