"""Embedder: what a worker holds. Texts -> tokens -> vectors, with one model on one device."""

# Shape suffixes: R rows, D width.
# ruff: noqa: N815

from __future__ import annotations

import logging
import platform
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt
import tokenizers
import torch
import transformers
from torch import Tensor

from embedding.errors import ModelError, count
from embedding.model.batching import batch_end
from embedding.model.encoder import Encoder
from embedding.model.lanes import Lanes
from embedding.model.packing import pack
from embedding.model.pooling import Head
from embedding.model.source import ModelFiles
from embedding.model.spec import LongTexts, ModelSpec, check_files
from embedding.model.tokenizer import TokenizedTexts, Tokenizer
from embedding.model.windows import Windows

log = logging.getLogger(__name__)

# Signs of CPU allocators, the CUDA driver, Triton and cuBLAS, none of which has an error of its own for it.
_OUT_OF_MEMORY: Final = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")

Vectors: TypeAlias = npt.NDArray[np.float32]


@dataclass(frozen=True)
class EmbeddedTexts:
    """Vectors of R rows, in the order of the rows."""

    vectors_RD: Vectors
    """C-contiguous; where the model gives several vectors a row, all of them side by side."""
    finite_R: npt.NDArray[np.bool_]
    """False: the vector holds NaN or infinity, also when computed in fp32."""
    batch_tokens: int
    """The budget in use at the end: what was asked for, or less after running out of memory."""
    padding_tokens: int
    """Between rows of unequal length; what fills a batch up for oneDNN is not counted."""
    distinct_rows: int
    """Rows that were encoded; the others have the same tokens as one of these, and its vector."""


