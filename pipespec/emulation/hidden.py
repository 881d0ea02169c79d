"""Easy and hard stretches from what was observed: a hidden Markov model of two states.

Expectation maximisation (Baum, Petrie, Soules, Weiss 1970; scaled as in Rabiner 1989), with a weak
prior on the lengths of stretches: few texts hold few stretches, and without it a single bad passage
becomes a state of its own. Plain Python: some thousand positions take a second or two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Final

from pipespec.emulation.oracle import Stretches

Observation = tuple[bool | None, ...]  # of each draft at one position: right, wrong or not known
NUM_ITERATIONS: Final = 40
PRIOR_LENGTHS: Final = (30.0, 6.0)
PRIOR_SWITCHES: Final = 10.0  # what the prior counts for, each way
_Pair = tuple[float, float]  # of easy and hard


@dataclass(frozen=True, slots=True)
class TwoStates:
    """leave: the probability that the next token is in the other kind of stretch. outcomes: the
    probability of each combination of right and wrong drafts, in each kind."""

    leave: _Pair
    outcomes: dict[tuple[bool, ...], _Pair]

    @property
    def stretches(self) -> Stretches:
        """Mean lengths in tokens."""
        return Stretches(1.0 / self.leave[0], 1.0 / self.leave[1])

    def agreement(self, draft: int) -> _Pair:
        """How often a draft is right in easy and in hard stretches."""
        right = [pair for outcome, pair in self.outcomes.items() if outcome[draft]]
        return sum(pair[0] for pair in right), sum(pair[1] for pair in right)


def fit_two_states(texts: Sequence[Sequence[Observation]], num_drafts: int) -> TwoStates:
    """texts: what was observed at each position of each text, of `num_drafts` drafts."""
    model = _first_guess(texts, num_drafts)
    for _ in range(NUM_ITERATIONS):
        model = _improved(model, texts)
    return model


def _first_guess(texts: Sequence[Sequence[Observation]], num_drafts: int) -> TwoStates:
    """Stretches as in the prior, drafts three times as often wrong in hard ones."""
    known = [item for text in texts for item in text if None not in item]
    outcomes = {}
    for outcome in product((True, False), repeat=num_drafts):
        share = (sum(item == outcome for item in known) + 0.5) / (len(known) + 1)
        outcomes[outcome] = (share, share) if all(outcome) else (share * 0.75, share * 2.25)
    sums = [sum(pair[kind] for pair in outcomes.values()) for kind in (0, 1)]
    scaled = {o: (pair[0] / sums[0], pair[1] / sums[1]) for o, pair in outcomes.items()}
    return TwoStates((1 / PRIOR_LENGTHS[0], 1 / PRIOR_LENGTHS[1]), scaled)


def _improved(model: TwoStates, texts: Sequence[Sequence[Observation]]) -> TwoStates:
    """One step of expectation maximisation."""
    likelihood: dict[Observation, _Pair] = {}
    for item in {item for text in texts for item in text}:
        pairs = [pair for outcome, pair in model.outcomes.items() if _fits(outcome, item)]
        likelihood[item] = sum(p[0] for p in pairs), sum(p[1] for p in pairs)
    seen = {item: [0.0, 0.0] for item in likelihood}  # expected number, by kind of stretch
    left = [PRIOR_SWITCHES] * 2
    stayed = [PRIOR_SWITCHES * (length - 1.0) for length in PRIOR_LENGTHS]
    for text in texts:
        if text:
            _count_expected(model, text, likelihood, seen, left, stayed)
    totals = [sum(counts[kind] for counts in seen.values()) or 1.0 for kind in (0, 1)]
    outcomes = {}
    for outcome, pair in model.outcomes.items():
        items = [item for item in seen if _fits(outcome, item)]
        expected = [
            sum(seen[i][kind] * pair[kind] / max(likelihood[i][kind], 1e-300) for i in items)
            for kind in (0, 1)
        ]
        outcomes[outcome] = (expected[0] / totals[0], expected[1] / totals[1])
    leave = [gone / (gone + same) for gone, same in zip(left, stayed)]
    return TwoStates((leave[0], leave[1]), outcomes)


def _count_expected(
    model: TwoStates,
    text: Sequence[Observation],
    likelihood: dict[Observation, _Pair],
    seen: dict[Observation, list[float]],
    left: list[float],
    stayed: list[float],
) -> None:
    """Forward and backward over one text; adds its expected counts."""
    leave_easy, leave_hard = model.leave
    easy = leave_hard / (leave_easy + leave_hard)
    hard = 1.0 - easy
    forward: list[tuple[float, float, float]] = []  # of easy, of hard, what they were scaled by
    for item in text:
        like = likelihood[item]
        easy, hard = easy * like[0], hard * like[1]
        scale = easy + hard
        easy, hard = easy / scale, hard / scale
        forward.append((easy, hard, scale))
        easy, hard = (
            easy * (1 - leave_easy) + hard * leave_hard,
            easy * leave_easy + hard * (1 - leave_hard),
        )
    after_easy = after_hard = 1.0
    for at in range(len(text) - 1, -1, -1):
        easy, hard, scale = forward[at]
        counts = seen[text[at]]
        counts[0] += easy * after_easy
        counts[1] += hard * after_hard
        like = likelihood[text[at]]
        after_easy, after_hard = like[0] * after_easy / scale, like[1] * after_hard / scale
        if at > 0:
            easy, hard, _ = forward[at - 1]
            stayed[0] += easy * (1 - leave_easy) * after_easy
            left[0] += easy * leave_easy * after_hard
            stayed[1] += hard * (1 - leave_hard) * after_hard
            left[1] += hard * leave_hard * after_easy
            after_easy, after_hard = (
                (1 - leave_easy) * after_easy + leave_easy * after_hard,
                leave_hard * after_easy + (1 - leave_hard) * after_hard,
            )


def _fits(outcome: tuple[bool, ...], item: Observation) -> bool:
    return all(known is None or known == right for right, known in zip(outcome, item))
