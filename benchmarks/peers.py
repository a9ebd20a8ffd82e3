"""Texts -> vectors by others, on the same texts in the same rounds."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import tokenizers
import torch
from torch.nn.functional import normalize
from transformers import AutoConfig

from benchmarks.data import BenchModel
from benchmarks.setting import Result, Setting, one_line
from benchmarks.timing import interleave, rate, ratio
from embedding.model.embedder import Embedder
from embedding.model.encoder import DTYPES
from embedding.model.generic import auto_class_of
from embedding.model.parity import cosines
from embedding.names import Precision

Vectors: TypeAlias = npt.NDArray[np.float32]
Embed: TypeAlias = Callable[[list[str], int], Vectors]
"""(texts, rows in a batch) -> vectors [rows, width], length 1."""

_BATCH_ROWS = {"cpu": (8, 32, 128), "cuda": (128, 512, 2048)}
_LEAST_COSINE = 0.99
"""A peer below it, such as one whose export lost a mask, has done other work. Half precision stays above."""
OURS = "this project"


def peers_stage(setting: Setting, scratch: Path) -> Result:
    """The project and each peer with the batch size that suits it best on these texts."""
    embedder = Embedder(setting.model.spec(setting.precision), device=setting.device, threads=setting.threads)

    def ours() -> Vectors:
        if setting.device == "cpu":
            torch.set_num_threads(1)  # what Embedder sets, and the peers do not want
        torch.backends.cuda.enable_cudnn_sdp(False)  # likewise
        return embedder.embed(embedder.tokenize(setting.texts), setting.batch_tokens).vectors_RD

    expected = ours()
    missing: dict[str, str] = {}
    batch_rows: dict[str, int] = {}
    kept: dict[str, float] = {}
    contestants: dict[str, Callable[[], Vectors]] = {OURS: ours}
    for name, make in _peers(setting, scratch).items():
        try:
            embed = _as_found(setting.threads, make())
            batch_rows[name] = _best_batch(embed, setting)
            peer = _bind(embed, setting.texts, batch_rows[name])
            kept[name] = float(cosines(peer(), expected).min())
        except Exception as error:  # noqa: BLE001 - a peer that is not there or cannot run is a line of the table
            missing[name] = one_line(error)
            continue
        if unlike := unlikeness(kept[name]):
            missing[name] = unlike
        else:
            contestants[name] = peer
    times = interleave(contestants, setting.rounds, warm=False)
    tokens = len(embedder.tokenize(setting.texts).ids)
    return {
        "precision": setting.precision,
        "batches": embedder.description["batches"],
        "seconds": times,
        "tokens_per_second": {name: rate(tokens, value) for name, value in times.items()},
        "rows_per_second": {name: rate(len(setting.texts), value) for name, value in times.items()},
        "ratio": {name: ratio(times[OURS], value) for name, value in times.items() if name != OURS},
        "batch_rows": batch_rows,
        "worst_cosine_to_this_project": kept,
        "not_measured": missing,
    }


def unlikeness(least_cosine: float) -> str:
    """A sentence if vectors with this cosine to ours at worst are others, or no numbers, else ""."""
    return "" if least_cosine >= _LEAST_COSINE else f"its vectors are others, with a cosine of {least_cosine:.3f} at worst"


def _bind(embed: Embed, texts: list[str], rows: int) -> Callable[[], Vectors]:
    return lambda: embed(texts, rows)


def _best_batch(embed: Embed, setting: Setting) -> int:
    """Tried on every third text, after one batch that warms up; the faster of two tries counts."""
    sample = setting.texts[::3]
    embed(sample[:8], 8)
    best: dict[int, float] = {}
    for rows in (*_BATCH_ROWS[setting.device], *_BATCH_ROWS[setting.device]):
        started = time.perf_counter()
        embed(sample, rows)
        best[rows] = min(time.perf_counter() - started, best.get(rows, np.inf))
    return min(best, key=lambda rows: best[rows])


def _peers(setting: Setting, scratch: Path) -> dict[str, Callable[[], Embed]]:
    found: dict[str, Callable[[], Embed]] = {
        "sentence-transformers": lambda: _sentence_transformers(setting.model, setting.device, setting.precision),
        "transformers, padded": lambda: _padded(setting.model, setting.device, setting.precision),
    }
    if setting.device == "cpu" and setting.precision == "fp32":
        found["ONNX Runtime fp32"] = lambda: _onnx(setting.model, scratch / "model.onnx", setting.threads)
    return found


def _as_found(threads: int, embed: Embed) -> Embed:
    """With torch's settings as they are without the project."""

    def embed_so(texts: list[str], rows: int) -> Vectors:
        torch.set_num_threads(threads)
        torch.backends.cuda.enable_cudnn_sdp(True)
        return embed(texts, rows)

    return embed_so


