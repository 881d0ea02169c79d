"""What was recorded of models, simulated: the same texts, the same acceptance, burst by burst."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import pytest

from pipespec.config import GenerationParams, ModelConfig, Schedule
from pipespec.emulation import Oracle, Stretches
from pipespec.hashing import hash_tokens
from pipespec.planning.measured import measured_system, texts_of
from pipespec.planning.profile import Profile
from pipespec.planning.system import Choice, StageCost, System
from pipespec.planning.trace import (
    Draws,
    Text,
    TraceOracle,
    agreement,
    rank_shares,
    recorded_draws,
)
from pipespec.simulate.prediction import Prediction, SimModel, predict_texts

VOCAB_SIZE = 500
NUM_TOKENS = 120
STEP_MS = (1.0, 3.0, 10.0)
BURSTS = Stretches(25.0, 6.0)
DRAFT = Oracle(0.95, VOCAB_SIZE, hard_agreement=0.5, stretches=BURSTS, own=1)
MIDDLE = Oracle(0.98, VOCAB_SIZE, hard_agreement=0.7, stretches=BURSTS, own=2)
TARGET = Oracle(1.0, VOCAB_SIZE, stretches=BURSTS)


def text_of(index: int) -> Text:
    prompt = (7, 8, index)
    return Text(prompt, tuple(TARGET.continuation(prompt, NUM_TOKENS, None)))


def draws_of(oracle: Oracle, texts: Sequence[Text]) -> Draws:
    return [[tuple(oracle.ranked(prefix, 5)) for prefix in text.prefix_hashes()] for text in texts]


def profile_of(oracles: Sequence[Oracle], num_texts: int = 3) -> Profile:
    """What measuring models that draw like these would record."""
    texts = [text_of(index) for index in range(num_texts)]
    last = len(oracles) - 1
    free = asdict(StageCost())
    parts: dict[str, Any] = {"greedy": free, "in-chain": [free for _ in oracles], "hop": 0.0}
    for number, text in enumerate(texts):
        parts[f"text/{number}"] = asdict(text)
    for index, oracle in enumerate(oracles):
        table = [[10, [[1, STEP_MS[index]]]]]
        parts[f"model/{index}"] = {"decode": table, "branching": [], "prefill": []}
        parts[f"model/{index}"] |= {"context_length": 1 << 20, "num_tail_rows": 192}
        if index < last:
            parts[f"draws/{index}"] = draws_of(oracle, texts)
        for other in range(index + 1, last + 1):
            parts[f"beside/{index}/{other}"] = [1.0, 1.0]
    return Profile({}, parts)


def system_of(oracles: Sequence[Oracle]) -> System:
    models = [ModelConfig(f"model-{index}", ("cpu",)) for index in range(len(oracles))]
    return measured_system(profile_of(oracles), models, GenerationParams(), VOCAB_SIZE, ())


def directly(oracles: Sequence[Oracle], choice: Choice, system: System) -> Prediction:
    """The same prediction from the models themselves."""
    models = [
        SimModel(lambda _n, _c, ms=ms: ms / 1e3, oracle, num_tail_rows=192)  # type: ignore[misc]
        for ms, oracle in zip(STEP_MS, oracles)
    ]
    return predict_texts(
        models, choice.strategy, choice.schedule, system.submits, latency_s=0.0,
        num_warm_up_tokens=16,
    )  # fmt: skip


CHOICES = [
    Choice((0, 1), "chain", Schedule(lookahead=4)),
    Choice((0, 1), "chain"),
    Choice((0, 1), "async-chain", Schedule(outcomes=0)),
    Choice((0, 1), "async-chain", Schedule("pipespec", 0)),
    Choice((0, 1), "async-chain"),
    Choice((0, 1), "async-chain", Schedule(outcomes=2, tree=4)),
]


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_the_simulated_text_is_the_recorded_one(choice: Choice) -> None:
    system = system_of([DRAFT, TARGET])
    outputs = system.predict(choice).outputs
    assert outputs == tuple(text_of(index).tokens for index in range(3))


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_a_trace_does_what_the_model_did_that_it_was_recorded_of(choice: Choice) -> None:
    """All counts and times are equal, the hits of prepared outcomes among them: off its text, a
    draft's draws decide nothing."""
    system = system_of([DRAFT, TARGET])
    prediction = system.predict(choice)
    other = directly([DRAFT, TARGET], choice, system)
    assert prediction.stages[-1] == other.stages[-1]
    assert prediction.total_s == other.total_s
    assert prediction.outcome_hit_rate == other.outcome_hit_rate


