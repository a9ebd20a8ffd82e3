"""The path of a GPU, run on a CPU: a kernel for all rows at once, and layers that torch's compiler has joined.

Only the kernel is another: it stands in for flash attention under the name of torch's own operator, and wants what that one wants.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, varlen
from torch.nn.functional import scaled_dot_product_attention

from embedding.model import attention, bert, compiling, generic, linear
from embedding.model.embedder import Embedder
from embedding.names import Precision
from tests.model.test_families import worst_cosine
from tests.model.tiny import TEXTS, save_model, spec_of

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch's compiler, of torch's own modules

HALF = torch.bfloat16
VARLEN = "torch_attn::_varlen_attn"
assert hasattr(varlen, "varlen_attn")  # its import defines the operator


def kernel_on_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    _: Tensor,
    longest: int,
    longest_key: int,
    causal: bool,
    scale: float | None,
    window: list[int],
    *more: Any,
) -> tuple[Tensor, ...]:
    """Row by row what flash attention does at once; `longest` bounds its launch, so that it has to be right."""
    assert more[3:4] in [(), (1,)]  # num_splits, where this torch has it
    assert more[4:5] in [(), (SDPBackend.FLASH_ATTENTION.value,)]
    places = starts.tolist()
    assert starts.dtype == torch.int32
    assert longest == longest_key == max(np.diff(places))
    found = torch.empty(query.shape, dtype=query.dtype)
    for start, stop in pairwise(places):
        one, two, three = (tensor[start:stop].transpose(0, 1).unsqueeze(0) for tensor in (query, key, value))
        before = torch.arange(stop - start)[:, None] - torch.arange(stop - start)  # how far a key lies before a query
        left, right = (reach if reach >= 0 else stop - start for reach in window)
        seen = (before <= left) & (before >= (0 if causal else -right))
        attended = scaled_dot_product_attention(one, two, three, attn_mask=seen, scale=scale, enable_gqa=any(more[:1]))
        found[start:stop] = attended[0].transpose(0, 1)
    return found, query.new_empty(0), torch.zeros(2, dtype=torch.uint64)


@contextmanager
def cudnn_as_before() -> Iterator[None]:
    enabled = torch.backends.cuda.cudnn_sdp_enabled()
    yield
    torch.backends.cuda.enable_cudnn_sdp(enabled)


@pytest.fixture(autouse=True)
def like_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let CPUs take the path of GPUs in half precision."""
    with torch.library._scoped_library("torch_attn", "FRAGMENT") as library, cudnn_as_before():
        attention.keep_to_flash_attention(torch.device("cuda"))
        torch.library.register_kernel(VARLEN, "cpu", kernel_on_cpu, lib=library)
        for module in (bert, generic):
            monkeypatch.setattr(module, "has_kernel", lambda _, dtype, _width: dtype == HALF)
        monkeypatch.setattr(linear, "onednn_fits_on", lambda *_: False)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        yield
    torch._dynamo.reset()


def pieces_of_code() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def like_on_a_gpu(folder: Path, precision: Precision = "bf16") -> Embedder:
    """In half precision, a batch after the other."""
    return Embedder(replace(spec_of(folder), precision=precision), threads=1)


FP8 = pytest.mark.skipif(bool(linear.fp8_lacks(torch.device("cpu"))), reason="this torch has no fp8 on CPUs")
COMPILERS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.skipif(not shutil.which("g++"), reason="there is no C++ compiler"))]


