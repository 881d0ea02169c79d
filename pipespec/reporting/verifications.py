"""From a sample's counts to who wrote which token, and when.

What is looked at are the target's decode steps: the last pair of stages. Works on PipeSpec's
samples and the original's, which does not say how many candidates were offered, nor when.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from pipespec.metrics import Origin, verification_origins

# Of the target's own token after the accepted ones, by where it comes from.
CODES: Final = {Origin.BONUS: "b", Origin.CORRECTION: "c", Origin.UNDRAFTED: "u"}
EITHER: Final = "e"  # bonus or correction: the file does not tell them apart
NONE: Final = "-"  # the text ended with an accepted candidate

Curve = list[tuple[float, int]]  # (seconds since submission, tokens by then)


@dataclass(frozen=True, slots=True)
class Verifications:
    """Lists have one item a verification that counted, in order.

    accepted: candidates that became output. own: of the target's own token after them, one of
    `CODES`, `EITHER` or `NONE` each. offered: None where that is not recorded. durations_s: of the
    forwards. ends_s: since submission; None where that is not recorded. num_before: tokens of the
    prefill.
    """

    accepted: list[int]
    own: str
    offered: list[int] | None
    durations_s: list[float]
    ends_s: list[float] | None
    num_before: int


def verifications(metrics: Mapping[str, Any]) -> Verifications | None:
    """Of one sample; None for greedy. With candidates beside the main path (`--tree`), a refused
    one does not mean a correction: see `without_corrections`."""
    if not metrics.get("accepted_tokens"):
        return None
    emitted = metrics["accepted_tokens"][-1]
    durations = metrics["model_times"][-1]
    offered = _last(metrics.get("offered_tokens"))
    starts = _last(metrics.get("model_starts"))
    steps = [step for step, count in enumerate(emitted) if count > 0]
    accepted = [emitted[step] - 1 for step in steps]
    own = [
        _own(count, None if offered is None else offered[step])
        for step, count in zip(steps, accepted)
    ]
    num_accepted = _last(metrics.get("num_accepted"))
    if num_accepted is not None and num_accepted > sum(accepted):
        accepted[-1] += 1
        own[-1] = NONE
    return Verifications(
        accepted=accepted,
        own="".join(own),
        offered=None if offered is None else [offered[step] for step in steps],
        # The original's chain counts verifications beyond the end of the text, too.
        durations_s=[durations[step] for step in steps],
        ends_s=None if starts is None else [starts[step] + durations[step] for step in steps],
        num_before=0 if offered is None else max(0, metrics["tokens_generated"] - sum(emitted)),
    )


def without_corrections(own: str) -> str:
    """`Verifications.own` of a run in which more was offered than one path."""
    return own.replace(CODES[Origin.CORRECTION], EITHER)


def curve(metrics: Mapping[str, Any]) -> Curve:
    """Tokens over time, from (0, 0) on. The original recorded no times of its verifications: they
    share the total time in proportion to the target's forwards (`is_estimated`)."""
    total_s, num_tokens = metrics["total_time"], metrics["tokens_generated"]
    if "arrivals" in metrics:
        times = [at_s for at_s, _ in metrics["arrivals"]]
        counts = [count for _, count in metrics["arrivals"]]
    elif is_estimated(metrics):
        durations = metrics["model_times"][-1]
        scale = total_s / (sum(durations) or 1.0)
        times = [scale * at_s for at_s in itertools.accumulate(durations)]
        counts = metrics["accepted_tokens"][-1]
    else:
        between = metrics["token_times"]
        times = list(itertools.accumulate(between, initial=total_s - sum(between)))
        counts = [1] * len(times)
    totals = (min(total, num_tokens) for total in itertools.accumulate(counts))
    return [(0.0, 0), *zip(times, totals), (total_s, num_tokens)]


def is_estimated(metrics: Mapping[str, Any]) -> bool:
    """Whether the times of `curve` are estimates."""
    return "arrivals" not in metrics and "token_times" not in metrics


def _own(num_accepted: int, num_offered: int | None) -> str:
    if num_offered is None:
        return EITHER
    return CODES[verification_origins(num_offered, num_accepted, num_accepted + 1)[-1]]


def _last(values: Sequence[Any] | None) -> Any:
    """The target's, of a list over models or pairs."""
    return values[-1] if values else None
