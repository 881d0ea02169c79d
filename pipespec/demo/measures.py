"""Figures from tokens, ranks and counts alone; no model and no tensor here.

Speculation is scored teacher-forced: the rank that the draft gives to each token of the target's
text, given the text before it. That is exact, because an accepted prefix is the target's text:
rank 1 is a draft the target accepts, any other rank is that of the correction token.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Final

NGRAM: Final = 4
TOP: Final = (2, 3, 4, 8)  # is the correction token among so many likeliest tokens of the draft?
LOOKAHEADS: Final = (4, 8)


@dataclass(frozen=True, slots=True)
class Continuation:
    """Tokens of a prompt and of a model's continuation of it."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]

    def repeated(self) -> list[bool]:
        """For each token: does it end a 4-gram that the prompt or the text before it contains?"""
        return repeats(self.prompt + self.tokens)[len(self.prompt) :]


@dataclass(frozen=True, slots=True)
class Round:
    """One verification: the index of its first drafted token, and how many were accepted."""

    start: int
    num_accepted: int


@dataclass(frozen=True, slots=True)
class Speculation:
    """How a draft does on texts of a target; None where there was nothing to measure.

    agreement: share of tokens that the draft would have proposed. standard_error: of it, over
    prompts; it says nothing about training seeds. correction_in_top: by k, the share of corrected
    tokens that are among the draft's k likeliest. num_rounds, mean_accepted: by lookahead, rounds,
    and drafts accepted in one, without the bonus or correction token. accepted_at: by place in a
    round of the largest lookahead, counted from 1, the share of rounds that accept that draft.
    """

    num_tokens: int
    agreement: float | None
    standard_error: float | None
    correction_in_top: Mapping[int, float | None]
    num_rounds: Mapping[int, int]
    mean_accepted: Mapping[int, float | None]
    accepted_at: Mapping[int, float | None]


def speculation(
    ranks: Sequence[Sequence[int]], counted: Sequence[Sequence[bool]] | None = None
) -> Speculation:
    """Figures of the ranks that a draft gave to the tokens of each text.

    counted: the tokens to look at, by default all. A round counts if all tokens that it drafts for
    do; that is a choice of target text only, so it favours neither long runs nor short ones.
    """
    if counted is None:
        counted = [[True] * len(text) for text in ranks]
    picked = [
        [rank for rank, flag in zip(text, flags, strict=True) if flag]
        for text, flags in zip(ranks, counted, strict=True)
    ]
    by_text = [fmean(rank == 1 for rank in text) for text in picked if text]
    corrected = [rank for text in picked for rank in text if rank > 1]
    accepted = {k: _accepted(ranks, counted, k) for k in LOOKAHEADS}
    longest = max(LOOKAHEADS)
    return Speculation(
        num_tokens=sum(map(len, picked)),
        agreement=mean(rank == 1 for text in picked for rank in text),
        standard_error=stdev(by_text) / len(by_text) ** 0.5 if len(by_text) > 1 else None,
        correction_in_top={k: mean(rank <= k for rank in corrected) for k in TOP},
        num_rounds={k: len(accepted[k]) for k in LOOKAHEADS},
        mean_accepted={k: mean(accepted[k]) for k in LOOKAHEADS},
        accepted_at={n: mean(a >= n for a in accepted[longest]) for n in range(1, longest + 1)},
    )


def rounds(agrees: Sequence[bool], lookahead: int) -> list[Round]:
    """The verification rounds of a text; an unfinished last one is left out.

    After the accepted drafts comes the correction or bonus token: a round covers one token more.
    """
    found: list[Round] = []
    start = 0
    while start + lookahead < len(agrees):
        run = agrees[start : start + lookahead]
        found.append(Round(start, run.index(False) if False in run else lookahead))
        start += found[-1].num_accepted + 1
    return found


def repeats(text: Sequence[int], length: int = NGRAM) -> list[bool]:
    """For each token: does it end an n-gram of that length that the text before it contains?"""
    seen: set[tuple[int, ...]] = set()
    flags: list[bool] = []
    for end in range(1, len(text) + 1):
        ngram = tuple(text[max(0, end - length) : end])
        flags.append(ngram in seen)
        if len(ngram) == length:
            seen.add(ngram)
    return flags


def distinct_ngrams(texts: Iterable[Sequence[int]]) -> float | None:
    """Different 4-grams of all texts together, as a share of all their 4-grams."""
    ngrams = [
        tuple(text[start : start + NGRAM])
        for text in texts
        for start in range(len(text) - NGRAM + 1)
    ]
    return len(set(ngrams)) / len(ngrams) if ngrams else None


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased estimate of Pr[one of k samples is correct], from `num_samples` >= k of them.

    Chen et al., "Evaluating Large Language Models Trained on Code", arXiv 2107.03374.
    """
    assert 0 <= num_correct <= num_samples and 1 <= k <= num_samples
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def mean(values: Iterable[float]) -> float | None:
    """The mean, or None of nothing."""
    listed = list(values)
    return fmean(listed) if listed else None


def _accepted(
    ranks: Sequence[Sequence[int]], counted: Sequence[Sequence[bool]], lookahead: int
) -> list[int]:
    return [
        found.num_accepted
        for text, flags in zip(ranks, counted, strict=True)
        for found in rounds([rank == 1 for rank in text], lookahead)
        if all(flags[found.start : found.start + lookahead])
    ]