# fp8, with three bits behind the point, gave 0.991 on an AMD EPYC; other processors round otherwise, which 0.98 left little room for.
@pytest.mark.parametrize(("precision", "least"), [("bf16", 0.999), pytest.param("fp8", 0.95, marks=FP8)])
@pytest.mark.parametrize("compiler", COMPILERS)
def test_one_piece_of_code_runs_all_layers_and_batches(
    compiler: str, precision: Precision, least: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_model(tmp_path, "roberta")
    exact = Embedder(spec_of(folder))
    tokens = exact.tokenize(TEXTS)
    monkeypatch.setattr(compiling, "_COMPILER", compiler)
    embedder = like_on_a_gpu(folder, precision)
    assert embedder.description["batches"] == "packed"
    for budget in (40, 300, 4000):
        assert worst_cosine(embedder.embed(tokens, budget).vectors_RD, exact.embed(tokens, 4000).vectors_RD) > least
    assert pieces_of_code() == 2  # of the embeddings and of a layer


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize(("family", "kinds"), [("electra", 1), ("modernbert", 3), ("qwen3", 1), ("gemma3_text", 2)])
def test_other_architectures_are_compiled_too(
    family: str, kinds: int, compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each kind of layer, at load; with a sliding window, causal, and with several heads of queries for one of keys."""
    folder = save_model(tmp_path, family)
    exact = Embedder(spec_of(folder))
    tokens = exact.tokenize(TEXTS)
    monkeypatch.setattr(compiling, "_COMPILER", compiler)
    embedder = like_on_a_gpu(folder)
    assert embedder.description["batches"] == "packed"
    assert pieces_of_code() == kinds
    for budget in (40, 300, 4000):
        assert worst_cosine(embedder.embed(tokens, budget).vectors_RD, exact.embed(tokens, 4000).vectors_RD) > 0.998
    assert pieces_of_code() == kinds


def broken(*_: object, **__: object) -> Any:
    raise RuntimeError("no C compiler was found")


def wrong(graph: torch.fx.GraphModule, *_: object, **__: object) -> Any:
    return lambda *arguments: tuple(tensor.flip(-2) for tensor in graph.forward(*arguments))


@pytest.mark.parametrize("family", ["bert", "modernbert"])
@pytest.mark.parametrize(("compiler", "reason"), [(broken, "no C compiler was found"), (wrong, "hidden states differ by")])
def test_what_a_compiler_cannot_do_is_done_without_it(
    compiler: Any, reason: str, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save_model(tmp_path, family)
    exact = Embedder(spec_of(folder))
    tokens = exact.tokenize(TEXTS)
    monkeypatch.setattr(compiling, "_COMPILER", compiler)
    embedder = like_on_a_gpu(folder)
    assert embedder.description["batches"].startswith("packed, but without torch.compile: ")
    assert reason in embedder.description["batches"]
    assert caplog.text.count("runs packed, but without torch.compile: ") == 1
    assert worst_cosine(embedder.embed(tokens, 300).vectors_RD, exact.embed(tokens, 300).vectors_RD) > 0.999


@pytest.mark.parametrize(("capability", "has_it"), [((7, 5), False), ((8, 0), True), ((10, 0), True)])
def test_only_gpus_with_flash_attention_have_the_kernel(capability: tuple[int, int], has_it: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    gpu = torch.device("cuda")
    assert [attention.has_kernel(gpu, dtype, 64) for dtype in (HALF, torch.float16, torch.float32)] == [has_it, has_it, False]
    assert [attention.has_kernel(gpu, HALF, width) for width in (8, 26, 96, 256, 264)] == [has_it, False, has_it, has_it, False]
    assert not attention.has_kernel(torch.device("cpu"), HALF, 64)


def test_attention_by_cudnn_is_left_out_on_gpus_alone() -> None:
    torch.backends.cuda.enable_cudnn_sdp(True)
    for device, enabled in (("cpu", True), ("cuda", False)):
        attention.keep_to_flash_attention(torch.device(device))
        assert torch.backends.cuda.cudnn_sdp_enabled() == enabled


def test_a_model_that_fits_in_half_precision_alone_is_cast_before_it_is_brought_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_model(tmp_path, "modernbert")
    exact = Embedder(spec_of(folder))
    tokens = exact.tokenize(TEXTS)
    monkeypatch.setattr(generic, "_has_room", lambda *_: False)
    seen: list[torch.dtype] = []
    monkeypatch.setattr(generic, "_padding_offset", lambda module, _: seen.append(module.layers[0].mlp.Wi.weight.dtype))
    embedder = like_on_a_gpu(folder)
    assert seen == [HALF]
    assert embedder.packed
    assert worst_cosine(embedder.embed(tokens, 300).vectors_RD, exact.embed(tokens, 300).vectors_RD) > 0.998


def test_a_compiler_that_knows_no_such_option_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "_OPTIONS", {"no such option": 1})
    embedder = like_on_a_gpu(save_model(tmp_path, "bert"))
    assert embedder.description["batches"].startswith("packed, but without torch.compile: RuntimeError: Unexpected optimization option")
