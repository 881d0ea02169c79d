"""The `metrics` object of one sample: the original's keys, then PipeSpec's own.

Lists over models run from the first draft to the target; lists over pairs have one item less, pair
i being stage i drafting and stage i + 1 verifying. Times are seconds. The formulas are in
`definitions`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipespec.metrics import definitions
from pipespec.metrics.counts import StageCounts


def sample_metrics(
    strategy: str,
    counts: Sequence[StageCounts],
    *,
    total_time_s: float,
    time_to_first_token_s: float,
    num_tokens: int,
    token_times_s: Sequence[float] | None = None,
    started_s: float | None = None,
) -> dict[str, Any]:
    """Everything that a result file says about one generated text.

    Args:
        counts: of every stage, smallest draft first.
        total_time_s: from submission to the last token; includes the prefill.
        num_tokens: output tokens, an end-of-text token included.
        token_times_s: greedy only: seconds between consecutive tokens, `num_tokens - 1` items;
            by default the times of its decode steps.
        started_s: the submission on the clock of `StageCounts.step_starts_s`; with it, the start
            of each step is reported relative to the submission.
    """
    assert counts and num_tokens >= 1
    head: dict[str, Any]
    if strategy == "greedy":
        times = counts[-1].step_times_s if token_times_s is None else token_times_s
        assert len(times) == num_tokens - 1, f"{len(times)} token times, {num_tokens} tokens"
        head = {"token_times": list(times)}
    else:
        head = {
            "model_times": [list(stage.step_times_s) for stage in counts],
            "accepted_tokens": [list(stage.emitted) for stage in counts[1:]],
        }
    head["total_time"] = total_time_s
    head["tokens_generated"] = num_tokens
    head["time_per_token"] = definitions.time_per_token(total_time_s, num_tokens)
    head["time_to_first_token_s"] = time_to_first_token_s
    return {
        **head,
        **_target_metrics(counts[-1], total_time_s, num_tokens),
        **_pair_metrics(counts),
        **_stage_counters(counts, started_s),
    }


def _target_metrics(
    target: StageCounts, total_time_s: float, num_tokens: int
) -> dict[str, float | None]:
    num_forwards = 1 + target.num_steps  # the prefill is one
    return {
        "num_target_forwards": num_forwards,
        "efficiency_gain": definitions.efficiency_gain(num_tokens, num_forwards),
        "overhead": definitions.overhead(total_time_s, target.forward_s),
    }


def _pair_metrics(counts: Sequence[StageCounts]) -> dict[str, list[Any]]:
    verifiers = counts[1:]
    return {
        "offered_tokens": [list(stage.offered) for stage in verifiers],
        "num_verifications": [stage.num_verifications for stage in verifiers],
        "num_offered": [stage.num_offered for stage in verifiers],
        "num_accepted": [stage.num_accepted for stage in verifiers],
        "acceptance_rate": [
            definitions.acceptance_rate(stage.num_accepted, stage.num_offered)
            for stage in verifiers
        ],
        "mean_accepted_length": [
            definitions.mean_accepted_length(stage.num_accepted, stage.num_verifications)
            for stage in verifiers
        ],
        "block_efficiency": [
            definitions.block_efficiency(stage.num_emitted, stage.num_verifications)
            for stage in verifiers
        ],
        "token_wastage": [
            definitions.token_wastage(stage.num_rolled_back, stage.num_past_end, stage.num_drafted)
            for stage in counts[:-1]
        ],
        "outcome_hit_rate": [
            definitions.outcome_hit_rate(stage.num_outcome_hits, stage.num_corrections)
            for stage in counts[:-1]
        ],
    }


_STAGE_COUNTERS = (
    "num_steps",
    "num_prefill_tokens",
    "num_drafted",
    "num_stale_drafts",
    "num_rolled_back",
    "num_rollbacks",
    "num_past_end",
    "num_corrections",
    "num_outcome_hits",
    "num_discarded_steps",
)


def _stage_counters(counts: Sequence[StageCounts], started_s: float | None) -> dict[str, Any]:
    metrics: dict[str, Any] = {
        "prefill_times_s": [stage.prefill_s for stage in counts],
        "forward_times_s": [stage.forward_s for stage in counts],
        "wait_times_s": [stage.wait_s for stage in counts],
    }
    for name in _STAGE_COUNTERS:
        metrics[name] = [getattr(stage, name) for stage in counts]
    if started_s is not None:
        metrics["model_starts"] = [
            [start_s - started_s for start_s in stage.step_starts_s] for stage in counts
        ]
    if any(stage.extra for stage in counts):
        metrics["counters"] = [dict(stage.extra) for stage in counts]
    return metrics
