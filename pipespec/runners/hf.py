"""The runner for any causal language model that transformers loads. Correctness before speed.

It goes through transformers' own cache, one per slot, without the model's config: then every layer
keeps all its keys and values, a sliding window is a mask, and rollback is exact at any length. With
it come quantization (bitsandbytes) and models spread over several devices (accelerate).
"""

from __future__ import annotations

import importlib.util
import inspect
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from pipespec.errors import ModelLoadError
from pipespec.runners.base import Row, RunnerInfo
from pipespec.runners.drawing import draw_rows
from pipespec.runners.memory import is_out_of_memory
from pipespec.runners.rows import check_row, chunks

log = logging.getLogger(__name__)

_CONTEXT_KEYS: Final = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
_NO_LIMIT: Final = 1 << 17  # for models whose config names no largest position
_ATTENTION_LAYERS: Final = ("full_attention", "sliding_attention", "chunked_attention")
# What transformers raises for folders with something wrong, as far as is known.
_LOAD_ERRORS: Final = (
    OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, ImportError,
    RuntimeError,
)  # fmt: skip


class HfRunner:
    """Loads the checkpoint in `folder`.

    name: for messages. dtype: "float32", "bfloat16" or "float16"; of what quantization leaves, if
    there is any. device: "cpu", "cuda:N", or "auto": over all devices that this process sees, up to
    `max_memory_gib` of each (keys: a GPU's index, or "cpu"). quantize: None, "8bit" or "4bit".
    vocab_size, context_length: as for `LlamaRunner`.

    Raises:
        ModelLoadError: not a causal language model, weights that are incomplete or damaged, no
            bitsandbytes or GPU for `quantize`, or a model whose state cannot be rolled back.
    """

    def __init__(
        self,
        folder: Path,
        *,
        name: str,
        dtype: str,
        device: str,
        vocab_size: int,
        context_length: int | None = None,
        quantize: str | None = None,
        max_memory_gib: Mapping[str, float] | None = None,
    ) -> None:
        model = load_model(folder, name, dtype, device, quantize, max_memory_gib)
        _check_rollback(folder, name, model)
        config = model.config.get_text_config()
        limit = next((getattr(config, k) for k in _CONTEXT_KEYS if getattr(config, k, 0)), None)
        length = min(context_length or limit or _NO_LIMIT, limit or _NO_LIMIT)
        embedding = model.get_input_embeddings().weight
        self._model: Any = model
        self._device: torch.device = embedding.device
        self._num_embeddings: int = embedding.shape[0]
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._caches: dict[int, Any] = {}
        self._info = RunnerInfo(
            name=name,
            runner="hf",
            device=device,
            dtype=dtype,
            vocab_size=min(vocab_size, config.vocab_size),
            context_length=length,
            num_parameters=model.num_parameters(),
            weight_bytes=model.get_memory_footprint(),
            attention=str(getattr(model.config, "_attn_implementation", "") or ""),
        )

    @property
    def info(self) -> RunnerInfo:
        return self._info

    @torch.inference_mode()
    def forward(self, rows: Sequence[Row]) -> list[list[int]]:
        """See `draw_rows`."""
        return draw_rows(rows, self._info, self._num_embeddings, self._row_logits)

    @torch.inference_mode()
    def logits(self, row: Row) -> Tensor:
        """Feeds the row and returns what its draws would be made of: [num_draws, vocab_size]
        float32, on the model's last device."""
        check_row(row, self._info, self._num_embeddings)
        return self._row_logits(row).float()

    def release(self, slot: int) -> None:
        self._caches.pop(slot, None)

    def close(self) -> None:
        self._caches.clear()
        if self._model is not None:
            self._model = None
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _row_logits(self, row: Row) -> Tensor:
        """[num_draws, vocab_size] in the dtype that the model returns."""
        assert self._model is not None, "the runner is closed"
        cache = self._cache(row.slot, row.start)
        first_wanted = row.start + len(row.ids) - row.num_draws
        wanted = []
        for start, stop in chunks(row.start, len(row.ids)):
            ids = torch.tensor([row.ids[start - row.start : stop - row.start]], device=self._device)
            kept = max(1, min(stop - start, stop - first_wanted))
            options = {"logits_to_keep": kept} if self._keeps_logits else {}
            output = self._model(input_ids=ids, past_key_values=cache, use_cache=True, **options)
            if stop > first_wanted:
                wanted.append(output.logits[0, -kept:, : self._info.vocab_size])
        return wanted[0] if len(wanted) == 1 else torch.cat(wanted)

    def _cache(self, slot: int, start: int) -> Any:
        """The slot's cache, cut back to `start`."""
        from transformers import DynamicCache

        cache: Any = self._caches.get(slot)
        length = 0 if cache is None else cache.get_seq_length()
        assert start <= length, "a gap between what the slot holds and the row"
        if start == 0:
            cache = self._caches[slot] = DynamicCache()
        elif start < length:
            cache.crop(start - length)  # negative: how many to remove
        return cache


