"""Measurements of a loaded runner and of memory, in the process that holds them. Uses torch."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Final

import torch

from pipespec.config import SamplingParams
from pipespec.runners.base import ModelRunner, Row
from pipespec.runners.determinism import LogitRunner

QUERY_LENGTHS: Final = (1, 2, 4, 8)
CONTEXT: Final = 256  # tokens before the timed ones
_GREEDY: Final = SamplingParams()
_MIN_ROUNDS: Final = 5
_BANDWIDTH_S: Final = 0.2
_LARGE_BYTES: Final = 512 << 20  # beyond most caches
_LARGE_GPU_BYTES: Final = 4 << 30


def step_times_s(runner: ModelRunner, seconds: float) -> dict[int, float]:
    """The median time of a decode step by query length, draws on the host included.

    seconds: how long to go on; each length is run at least a few times, all in turn.
    """
    length = runner.info.context_length
    context = max(1, min(CONTEXT, length - max(QUERY_LENGTHS)))
    ids = random.Random(0).choices(range(runner.info.vocab_size), k=context + max(QUERY_LENGTHS))
    runner.forward([Row(0, 0, ids[:context], 1, _GREEDY)])
    rows = {
        count: Row(0, context, ids[context : context + count], count, _GREEDY)
        for count in QUERY_LENGTHS
        if context + count <= length
    }
    times: dict[int, list[float]] = {count: [] for count in rows}
    for row in rows.values():
        for _ in range(2):  # choose kernels, capture graphs
            runner.forward([row])
    deadline_s = time.perf_counter() + seconds
    while time.perf_counter() < deadline_s or len(times[1]) < _MIN_ROUNDS:
        for count, row in rows.items():
            start_s = time.perf_counter()
            runner.forward([row])
            times[count].append(time.perf_counter() - start_s)
    runner.release(0)
    return {count: median(values) for count, values in times.items()}


def greedy_draws(runner: ModelRunner, prompt: Sequence[int], text: Sequence[int]) -> list[int]:
    """What is drawn after the prompt and after each token of `text` but the last, given those
    before: one wrong token does not make the others wrong."""
    draws = runner.forward([Row(0, 0, prompt, 1, _GREEDY)])[0]
    for index, token in enumerate(text[:-1]):
        draws += runner.forward([Row(0, len(prompt) + index, [token], 1, _GREEDY)])[0]
    runner.release(0)
    return draws


def reference_text(
    runner: LogitRunner, prompt: Sequence[int], count: int
) -> tuple[list[int], list[float]]:
    """`count` tokens of greedy text, and by how much each one's logit led the next best."""
    text: list[int] = []
    margins: list[float] = []
    row = Row(0, 0, prompt, 1, _GREEDY)
    while len(text) < count:
        best = runner.logits(row)[0].topk(2)
        text.append(int(best.indices[0]))
        margins.append(float(best.values[0] - best.values[1]))
        row = Row(0, len(prompt) + len(text) - 1, text[-1:], 1, _GREEDY)
    runner.release(0)
    return text, margins


def read_bandwidth(num_bytes: int, device: str, seconds: float = _BANDWIDTH_S) -> float:
    """Bytes per second at which `num_bytes` are read, again and again: the best of two kernels that
    do little else (a sum, a dot product with itself)."""
    values = torch.ones(max(1, num_bytes // 4), dtype=torch.float32, device=device)
    kernels: tuple[Callable[[], torch.Tensor], ...] = (values.sum, lambda: values.dot(values))
    return max(values.nbytes / _median_s(kernel, device, seconds / 2) for kernel in kernels)


def large_size(device: str) -> int:
    """How many bytes to read where no cache is to help, as far as memory allows."""
    if device == "cpu":
        return _LARGE_BYTES
    free, _ = torch.cuda.mem_get_info(device)
    return min(_LARGE_GPU_BYTES, free // 4)


def _median_s(kernel: Callable[[], torch.Tensor], device: str, seconds: float) -> float:
    """The median time of a call. Short ones are timed in groups: on a GPU a call returns early."""
    group = 1
    while True:
        elapsed_s = _group_s(kernel, device, group)
        if elapsed_s > 1e-3 or group >= 1 << 14:
            break
        group *= 4
    times, deadline_s = [elapsed_s], time.perf_counter() + seconds
    while time.perf_counter() < deadline_s:
        times.append(_group_s(kernel, device, group))
    return median(times) / group


def _group_s(kernel: Callable[[], torch.Tensor], device: str, count: int) -> float:
    start_s = time.perf_counter()
    for _ in range(count):
        kernel()
    if device != "cpu":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start_s
