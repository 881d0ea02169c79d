"""First forwards: kernels are chosen, graphs captured and weights read before a request is timed.

Knows the contract of runners and no torch.
"""

from __future__ import annotations

from typing import Final

from pipespec.config import SamplingParams
from pipespec.runners.base import ModelRunner, Row
from pipespec.runners.rows import SMALLEST_BUCKET

_MAX_QUERY_LENGTH: Final = 32  # longer forwards are rare, and each length costs one
_NUM_BUCKETS: Final = 3  # text lengths beyond are met first by a request


def warm_up(runner: ModelRunner, max_query_length: int) -> None:
    """One forward of every query length that will be used, up to a few dozen; on a GPU, at texts
    of several lengths, each of which has graphs of its own, and with draws of both kinds."""
    if not runner.info.weight_bytes:
        return  # an emulated model has nothing to prepare
    length = runner.info.context_length
    longest = min(max_query_length, length)
    on_gpu = runner.info.device.startswith("cuda")
    starts = warm_up_starts(longest, length, on_gpu=on_gpu)
    kinds = (SamplingParams(), SamplingParams(temperature=1.0)) if on_gpu else (SamplingParams(),)
    furthest = max(longest, starts[0])
    runner.forward([Row(0, 0, [0] * furthest, min(longest, furthest), kinds[0])])
    for start in starts:  # from the furthest back: a text is cut, never jumped over
        for count in range(1, min(longest, _MAX_QUERY_LENGTH) + 1):
            at = min(start, length - count)
            for sampling in kinds:
                runner.forward([Row(0, at, [0] * count, count, sampling)])
    runner.release(0)


def warm_up_starts(longest: int, context_length: int, *, on_gpu: bool) -> list[int]:
    """Where forwards of up to `longest` tokens start so that each of the first text lengths is met
    that a GPU has graphs for; the furthest first."""
    ends = {min(SMALLEST_BUCKET << index, context_length) for index in range(_NUM_BUCKETS)}
    starts = sorted((end - longest for end in ends if on_gpu), reverse=True)
    return [start for start in starts if start > longest] or [longest]