def load_model(
    folder: Path,
    name: str,
    dtype: str,
    device: str,
    quantize: str | None = None,
    max_memory_gib: Mapping[str, float] | None = None,
) -> Any:
    """The model as transformers loads it, for this runner and for what races against it; see
    `HfRunner`."""
    options = _load_options(name, getattr(torch, dtype), device, quantize, max_memory_gib or {})
    return _load(folder, name, options)


def _load_options(
    name: str,
    dtype: torch.dtype,
    device: str,
    quantize: str | None,
    max_memory_gib: Mapping[str, float],
) -> dict[str, Any]:
    """The arguments of `from_pretrained`."""
    options: dict[str, Any] = {
        "dtype": dtype,
        "local_files_only": True,
        "trust_remote_code": False,  # else transformers may ask on the terminal, and wait
        "ignore_mismatched_sizes": True,  # told by `_load`, with the tensor's name
    }
    if device == "auto":
        options["device_map"] = "auto"
        if max_memory_gib:
            options["max_memory"] = {
                int(key) if key.isdigit() else key: int(gib * (1 << 30))
                for key, gib in max_memory_gib.items()
            }
    else:
        options["device_map"] = {"": device}
    if quantize is None:
        return options
    if device == "cpu":
        raise ModelLoadError(
            f'{name}: "quantize": "{quantize}" needs a GPU; remove the key or change "devices"'
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelLoadError(
            f'{name}: "quantize": "{quantize}" needs bitsandbytes, which is not installed; '
            "run pip install -e .[quantize] or remove the key"
        )
    from transformers import BitsAndBytesConfig

    options["quantization_config"] = (
        BitsAndBytesConfig(load_in_8bit=True)
        if quantize == "8bit"
        else BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    )
    return options


def _load(folder: Path, name: str, options: dict[str, Any]) -> Any:
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        model, loaded = AutoModelForCausalLM.from_pretrained(
            folder, output_loading_info=True, **options
        )
    except (*_LOAD_ERRORS, SafetensorError, StrictDataclassError) as error:
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())
        raise ModelLoadError(f"{name}: transformers cannot load {folder}: {reason}") from error
    for tensor, has, wanted in sorted(loaded["mismatched_keys"]):
        raise ModelLoadError(
            f"{name}: the tensor {tensor} in {folder} has the shape {tuple(has)}; config.json "
            f"implies {tuple(wanted)}"
        )
    missing = sorted(loaded["missing_keys"])
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelLoadError(f"{name}: the weights in {folder} have no tensor {missing[0]}{more}")
    devices = {str(device) for device in getattr(model, "hf_device_map", {}).values()}
    if "disk" in devices:
        raise ModelLoadError(f"{name} does not fit: part of it would run from disk; add devices")
    if "cpu" in devices and devices != {"cpu"}:
        log.warning("%s does not fit its GPUs: part of it runs on the CPU, slowly", name)
    return model.eval()


def _check_rollback(folder: Path, name: str, model: Any) -> None:
    """Verification cuts what a model remembers back to a length. Recurrent state cannot be cut, and
    a few old models remember nothing, or in ways of their own."""
    types = getattr(model.config.get_text_config(), "layer_types", None) or ()
    other = sorted({kind for kind in types if kind not in _ATTENTION_LAYERS})
    if other:
        what = f"layers of type {', '.join(other)}"
    elif model._is_stateful:
        what = "recurrent layers"
    elif "past_key_values" not in inspect.signature(model.forward).parameters:
        what = "no key-value cache"
    else:
        return
    raise ModelLoadError(
        f"{name}: the {model.config.model_type} model in {folder} has {what}; PipeSpec serves "
        "models with attention only, whose cache can be cut back to any length"
    )