def _sentence_transformers(model: BenchModel, device: str, precision: Precision) -> Embed:
    """Sorts by length itself; on a GPU its weights are cast, as its documentation advises for speed."""
    from sentence_transformers import SentenceTransformer

    peer = SentenceTransformer(str(model.folder), device=device, model_kwargs={"dtype": DTYPES[precision]})
    peer.max_seq_length = model.max_tokens

    def embed(texts: list[str], rows: int) -> Vectors:
        found = peer.encode(texts, batch_size=rows, show_progress_bar=False, normalize_embeddings=True)
        return np.asarray(found, dtype=np.float32)

    return embed


def _padded(model: BenchModel, device: str, precision: Precision) -> Embed:
    peer = _transformer(model, DTYPES[precision]).to(device)

    def run(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            hidden: torch.Tensor = peer(input_ids=ids.to(device), attention_mask=mask.to(device)).last_hidden_state
            return hidden

    return _sorted_batches(model, run)


def _transformer(model: BenchModel, dtype: torch.dtype) -> torch.nn.Module:
    """With the attention of torch, where the classes know it."""
    auto_class = auto_class_of(AutoConfig.from_pretrained(model.folder))
    loaded: torch.nn.Module = auto_class.from_pretrained(model.folder, dtype=dtype)
    return loaded.eval()


def _sorted_batches(model: BenchModel, run: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Embed:
    """Tokenize, sort, pad each batch to its longest row, run, mean."""
    tokenizer = tokenizers.Tokenizer.from_file(str(model.folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(model.max_tokens)

    def embed(texts: list[str], rows: int) -> Vectors:
        ids = [encoding.ids for encoding in tokenizer.encode_batch_fast(texts)]
        order = sorted(range(len(ids)), key=lambda row: -len(ids[row]))
        vectors = np.empty((len(ids), model.width), np.float32)
        for start in range(0, len(order), rows):
            batch = order[start : start + rows]
            padded = np.zeros((len(batch), len(ids[batch[0]])), np.int64)
            mask = np.zeros_like(padded)
            for place, row in enumerate(batch):
                padded[place, : len(ids[row])] = ids[row]
                mask[place, : len(ids[row])] = 1
            hidden = run(torch.from_numpy(padded), torch.from_numpy(mask)).float()
            weights = torch.from_numpy(mask).to(hidden.device).unsqueeze(2).float()
            vectors[batch] = normalize((hidden * weights).sum(1) / weights.sum(1), dim=1).cpu().numpy()
        return vectors

    return embed


class _Exported(torch.nn.Module):
    """ids and mask -> hidden states; the mask is widened here, as the exporter loses what transformers does with a flat one."""

    def __init__(self, model: BenchModel) -> None:
        super().__init__()
        self.model = _transformer(model, torch.float32)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        scores = ((1.0 - mask[:, None, None, :].float()) * -1e30).expand(-1, -1, mask.shape[1], -1)
        hidden: torch.Tensor = self.model(input_ids=ids, attention_mask=scores).last_hidden_state
        return hidden


def _onnx(model: BenchModel, path: Path, threads: int) -> Embed:
    """Exported by torch, its attention, GELU and layer norms fused by ONNX Runtime's own optimizer where that knows them."""
    onnxruntime = import_module("onnxruntime")  # no dependency of ours, and without types

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    ids, mask = torch.randint(1000, 20_000, (3, 17)), torch.ones((3, 17), dtype=torch.int64)
    shape: Any = {0: torch.export.Dim("rows", min=1, max=65_536), 1: torch.export.Dim("length", min=2, max=512)}
    torch.onnx.export(
        _Exported(model),
        (ids, mask),
        str(path),
        input_names=["ids", "mask"],
        dynamo=True,
        dynamic_shapes=(shape, shape),
        verbose=False,
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(session.run(None, {"ids": ids.numpy(), "mask": mask.numpy()})[0])

    return _sorted_batches(model, run)