@pytest.mark.parametrize("outcomes", [0, 4])
def test_a_trace_of_three_models_does_about_what_they_did(outcomes: int) -> None:
    """Where the middle model is wrong, nobody recorded how the draft follows it."""
    oracles, choice = (
        [DRAFT, MIDDLE, TARGET],
        Choice((0, 1, 2), "async-chain", Schedule(outcomes=outcomes)),
    )
    system = system_of(oracles)
    prediction = system.predict(choice)
    other = directly(oracles, choice, system)
    assert prediction.outputs == other.outputs
    assert prediction.total_s == pytest.approx(other.total_s, rel=0.03)
    assert prediction.outcome_hit_rate == pytest.approx(other.outcome_hit_rate or 0.0, abs=0.1)


def test_a_chain_accepts_what_a_walk_along_the_recorded_draws_accepts() -> None:
    profile, lookahead = profile_of([DRAFT, TARGET]), 4
    system = system_of([DRAFT, TARGET])
    target = system.predict(Choice((0, 1), "chain", Schedule(lookahead=lookahead))).stages[-1]
    for text, ranked, counts in zip(texts_of(profile.parts), profile.parts["draws/0"], target):
        right = [own[0] == token for own, token in zip(ranked, text.tokens)]
        walked, at = [], 1  # the first token is the prefill's
        while at < NUM_TOKENS:
            block = right[at : at + min(lookahead, NUM_TOKENS - at - 1)]
            walked.append(block.index(False) if False in block else len(block))
            at += walked[-1] + 1
        assert list(counts.accepted) == walked
        assert False in right


def test_off_its_text_a_draft_follows_the_next_larger_model_as_often_as_measured() -> None:
    larger = TraceOracle({}, VOCAB_SIZE, own=1)
    draft = TraceOracle({}, VOCAB_SIZE, larger, agreement=0.7, own=2)
    prefixes = [hash_tokens((n,)) for n in range(3000)]
    same = sum(draft.draw(prefix) == larger.draw(prefix) for prefix in prefixes)
    assert same / 3000 == pytest.approx(0.7, abs=0.03)
    assert all(0 <= draft.draw(prefix) < VOCAB_SIZE for prefix in prefixes)


def test_where_it_does_not_the_larger_models_token_has_the_measured_rank() -> None:
    larger = TraceOracle({}, VOCAB_SIZE, own=1)
    draft = TraceOracle({}, VOCAB_SIZE, larger, agreement=0.0, rank_shares=(0.5, 0.2), own=2)
    ranks = []
    for n in range(3000):
        prefix = hash_tokens((n,))
        choices = draft.ranked(prefix, 4)
        assert choices[0] == draft.draw(prefix) and len(set(choices)) == len(choices)
        wanted = larger.draw(prefix)
        ranks.append(choices.index(wanted) if wanted in choices else None)
    assert ranks.count(0) == 0
    assert ranks.count(1) / 3000 == pytest.approx(0.5, abs=0.04)
    assert ranks.count(2) / 3000 == pytest.approx(0.2, abs=0.03)


def test_agreement_and_ranks_are_counted_along_the_texts() -> None:
    draft = [[(1, 9), (2, 5), (3, 6)], [(4, 7)]]
    larger = [[(1,), (5,), (8,)], [(7,)]]
    assert agreement(draft, larger) == 0.25
    assert rank_shares(draft, larger) == [pytest.approx(2 / 3)]
    assert agreement([], []) == 1.0


def test_a_text_that_a_draft_could_read_only_in_part_is_recorded_in_part() -> None:
    text = text_of(0)
    found = recorded_draws([text], [[(5,), (6,)]])
    assert [found.get(prefix) for prefix in text.prefix_hashes()[:3]] == [(5,), (6,), None]
