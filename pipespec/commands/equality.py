"""Whether a strategy wrote what greedy wrote; if not, where it left and how close the call was.

In float32 all strategies write the same tokens, except where two of the target's logits are so
near that the order of additions decides: a forward over one token and one over several round
differently. A difference with a larger margin is a bug; in 16-bit formats margins are coarser.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Protocol, runtime_checkable

from pipespec.config import SamplingParams
from pipespec.decoding import Hierarchy
from pipespec.decoding.local import close_all, load_runners, pinned
from pipespec.runners.base import Row

if TYPE_CHECKING:
    from torch import Tensor

NEAR_TIE: Final = 1e-4  # in float32


@runtime_checkable
class LogitRunner(Protocol):
    """A runner that shows what its draws are made of."""

    def logits(self, row: Row) -> Tensor: ...

    def release(self, slot: int) -> None: ...


@dataclass(frozen=True, slots=True)
class Divergence:
    """Where an output first differs from greedy's, given the same prompt.

    position: index in the output, 0 is its first token. expected, found: greedy's token and the
    other; None where that output had ended. margin: between the target's scores of the two tokens
    after the common prefix, in logits; None where it is not known (yet), or has no meaning because
    one of the two had ended.
    """

    sample_index: int
    position: int
    prefix: tuple[int, ...]  # prompt and common output
    expected: int | None
    found: int | None
    margin: float | None = None

    def describe(self, dtype: str) -> str:
        """One line for the user; `dtype` is the target's."""
        where = f"sample {self.sample_index} differs from greedy at output token {self.position}"
        if self.expected is None or self.found is None:
            return f"{where}, where one of the two had ended"
        if self.margin is None:
            return f"{where} (token {self.found}, greedy {self.expected})"
        if dtype != "float32":
            verdict = f"in {dtype} rounding decides near-ties"
        elif self.margin < NEAR_TIE:
            verdict = "a near-tie, which rounding decides"
        else:
            verdict = "not a near-tie: please report this"
        return (
            f"{where} (token {self.found}, greedy {self.expected}): the target's logits are "
            f"{self.margin:.2g} apart; {verdict}"
        )


def first_divergence(
    sample_index: int,
    prompt_ids: Sequence[int],
    greedy_ids: Sequence[int],
    output_ids: Sequence[int],
) -> Divergence | None:
    """The first position at which two outputs differ, a length included; None if they are equal."""
    shorter = min(len(greedy_ids), len(output_ids))
    position = next((i for i in range(shorter) if greedy_ids[i] != output_ids[i]), shorter)
    if position == len(greedy_ids) == len(output_ids):
        return None
    return Divergence(
        sample_index=sample_index,
        position=position,
        prefix=(*prompt_ids, *greedy_ids[:position]),
        expected=greedy_ids[position] if position < len(greedy_ids) else None,
        found=output_ids[position] if position < len(output_ids) else None,
    )


def with_margins(
    divergences: Sequence[Divergence], hierarchy: Hierarchy, sampling: SamplingParams
) -> list[Divergence]:
    """Asks the target, loaded once more in this process, how near each call was."""
    target = hierarchy.target_only
    with pinned(target.in_process(0)):
        runners = load_runners(target)
        try:
            if not isinstance(runners[0], LogitRunner):
                return list(divergences)  # emulated: there are no logits
            return [_with_margin(divergence, runners[0], sampling) for divergence in divergences]
        finally:
            close_all(runners)


def _with_margin(
    divergence: Divergence, runner: LogitRunner, sampling: SamplingParams
) -> Divergence:
    expected, found = divergence.expected, divergence.found
    if expected is None or found is None:
        return divergence
    prefix = divergence.prefix
    logits = runner.logits(Row(0, 0, prefix, 1, sampling))
    runner.release(0)
    margin = score_margin(logits, len(prefix), expected, found, sampling)
    return replace(divergence, margin=margin)


def score_margin(
    logits: Tensor, position: int, expected: int, found: int, sampling: SamplingParams
) -> float:
    """How far two tokens are apart in what the choice at `position` compares, in units of logits.

    logits: [1, vocab]. At temperature T that is T times the distance of logits / T + noise. For a
    token that top-k, top-p or min-p drops, it is how far its logit is from the kept ones.
    """
    import torch

    from pipespec.sampling import TOKEN_STREAM, gumbel_noise, mask_logits

    row = logits.double()
    if sampling.is_greedy:
        return abs(float(row[0, expected] - row[0, found]))
    kept = mask_logits(row, sampling)[0]
    for token in (expected, found):
        if not bool(kept[token].isfinite()):
            return float(kept[kept.isfinite()].min() - row[0, token])
    tokens = torch.tensor([expected, found], device=row.device)
    at = torch.tensor([position, position], device=row.device)
    noise = gumbel_noise(sampling.seed, TOKEN_STREAM, at, tokens)
    scores = row[0, tokens] + sampling.temperature * noise
    return abs(float(scores[0] - scores[1]))
