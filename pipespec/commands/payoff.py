"""What a benchmark says about stages that do not pay, and which stages run next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from pipespec.config import ModelConfig, Schedule
from pipespec.metrics import summarise
from pipespec.planning.payoff import WrittenText, payoff

LEAST_TOKENS: Final = 64  # of an async-chain run that says something about its stages
Result = Mapping[str, Any]


def is_enough(texts: Mapping[int, WrittenText]) -> bool:
    """Whether what was written, by sample, is enough to judge the stages by it."""
    return sum(text.num_tokens for text in texts.values()) >= LEAST_TOKENS


def payoff_metadata(
    texts: Mapping[int, WrittenText], schedule: Schedule, greedy: Sequence[Result], drops: bool
) -> dict[str, Any]:
    """`payoff` of a result file: what these texts, by sample, say of their stages.

    greedy: results of the target alone; those of the same samples are its speed. drops: whether the
    run goes on with the best stages.
    """
    same = summarise([result for result in greedy if result["sample_index"] in texts])
    is_measured = same.num_samples == len(texts)
    found = payoff([*texts.values()], schedule, same.tokens_per_s if is_measured else None)
    return {
        "samples": sorted(texts),
        "num_tokens": found.num_tokens,
        "tokens_per_s": round(found.tokens_per_s[found.whole], 3),
        "alternatives": [
            {"stages": stages, "tokens_per_s": round(speed, 3)}
            for stages, speed in found.tokens_per_s.items()
            if stages != found.whole
        ],
        "greedy_is_measured": is_measured,
        "not_paying": found.not_paying,
        "best": found.best,
        "dropped": found.not_paying if drops else (),
    }


def payoff_line(found: Mapping[str, Any] | None, models: Sequence[ModelConfig]) -> str | None:
    """`payoff` of a result file as a line for a person; None if every stage pays or nobody knows.

    models: of the whole hierarchy.
    """
    if found is None or not found["not_paying"]:
        return None
    names = " and ".join(models[stage].name for stage in found["not_paying"])
    is_one, is_greedy = len(found["not_paying"]) == 1, len(found["best"]) == 1
    (best,) = (x for x in found["alternatives"] if [*x["stages"]] == [*found["best"]])
    speeds = f"about {best['tokens_per_s']:,.0f} instead of {found['tokens_per_s']:,.0f} tokens/s"
    source = "measured" if is_greedy and found["greedy_is_measured"] else "simulated from this run"
    without = "the target alone (greedy) has" if is_greedy else f"without {_them(is_one)}"
    line = f"{names} {'does' if is_one else 'do'} not pay: {without} {speeds} ({source}); "
    if not found["dropped"]:
        return line + f"--drop-stages leaves {_them(is_one)} out"
    num_samples = len(found["samples"])
    after = "the first sample" if num_samples == 1 else f"the first {num_samples} samples"
    return line + f"left out after {after}"


def _them(is_one: bool) -> str:
    return "it" if is_one else "them"
