"""Emulated models from result files of the original: greedy and chain runs, nothing else.

What the files say, and how (`decoding.py` of BradMcDanel/pipespec, arXiv 2505.01572):

- A chain run with `lookahead` L verifies L - 1 drafted tokens in a forward over L tokens, so at
  most L are accepted, the bonus token among them. An accepted length below L ends at a mismatch.
- After L accepted tokens the draft goes on with its *own* next token, not the bonus token. If they
  differ, the next verification finds nothing to verify: a forward over one token.
- A step's time as logged by a greedy run ends before the device does; the rest is waited for
  outside of it. The slope of `total_time` over tokens has all of it.
- The first step and the first text of a run contain the warm-up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import linear_regression, median
from typing import Any, Final

from pipespec.emulation.oracle import Oracle
from pipespec.errors import DataError
from pipespec.hashing import extend, hash_tokens

Result = Mapping[str, Any]
StepTimes = dict[int, list[float]]  # number of tokens fed -> milliseconds, one item a forward
_NO_SINGLES: Final = -1.0


@dataclass(frozen=True, slots=True)
class ChainRun:
    """A published chain run. models: names, smallest draft first. results: one item a text."""

    models: tuple[str, ...]
    lookahead: int
    results: Sequence[Result]

    @property
    def lengths(self) -> list[int]:
        """Accepted tokens of each verification of the target, bonus or correction included."""
        return [k for result in self.results for k in result["metrics"]["accepted_tokens"][-1]]


@dataclass(frozen=True, slots=True)
class GreedyTimes:
    """Milliseconds of a one-token step and of a prefill."""

    step_ms: float
    prefill_ms: float


def greedy_times(results: Sequence[Result], what: str) -> GreedyTimes:
    """Slope and intercept of `total_time` over forwards, without the first text.

    Raises:
        DataError: fewer than two texts of different lengths after the first; names `what`.
    """
    counts = [r["metrics"]["tokens_generated"] - 1 for r in results[1:]]
    if len(set(counts)) < 2:
        raise DataError(f"{what}: greedy needs at least three texts, two of different lengths")
    times_ms = [1e3 * r["metrics"]["total_time"] for r in results[1:]]
    slope, intercept = linear_regression(counts, times_ms)
    return GreedyTimes(slope, intercept)


def single_below_ms(run: ChainRun) -> float:
    """A target's step faster than this was a forward over one token.

    Such steps follow a full acceptance and accept one token; where there are both kinds, the limit
    lies halfway between the fastest of them and the median of steps that accepted more.
    """
    several, maybe_single = [], []
    for _, before, length, step_ms in _target_steps(run):
        if length > 1:
            several.append(step_ms)
        elif before == run.lookahead:
            maybe_single.append(step_ms)
    if not several or not maybe_single:
        return _NO_SINGLES
    return (min(maybe_single) + median(several)) / 2


def target_times(run: ChainRun) -> StepTimes:
    """The target's step times: forwards over one token and, with two models, over `lookahead`; a
    third model in between may hand down one more."""
    limit_ms, times = single_below_ms(run), StepTimes()
    most = max(run.lengths)
    for _, _, _, step_ms in _target_steps(run):
        query = 1 if step_ms < limit_ms or run.lookahead == 1 else most
        times.setdefault(query, []).append(step_ms)
    return times


def draft_times(run: ChainRun) -> list[float]:
    """Milliseconds of the first model's one-token steps."""
    return [1e3 * s for r in run.results for s in r["metrics"]["model_times"][0][1:]]


def middle_times(run: ChainRun) -> list[float]:
    """Milliseconds of a middle model's verifications over `lookahead` tokens that all passed: it
    drafts nothing more then, so its logged time is one forward. Of three models only."""
    found = []
    for result in run.results:
        lengths = result["metrics"]["accepted_tokens"][0]
        seconds = result["metrics"]["model_times"][1]
        steps = list(zip(lengths, seconds))[1:]
        found += [1e3 * s for length, s in steps if length == run.lookahead]
    return found


def agreement(run: ChainRun) -> list[list[bool | None]]:
    """Of each text, at each position: whether the draft's token on the true prefix was the
    target's; None where the run does not tell. Two models only."""
    assert len(run.models) == 2
    limit_ms = single_below_ms(run)
    texts: list[dict[int, bool]] = [{} for _ in run.results]
    ends = [1] * len(run.results)  # the first token is from the prefill; nobody drafted it
    for text, before, length, step_ms in _target_steps(run, warm_up=True):
        known, start = texts[text], ends[text]
        is_single = length == 1 and step_ms < limit_ms and before == run.lookahead
        if before == run.lookahead:
            known[start - 1] = not is_single
        ends[text] += length
        if is_single:
            continue
        known |= dict.fromkeys(range(start, start + length - 1), True)
        if length < run.lookahead:
            known[start + length - 1] = False
    return [[known.get(n) for n in range(1, end)] for known, end in zip(texts, ends)]


def chain_lengths(oracle: Oracle, lookahead: int, texts: int, new_tokens: int) -> list[int]:
    """Accepted lengths of the original's chain, with this draft: `agreement` the other way round,
    so that a fit is compared by what was really observed."""
    lengths = []
    for text in range(texts):
        prefix, right = hash_tokens((text,)), []
        for _ in range(new_tokens):
            right.append(oracle.agrees(prefix))
            prefix = extend(prefix, oracle.target(prefix))
        at, goes_on = 0, True
        while at + lookahead < new_tokens:
            if not goes_on:  # on its own instead of the bonus token: nothing to verify
                lengths.append(1)
                at, goes_on = at + 1, True
                continue
            drafted = right[at : at + lookahead - 1]
            length = drafted.index(False) + 1 if False in drafted else lookahead
            lengths.append(length)
            at += length
            goes_on = length < lookahead or right[at - 1]
    return lengths


def length_distance(one: Sequence[int], other: Sequence[int]) -> float:
    """Total variation distance of two samples of lengths: 0 if they have the same shares, 1 if
    they have nothing in common."""
    lengths = set(one) | set(other)
    return 0.5 * sum(abs(one.count(n) / len(one) - other.count(n) / len(other)) for n in lengths)


def _target_steps(run: ChainRun, *, warm_up: bool = False) -> list[tuple[int, int, int, float]]:
    """(text, accepted length of the step before, accepted length, milliseconds) of each step of the
    target, without the first of each text unless `warm_up`."""
    steps = []
    for text, result in enumerate(run.results):
        metrics, before = result["metrics"], 0
        rows = zip(metrics["accepted_tokens"][-1], metrics["model_times"][-1], strict=True)
        for number, (length, seconds) in enumerate(rows):
            if number or warm_up:
                steps.append((text, before, length, 1e3 * seconds))
            before = length
    return steps
