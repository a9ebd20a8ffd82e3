"""torch's compiler, which joins what lies between a layer's matrix products; used where the same comes out."""

# Shape suffixes: T packed tokens, D width.

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn

from embedding.model.packing import PackedBatch
from embedding.model.parity import difference, probe_batch

_COMPILER: Final = "inductor"
_OPTIONS: Final[dict[str, Any]] = {
    "deterministic": True,  # no kernel chosen by a race, which may end otherwise at the next start, and round otherwise
    "compile_threads": 1,  # for a handful of kernels; else every worker starts a process for each core
}
_PROBE_TOKENS: Final = 4096
"""Kernels are laid out for the first batch. Below 1,024 tokens many threads would normalize one token, which is slow where there are
tokens enough for all threads.
"""
_REASON_CHARS: Final = 200
"""A compiler says more than a line of a log can hold."""


def compiled(module: nn.Module, *, whole: bool) -> Any:
    """What runs as `module` does, and is compiled when it is first called, for batches of any number of tokens.

    `whole`: into one piece, or not at all; else what cannot be compiled runs as it is.
    """
    # As options and not in its configuration, which the compiler restores after each piece, and which other threads do not see.
    return torch.compile(module, dynamic=True, fullgraph=whole, backend=_COMPILER, options=_OPTIONS)


def manner_compiled(
    encode: Callable[[PackedBatch], Tensor],
    config: Any,
    max_tokens: int,
    device: torch.device,
    product_dtype: torch.dtype,
    switch: Callable[[bool], None],
) -> str:
    """Switch the packed layers behind `encode` to compiled ones, if these give the same hidden states [T, D]; how they run from now on.

    `switch` takes True for compiled layers and False for those before; `config` is the model's.
    """
    from torch._inductor import config as inductor  # brings the compiler, seconds that a CPU need not spend

    inductor.compile_threads = 1  # which it reads before it reads the options
    batch = probe_batch(config, max_tokens, device, _PROBE_TOKENS)
    expected_TD = encode(batch)
    try:
        switch(True)
        reason = difference(encode(batch), expected_TD, product_dtype)
    except Exception as error:  # noqa: BLE001 - a machine without a C compiler, and whatever else a compiler meets
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:_REASON_CHARS]}"
    if not reason:
        return "packed"
    switch(False)
    return f"packed, but without torch.compile: {reason}"
