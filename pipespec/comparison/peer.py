"""transformers as a contestant: `generate`, assisted generation, prompt lookup.

Each is called as its documentation says, with nothing of PipeSpec in between but a streamer that
notes the time. Of the checkpoint's generation settings only the end-of-text ids are kept: others
(a repetition penalty, say) would make another text of it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from transformers import GenerationConfig
from transformers.utils import logging as transformers_logging

from pipespec.comparison.contestants import HEURISTIC, LIBRARY_DEFAULT
from pipespec.comparison.speaker import Answer, Speaker
from pipespec.comparison.specification import model_of, place_of
from pipespec.errors import PipeSpecError
from pipespec.runners.hf import load_model

# The published heuristic: 5 tokens at first, 2 more after all were right, 1 less otherwise.
_HEURISTIC: Final = {"num_assistant_tokens": 5, "num_assistant_tokens_schedule": "heuristic"}


class PeerRefused(PipeSpecError):
    """What transformers raised instead of writing a text."""


class Arrivals:
    """A streamer that notes when tokens are put out, and how many; the prompt is the first."""

    def __init__(self) -> None:
        self.batches: list[tuple[float, int]] = []

    def put(self, ids: Any) -> None:
        self.batches.append((time.perf_counter(), ids.numel()))

    def end(self) -> None:
        """Nothing is left to be put out."""


class PeerSpeaker:
    """A target, and perhaps an assistant, of transformers.

    mode: "plain", "assisted" or "lookup". sampling: as in `SamplingParams`; each text begins with
    its seed, but draws other noise than ours.
    """

    def __init__(
        self, target: Any, assistant: Any, mode: str, sampling: Mapping[str, Any], eos: list[int]
    ) -> None:
        self._target = target
        self._assistant = assistant
        self._mode = mode
        self._sampling = sampling
        self._ends = {"eos_token_id": eos or None, "pad_token_id": eos[0] if eos else 0}
        # The assistant's settings in each variant: the library's heuristic writes to them.
        self._assisting: dict[str, Any] = {}
        target.generation_config = GenerationConfig(**self._ends)
        self.info: dict[str, Any] = {
            "num_parameters": target.num_parameters(),
            "dtype": str(target.dtype),
            "device": str(target.device),
            "num_threads": torch.get_num_threads(),
            "attention": getattr(target.config, "_attn_implementation", None),
        }
        if assistant is not None:
            # With scikit-learn the library also adapts its confidence threshold.
            self.info["has_scikit_learn"] = importlib.util.find_spec("sklearn") is not None

    def generate(self, ids: list[int], max_new_tokens: int, variant: Mapping[str, Any]) -> Answer:
        """See `Speaker`. variant: {"tokens": how many to draft}, for assisted and lookup.

        Raises:
            PeerRefused: transformers cannot do this with these models.
        """
        options: dict[str, Any] = {}
        if self._mode == "assisted":
            self._assistant.generation_config = self._assistant_config(variant["tokens"])
            options["assistant_model"] = self._assistant
        config = self._config(max_new_tokens, variant)
        prompt = torch.tensor([ids], device=self._target.device)
        arrivals = Arrivals()
        torch.manual_seed(self._sampling["seed"])
        start_s = time.perf_counter()
        try:
            output = self._target.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                generation_config=config,
                streamer=arrivals,
                **options,
            )
        except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
            reason = " ".join(str(error).split())[:300]
            raise PeerRefused(f"transformers refuses: {reason}") from error
        (_, _), (first_s, num_first), *_ = arrivals.batches
        return Answer(
            tuple(output[0, len(ids) :].tolist()),
            arrivals.batches[-1][0] - start_s,
            first_s - start_s,
            num_first,
        )

    def _config(self, max_new_tokens: int, variant: Mapping[str, Any]) -> GenerationConfig:
        values: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": False}
        if self._sampling["temperature"] > 0:
            names = ("temperature", "top_k", "top_p")
            values |= {"do_sample": True, **{name: self._sampling[name] for name in names}}
            values["min_p"] = self._sampling["min_p"] or None
        if self._mode == "lookup":
            values["prompt_lookup_num_tokens"] = variant["tokens"]
        return GenerationConfig(**values, **self._ends)

    def _assistant_config(self, tokens: str) -> Any:
        """The assistant's own settings: the library's, the heuristic, or so many tokens always."""
        if tokens not in self._assisting:
            if tokens == LIBRARY_DEFAULT:
                values: dict[str, Any] = {}
            elif tokens == HEURISTIC:
                values = {**_HEURISTIC, "assistant_confidence_threshold": 0.0}
            else:
                values = {
                    "num_assistant_tokens": int(tokens),
                    "num_assistant_tokens_schedule": "constant",
                    "assistant_confidence_threshold": 0.0,
                }
            self._assisting[tokens] = GenerationConfig(**values, **self._ends)
        return self._assisting[tokens]


@contextlib.contextmanager
def open_peer(spec: Mapping[str, Any]) -> Iterator[Speaker]:
    """Loads target and assistant with transformers.

    Raises:
        ModelLoadError: transformers cannot, or the device is not here.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(max(place["threads"] for place in spec["places"]))
    loaded = [
        load_model(
            Path(folder),
            model.name,
            model.dtype,
            place.device,
            model.quantize,
            place.max_memory_gib,
        )
        for folder, model, place in zip(
            spec["folders"],
            map(model_of, spec["models"]),
            map(place_of, spec["places"]),
            strict=True,
        )
    ]
    assistant = loaded[0] if len(loaded) == 2 else None
    yield PeerSpeaker(
        loaded[-1], assistant, spec["settings"]["mode"], spec["sampling"], list(spec["eos"])
    )
