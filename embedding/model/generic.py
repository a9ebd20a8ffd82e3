"""Any encoder that transformers knows: packed where its architecture allows it, else padded."""

# Shape suffixes: T packed tokens, H heads, G key and value heads, K head width, D width.

from __future__ import annotations

import logging
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModel, AutoModelForTextEncoding, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING
from transformers.utils.logging import disable_progress_bar

from embedding.errors import ModelError, first_line
from embedding.model.attention import attend, has_kernel
from embedding.model.compiling import compiled, manner_compiled
from embedding.model.linear import filled, linear_for, onednn_fits_on
from embedding.model.packing import PackedBatch, PackedRows
from embedding.model.parity import difference, probe_batch
from embedding.model.spec import ModelSpec, read_config

log = logging.getLogger(__name__)

PACKED: Final = "packed_rows"
_FREE_FOR_WEIGHTS: Final = 0.8
"""Share of a GPU's free memory: the rest is for what a model computes when it is tried."""


class GenericEncoder:
    """One model of transformers in one precision on one device.

    Attributes:
        packed: rows run without padding.
        manner: "packed", and why its layers are not compiled where they should be; else "padded", and why.
    """

    def __init__(self, spec: ModelSpec, folder: Path, device: torch.device, dtype: torch.dtype, *, fp8: bool = False) -> None:
        """Raises ModelError: the weights do not fill the model, or its classes do not run in fp8."""
        self._device = device
        self._dtype = torch.float32
        self._by_kernel = False
        self.module = _load(spec, folder)
        if not _has_room(device, self.module):
            self._cast(dtype)
        self.module.to(device)  # type: ignore[arg-type]  # transformers wraps this method without its types
        self._padding_offset = _padding_offset(self.module, spec.max_tokens)
        self.packed = False
        batch = probe_batch(self.module.config, spec.max_tokens, device)
        reason = self._try_packing(spec, dtype, batch)
        self.manner = f"padded: {reason}" if reason else "packed"
        if fp8 or onednn_fits_on(device, dtype):
            self._multiply_fast(batch, fp8=fp8)
        if self.packed and self._by_kernel:
            self._compile(spec.max_tokens, torch.float8_e4m3fn if fp8 else dtype)

    def __call__(self, batch: PackedBatch) -> Tensor:
        """Hidden states [T, D] of the batch's tokens, in the order of its ids."""
        with torch.inference_mode(), self._autocast():
            return self._run_packed(batch) if self.packed else self._run_padded(batch)

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self._device.type, dtype=self._dtype, enabled=self._dtype != torch.float32)

    def _run_packed(self, batch: PackedBatch) -> Tensor:
        output = self.module(
            input_ids=filled(batch.ids_T, self._dtype).unsqueeze(0),
            position_ids=filled(batch.position_ids(self._padding_offset), self._dtype).unsqueeze(0),
            packed_rows=batch.rows,
            by_kernel=self._by_kernel,
        )
        return output.last_hidden_state[0, : len(batch.ids_T)]  # type: ignore[no-any-return]

    def _run_padded(self, batch: PackedBatch) -> Tensor:
        rows, longest = len(batch.lengths), int(batch.lengths[0])
        cells_T = batch.rows_T * longest + batch.positions_T
        ids = batch.ids_T.new_full((rows * longest,), self.module.config.pad_token_id or 0)
        ids[cells_T] = batch.ids_T
        mask = torch.zeros_like(ids)
        mask[cells_T] = 1
        output = self.module(input_ids=ids.view(rows, longest), attention_mask=mask.view(rows, longest))
        return output.last_hidden_state.flatten(0, 1)[cells_T]  # type: ignore[no-any-return]

    def _try_packing(self, spec: ModelSpec, dtype: torch.dtype, batch: PackedBatch) -> str:
        """Cast the weights, and switch to packed attention if that gives what padded batches give; else say why not.

        Compared in fp32 first if there is room for it, where a wrong mask or position cannot hide behind rounding, then in the job's
        precision.
        """
        if not self.module.is_backend_compatible():
            self._cast(dtype)
            return f"the {spec.model_type} classes of transformers do not accept an attention function"
        padded_TD = self(batch)
        padded_attention = self.module.config._attn_implementation
        self.module.set_attn_implementation(PACKED)
        self.packed = True
        try:
            reason = difference(self(batch), padded_TD, self._dtype)
            self._cast(dtype)
            reason = reason or difference(self(batch), padded_TD, dtype)
        except (AttributeError, TypeError, RuntimeError, ValueError, KeyError) as error:
            self._cast(dtype)
            reason = f"packed attention does not work with these classes ({type(error).__name__}: {error})"
        if reason:
            self.packed = False
            self.module.set_attn_implementation(padded_attention)
        return reason

    def _cast(self, dtype: torch.dtype) -> None:
        """Cast the matrices once; autocast would do it in every call. Everything else stays fp32, as autocast wants it."""
        self._dtype = dtype
        self._by_kernel = has_kernel(self._device, dtype, _head_width(self.module.config))
        for module in self.module.modules():
            if isinstance(module, nn.Linear):
                module.to(self._dtype)

    def _multiply_fast(self, batch: PackedBatch, *, fp8: bool) -> None:
        """Let a CPU's fastest kernel do the products, unless this model reads its weights past the modules that hold them; or fp8.

        What fp8 makes of the vectors is for the job to judge, on texts.

        Raises:
            ModelError: the model does not run in fp8.
        """
        expected_TD = self(batch)
        plain = {name: module for name, module in self.module.named_modules() if type(module) is nn.Linear}
        for name, module in plain.items():
            bias: Tensor | None = module.bias
            self.module.set_submodule(name, linear_for(module.weight.detach(), bias.detach() if bias is not None else None, fp8=fp8))
        try:
            found_TD = self(batch)
        except (AttributeError, NotImplementedError, RuntimeError, TypeError) as error:
            if fp8:
                what = f"the {self.module.config.model_type} classes of transformers do not run in fp8 ({first_line(error)})"
                raise ModelError(f"{what}; use --precision bf16") from error
            reason = str(error)
        else:
            reason = "" if fp8 else difference(found_TD, expected_TD, self._dtype)
        if reason:
            log.info("%s keeps torch's own matrix products: %s", type(self.module).__name__, reason)
            for name, module in plain.items():
                self.module.set_submodule(name, module)

    def _compile(self, max_tokens: int, product_dtype: torch.dtype) -> None:
        """Run compiled layers where the compiler manages it."""
        plain = _layers(self.module)

        def switch(on: bool) -> None:
            for name, layer in plain.items():
                self.module.set_submodule(name, compiled(layer, whole=False) if on else layer)

        self.manner = manner_compiled(self, self.module.config, max_tokens, self._device, product_dtype, switch)