class Embedder:
    """One model, loaded once.

    Attributes:
        dim: numbers of a row: the length of its vector, or of all of them.
        packed: rows run without padding.
        lanes: batches that are computed at once.
    """

    def __init__(self, spec: ModelSpec, *, device: str | None = None, threads: int | None = None, folder: Path | None = None) -> None:
        """Load the model on `device` (default: the GPU if there is one).

        On a CPU, `threads` batches (default: one for each core) are computed at once, each by one thread, to which torch is set for the
        whole process: that way no operation waits for the slowest of its threads, and the bits do not depend on how many there are.

        `folder` is where its files lie here, which a model at a URL must be told.

        Raises:
            ModelError: the model cannot be loaded here, or its files are not those that the job was planned with.
            ModelUnreachableError: it cannot be downloaded.
        """
        self._spec = spec
        self._folder = folder or spec.source.folder(spec.weight_files)
        check_files(spec, ModelFiles(self._folder))
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if self._device.type == "cpu":
            torch.set_num_threads(1)
        self._lanes = Lanes(self._device, threads)
        self.lanes = self._lanes.count
        self._tokenizer = Tokenizer(spec, self._folder)
        self._head = Head(spec, self._folder, self._device, prompt_tokens=self._tokenizer.prompt_tokens)
        self._encoder = Encoder(spec, self._folder, self._device, spec.precision)
        self._repairing = threading.Lock()
        self.dim = sum(spec.columns)
        self.packed = self._encoder.packed

    @property
    def description(self) -> dict[str, str]:
        """Names and versions of what computes, for provenance."""
        return {
            "device": _device_name(self._device),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
            "tokenized_by": "nanotoken" if self._tokenizer.is_fast else "tokenizers",
            "batches": self._encoder.manner,
        }

    def has_lost_its_device(self) -> bool:
        """Whether no call of this process will succeed on its GPU any more, as is the case after some errors."""
        if self._device.type != "cuda":
            return False
        try:
            torch.cuda.synchronize(self._device)
        except RuntimeError:
            return True
        return False

    def tokenize(self, texts: Sequence[str]) -> TokenizedTexts:
        """Token ids of the texts. Safe to call from several threads, also while `embed` runs."""
        tokens = self._tokenizer(texts)
        tokens.prepare()
        return tokens

    def windows(self, long: LongTexts) -> Windows:
        """What cuts texts to the model's window, and tokenizes them; as safe to call.

        Raises:
            ModelError: the prompt leaves no room for a text that is to be cut.
        """
        return Windows(self._tokenizer, self._spec.max_tokens, long)

    def embed(self, tokens: TokenizedTexts, batch_tokens: int) -> EmbeddedTexts:
        """Vectors of all rows; rows of the same tokens are encoded once.

        Running out of memory halves the batch, now and for later calls. Rows with a number that is not finite are computed
        again in fp32.

        Raises:
            ModelError: a single row does not fit the memory.
        """
        return self.submit(tokens, batch_tokens)()

    def submit(self, tokens: TokenizedTexts, batch_tokens: int) -> Callable[[], EmbeddedTexts]:
        """Begin to embed; the answer waits for the vectors, as `embed` gives them.

        Safe to call from several threads: the batches of later calls follow those of earlier ones without a gap.
        """
        return partial(self._finish, tokens, batch_tokens, self._start(self._encoder, tokens.once, batch_tokens))

    def _finish(self, tokens: TokenizedTexts, batch_tokens: int, encoded: Callable[[], tuple[Vectors, int]]) -> EmbeddedTexts:
        vectors_RD, padding = encoded()
        once = tokens.once
        finite_R = _finite_rows(vectors_RD)
        if not finite_R.all() and self._spec.precision != "fp32":
            self._repair(once, vectors_RD, finite_R)
        if once is not tokens:
            _, places_R = tokens.distinct
            vectors_RD, finite_R = vectors_RD[places_R], finite_R[places_R]
        return EmbeddedTexts(vectors_RD, finite_R, self._encoder.budget(batch_tokens), padding, len(once.lengths))

    def _repair(self, tokens: TokenizedTexts, vectors_RD: Vectors, finite_R: npt.NDArray[np.bool_]) -> None:
        """Fill in the rows that are not finite from an fp32 copy of the model, which is loaded for them and dropped after."""
        rows = np.flatnonzero(~finite_R)
        log.warning("%s overflowed in %s; computing again in fp32", count(len(rows), "row"), self._spec.precision)
        with self._repairing:  # one copy at a time
            if (exact := self._exact_encoder()) is None:
                log.warning("there is no memory for a copy of the model in fp32; %s will be rejected", count(len(rows), "row"))
                return
            vectors_RD[rows], _ = self._start(exact, tokens.take(rows), self._spec.max_tokens)()
        finite_R[rows] = _finite_rows(vectors_RD[rows])

    def _exact_encoder(self) -> Encoder | None:
        """The model in fp32, unless it does not fit beside the one in use."""
        try:
            return Encoder(self._spec, self._folder, self._device, "fp32")
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
        return None

    def _start(self, encoder: Encoder, tokens: TokenizedTexts, batch_tokens: int) -> Callable[[], tuple[Vectors, int]]:
        """Begin to encode; the answer waits for (vectors [R, dim] in row order, padding tokens).

        A row without any token, as an empty text is to a tokenizer that adds none of its own, gets zeros.
        """
        order, sorted_ids, offsets = tokens.longest_first
        on_gpu = self._device.type == "cuda"
        lengths = np.diff(offsets)
        batches = _Batches(
            ids_T=torch.from_numpy(sorted_ids).pin_memory() if on_gpu else torch.from_numpy(sorted_ids),
            offsets=offsets,
            lengths=lengths[lengths > 0],
            padded=not encoder.packed,
            vectors_RD=torch.zeros((len(order), self.dim), dtype=torch.float32, pin_memory=on_gpu),
        )
        cells = self._lanes.start(
            partial(self._fill, encoder, batches, batch_tokens, *rows) for rows in batches.cut(encoder.budget(batch_tokens))
        )

        def finish() -> tuple[Vectors, int]:
            padding = cells() - len(tokens.ids)
            vectors_RD = np.empty((len(order), self.dim), dtype=np.float32)
            vectors_RD[order] = batches.vectors_RD.numpy()
            return vectors_RD, padding

        return finish

    def _fill(self, encoder: Encoder, batches: _Batches, batch_tokens: int, start: int, stop: int) -> int:
        """Encode a batch, in parts where it does not fit; never waits for a GPU. The number of tokens computed, padding included."""
        cells = 0
        while start < stop:
            end = batch_end(batches.lengths[:stop], start, encoder.budget(batch_tokens), padded=batches.padded)
            lengths = batches.lengths[start:end]
            if self._encoded(encoder, batches, start, end):
                cells, start = cells + encoder.cells(lengths), end
            else:  # outside of what failed, whose frames hold its memory
                self._shrink(encoder, encoder.cells(lengths), end - start)
        return cells

    def _encoded(self, encoder: Encoder, batches: _Batches, start: int, end: int) -> bool:
        """Encode these rows, unless memory runs out."""
        try:
            batch = pack(batches.ids_T[batches.offsets[start] : batches.offsets[end]], batches.lengths[start:end], self._device)
            with torch.inference_mode():
                batches.vectors_RD[start:end].copy_(self._head(encoder(batch), batch), non_blocking=True)
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            return False
        return True

    def _shrink(self, encoder: Encoder, cells: int, rows: int) -> None:
        if rows == 1:
            device = _device_name(self._device)
            raise ModelError(f"a single text of {cells} tokens does not fit in the memory of {device}; lower --max-tokens")
        encoder.fitting_tokens = encoder.budget(cells // 2)
        log.warning("a batch of %d tokens does not fit in memory; using batches of %d tokens from now on", cells, encoder.fitting_tokens)


@dataclass(frozen=True)
class _Batches:
    """Rows sorted by falling length, and where their vectors go."""

    ids_T: Tensor
    """int32, on the host; pinned for a GPU."""
    offsets: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]
    """Of the rows that have tokens."""
    padded: bool
    vectors_RD: Tensor
    """float32 on the host; pinned for a GPU."""

    def cut(self, batch_tokens: int) -> Iterator[tuple[int, int]]:
        """First row and end of each batch."""
        start = 0
        while start < len(self.lengths):
            end = batch_end(self.lengths, start, batch_tokens, padded=self.padded)
            yield start, end
            start = end


def _finite_rows(vectors_RD: Vectors) -> npt.NDArray[np.bool_]:
    return np.asarray(np.isfinite(vectors_RD).all(axis=1))


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(sign in str(error) for sign in _OUT_OF_MEMORY)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.processor() or platform.machine()} CPU"
