"""transformers' own fast path, to compare with: a static cache and torch.compile.

As a runner, so that it is timed and checked like the others. Only for one slot, for decode steps
from a prompt on, and for what `doctor` asks of it: PipeSpec itself never runs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pipespec.runners.base import Row, RunnerInfo


class StaticCompileRunner:
    """Loads the checkpoint in `folder` through transformers and compiles its forward.

    The prompt runs uncompiled, as `generate` does it. A step of a new length is compiled when it is
    first met, which takes tens of seconds.
    """

    def __init__(
        self, folder: Path, *, dtype: str, device: str, vocab_size: int, context_length: int
    ) -> None:
        from transformers import AutoModelForCausalLM, StaticCache

        self._model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), device_map={"": device}, local_files_only=True
        ).eval()
        # What CUDA graphs there are, inductor makes; on the CPU the mode means nothing.
        mode = "reduce-overhead" if device != "cpu" else None
        self._step: Any = torch.compile(self._model.forward, mode=mode, fullgraph=True)
        self._cache: Any = StaticCache(config=self._model.config, max_cache_len=context_length)
        self._device = device
        self.info = RunnerInfo(
            name=folder.name,
            runner="static cache + compile",
            device=device,
            dtype=dtype,
            vocab_size=vocab_size,
            context_length=context_length,
            num_parameters=self._model.num_parameters(),
            weight_bytes=self._model.get_memory_footprint(),
        )

    @torch.no_grad()
    def forward(self, rows: Sequence[Row]) -> list[list[int]]:
        """One row; see `ModelRunner.forward`."""
        (row,) = rows
        for layer in self._cache.layers:
            layer.cumulative_length.fill_(row.start)
        ids = torch.tensor([row.ids], device=self._device)
        if row.start == 0:
            forward = self._model
        else:
            forward = self._step
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        logits = forward(input_ids=ids, past_key_values=self._cache, use_cache=True).logits
        draws: list[int] = logits[0, -row.num_draws :, : self.info.vocab_size].argmax(-1).tolist()
        return [draws]

    def release(self, slot: int) -> None:
        """Nothing: a prompt overwrites what is there."""

    def close(self) -> None:
        self._model = self._step = self._cache = None
        if self._device != "cpu":
            torch.cuda.empty_cache()