def _layers(module: nn.Module) -> dict[str, nn.Module]:
    """What a model repeats, by name: the members of its lists of modules, but of lists within them."""
    lists = [name for name, part in module.named_modules() if isinstance(part, nn.ModuleList)]
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    return {f"{name}.{number}": layer for name in outer for number, layer in module.get_submodule(name).named_children()}


def _load(spec: ModelSpec, folder: Path) -> PreTrainedModel:
    """The model in evaluation mode, float32, its weights frozen; of an encoder-decoder only the encoder."""
    disable_progress_bar()  # one for each worker would fill the job's log
    path = folder / spec.transformer_path
    config = read_config(path, trust_remote_code=spec.trust_remote_code)
    if hasattr(config, "use_cache"):
        config.use_cache = False
    try:
        model, info = auto_class_of(config).from_pretrained(
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
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelError(
            f"model {spec.source.name!r} has no weights for {missing[0]}{more}; use a model with the weights of the whole encoder"
        )
    return model.eval().requires_grad_(False)  # type: ignore[no-any-return]


def auto_class_of(config: Any) -> Any:
    """What loads such a model: both give the same classes, but of an encoder-decoder such as T5 the first gives the encoder."""
    return AutoModelForTextEncoding if type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING else AutoModel


def _head_width(config: Any) -> int:
    """0 where the configuration does not tell, as of models that have no such heads."""
    heads = getattr(config, "num_attention_heads", 0)
    return int(getattr(config, "head_dim", 0) or (config.hidden_size // heads if heads else 0))


def _has_room(device: torch.device, module: nn.Module) -> bool:
    """Whether the device has memory for the model, in float32 as it is now, and for what it computes."""
    if device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    return sum(weight.numel() * weight.element_size() for weight in module.parameters()) < _FREE_FOR_WEIGHTS * free


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


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed_rows: PackedRows,
    by_kernel: bool,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    **_unused: object,
) -> tuple[Tensor, None]:
    """What transformers calls for each layer: attention of each token to the tokens of its own row.

    Registered with its AttentionInterface, for every model class with `_supports_attention_backend`. No mask function is registered
    under that name, so that transformers builds no mask.

    Shapes: query [1, H, T, K], key and value [1, G, T, K] with G dividing H (grouped queries); the result is [1, T, H, K].
    `sliding_window` w lets token i see token j where |i - j| < w, as transformers' flash attention does.

    Raises:
        NotImplementedError: the model adds a bias to the scores or caps them, which no packed kernel here does.
    """
    if attention_mask is not None or position_bias is not None or softcap is not None:
        raise NotImplementedError("attention with a mask, bias or cap of its own cannot run packed")
    causal = bool(getattr(module, "is_causal", False)) if is_causal is None else is_causal
    # Rotary embeddings may have widened query and key under autocast; value comes straight from its projection.
    query_THK, key_TGK, value_TGK = (tensor[0].transpose(0, 1).to(value.dtype) for tensor in (query, key, value))
    found_THK = attend(
        query_THK, key_TGK, value_TGK, packed_rows, by_kernel=by_kernel, scaling=scaling, causal=causal, window=sliding_window
    )
    return found_THK.unsqueeze(0), None


AttentionInterface.register(PACKED, packed_attention)
