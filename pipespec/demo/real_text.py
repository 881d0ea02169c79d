"""Held-out text itself: what models make of it, alone and together, and what `xz -9e` does.

Knows nothing of continuations: every figure is about the tokens that are really there.
"""

from __future__ import annotations

import lzma
import math
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import combinations
from typing import Final

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from pipespec.demo.corpus import SourceFile
from pipespec.demo.measures import mean, repeats
from pipespec.demo.tokenizer import END_OF_TEXT_ID
from pipespec.errors import UsageError

WINDOWS_AT_ONCE: Final = 8
XZ_PIECE_BYTES: Final = 1 << 19  # half a second's work


@dataclass(frozen=True, slots=True)
class Windows:
    """Windows of held-out text; the first half of each is context, the second half is scored.

    tokens: int64 [windows, length]. num_bytes: of all scored halves.
    """

    tokens: torch.Tensor
    num_bytes: int

    @property
    def num_context(self) -> int:
        """Tokens of a window that are not scored."""
        return self.tokens.shape[1] // 2


@dataclass(frozen=True, slots=True)
class PairOnText:
    """Two models at the scored tokens, and at those that end no 4-gram the window had before.

    agreement: how often both find the same token likeliest. overlap: the mean over tokens of
    sum(min(target_probs, draft_probs)) at temperature 1, the acceptance rate of the classic rule.
    """

    draft: str
    target: str
    agreement: float | None
    overlap: float | None
    clean_agreement: float | None
    clean_overlap: float | None


@dataclass(frozen=True, slots=True)
class XzFigures:
    """Bits per byte that `xz -9e` needs for all held-out files together, library modules or others.

    It sees nothing but the text it compresses. on_library_after_train: it may read the train side
    before, as a model did; what counts is by how many bytes both together are larger than the train
    side alone. Its dictionary of 64 MiB holds all of it.
    """

    on_library: float
    on_other: float
    on_library_after_train: float


def windows(
    tokenizer: PreTrainedTokenizerFast, files: Sequence[SourceFile], num_windows: int, length: int
) -> Windows:
    """Windows spread evenly over the files.

    Raises:
        UsageError: the files hold less than one window.
    """
    tokens: list[int] = []
    for file in files:
        tokens += [*tokenizer(file.text(), verbose=False)["input_ids"], END_OF_TEXT_ID]
    if len(tokens) < length:
        raise UsageError(
            f"the standard library here has {len(tokens)} held-out tokens of one kind, fewer than "
            f"a window of {length}; use a Python whose standard library and tests are installed"
        )
    starts = torch.linspace(0, len(tokens) - length, num_windows).long().tolist()
    rows = torch.tensor([tokens[start : start + length] for start in starts])
    # In a byte-level vocabulary every character of an entry stands for one byte.
    entries = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    special = set(tokenizer.all_special_ids)
    num_bytes = torch.tensor([0 if i in special else len(entry) for i, entry in enumerate(entries)])
    return Windows(rows, int(num_bytes[rows[:, length // 2 :]].sum()))


@torch.inference_mode()
def read_text(
    models: Mapping[str, LlamaForCausalLM], text: Windows
) -> tuple[dict[str, float], list[PairOnText]]:
    """Bits per byte of each model, and each model before another one, with that one as target."""
    bits = dict.fromkeys(models, 0.0)
    pairs = list(combinations(models, 2))
    same: dict[tuple[str, str], list[bool]] = {pair: [] for pair in pairs}
    shared: dict[tuple[str, str], list[float]] = {pair: [] for pair in pairs}
    first = text.num_context
    for rows in torch.split(text.tokens, WINDOWS_AT_ONCE):
        log_probs: dict[str, torch.Tensor] = {}  # [windows, scored, vocab]
        for name, model in models.items():
            logits = model(input_ids=rows[:, :-1], use_cache=False).logits[:, first - 1 :]
            log_probs[name] = torch.log_softmax(logits.float(), dim=-1)
            scored = log_probs[name].gather(-1, rows[:, first:, None])
            bits[name] -= scored.double().sum().item() / math.log(2.0)
        choices = {name: values.argmax(-1) for name, values in log_probs.items()}
        for draft, target in pairs:
            same[draft, target] += (choices[draft] == choices[target]).flatten().tolist()
            lower = torch.minimum(log_probs[draft], log_probs[target])
            shared[draft, target] += lower.exp().sum(-1).flatten().tolist()
    clean = [not flag for row in text.tokens.tolist() for flag in repeats(row)[first:]]
    figures = [
        PairOnText(
            draft,
            target,
            mean(same[draft, target]),
            mean(shared[draft, target]),
            mean(flag for flag, new in zip(same[draft, target], clean, strict=True) if new),
            mean(share for share, new in zip(shared[draft, target], clean, strict=True) if new),
        )
        for draft, target in pairs
    ]
    return {name: spent / text.num_bytes for name, spent in bits.items()}, figures


def xz_figures(
    library: Sequence[SourceFile], other: Sequence[SourceFile], train: Sequence[SourceFile]
) -> XzFigures:
    """Compresses the train side with and without library text side by side, each in 0.7 GiB."""
    library_text, other_text, seen = _joined(library), _joined(other), _joined(train)
    stop = threading.Event()
    with ThreadPoolExecutor(2) as pool:
        try:
            before, both = pool.map(lambda text: _xz_bits(text, stop), (seen, seen + library_text))
        finally:
            stop.set()  # Ctrl-C need not wait for the threads
    return XzFigures(
        on_library=_xz_bits(library_text) / len(library_text),
        on_other=_xz_bits(other_text) / len(other_text),
        on_library_after_train=(both - before) / len(library_text),
    )


def _xz_bits(text: bytes, stop: threading.Event | None = None) -> int:
    """The compressed size; meaningless once `stop` is set."""
    compressor = lzma.LZMACompressor(preset=9 | lzma.PRESET_EXTREME)
    num_bytes = 0
    for start in range(0, len(text), XZ_PIECE_BYTES):
        if stop is not None and stop.is_set():
            break
        num_bytes += len(compressor.compress(text[start : start + XZ_PIECE_BYTES]))
    return 8 * (num_bytes + len(compressor.flush()))


def _joined(files: Sequence[SourceFile]) -> bytes:
    return "".join(file.text() for file in files).encode("utf-8")
