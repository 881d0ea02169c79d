"""From a first draft's steps to its runner: the same drafts, whoever begins each forward."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest

from pipespec.config import SamplingParams
from pipespec.forwards import forward_step
from pipespec.hashing import hash_tokens
from pipespec.messages import Draft, Message, Submit, Verdict
from pipespec.runners.base import BurstRow, BurstRunner, Row, RunnerInfo, TreeRow
from pipespec.state import RequestState, Role, Step
from pipespec.state.beside import offers_beside
from pipespec.state.outcomes import Budget
from tests.test_runners_llama import (  # noqa: F401
    GREEDY,
    VOCAB_SIZE,
    Make,
    make_fixture,
    native,
    random_ids,
)
from tests.tiny import one_thread  # noqa: F401

PROMPT = tuple(random_ids(9))
LENGTH = 200  # of the context
RUN_AHEAD, BUDGET = 16, Budget(num_ranked=3, length=6, num_feeds=6, num_rows=120)


class OneByOne:
    """A runner that is asked for every forward of a burst."""

    def __init__(self, runner: BurstRunner) -> None:
        self._runner = runner

    @property
    def info(self) -> RunnerInfo:
        return replace(self._runner.info, has_bursts=False)

    def forward(self, rows: Sequence[Row]) -> list[list[int]]:
        return self._runner.forward(rows)

    def forward_tree(self, row: TreeRow) -> list[tuple[int, ...]]:
        return self._runner.forward_tree(row)

    def release(self, slot: int) -> None:
        self._runner.release(slot)

    def close(self) -> None:
        self._runner.close()


class Counted(OneByOne):
    """A runner that goes on by itself, and how many forwards each call brought. readable: a
    descriptor that stops it, now and then."""

    def __init__(self, runner: BurstRunner, readable: int | None = None) -> None:
        super().__init__(runner)
        self.brought: list[int] = []
        self._readable = readable
        self._choice = random.Random(0)

    @property
    def info(self) -> RunnerInfo:
        return self._runner.info

    def forward_burst(self, burst: BurstRow) -> list[list[tuple[int, ...]]]:
        if self._readable is not None and self._choice.random() < 0.5:
            burst = replace(burst, descriptors=[self._readable])
        draws = self._runner.forward_burst(burst)
        self.brought.append(len(draws))
        return draws


@pytest.fixture(name="readable")
def readable_fixture() -> Iterator[int]:
    """A descriptor that can be read for ever, though no frame is there."""
    reader, writer = os.pipe()
    os.write(writer, b"!")
    yield reader
    os.close(reader)
    os.close(writer)


def drafted(
    runner: OneByOne,
    seed: int,
    sampling: SamplingParams = GREEDY,
) -> list[Message]:
    """What a first draft sends in 60 steps, to verdicts that are as often foreseen as not."""
    choice = random.Random(seed)
    submit = Submit(1, PROMPT, (), sampling, 500, (), ())
    role = Role(0, 2, RUN_AHEAD, 0, outcomes=BUDGET, context_length=LENGTH)
    state, sent = RequestState(submit, role, lambda _token: ""), list[Message]()
    for _ in range(60):
        role.batch = choice.randint(1, 5)
        if state.can_step or state.can_prepare:
            extras = [extra for _, extra in offers_beside(state, 0)]
            extras = extras[: choice.randint(0, len(extras))]
            takes_own = choice.random() < 0.8
            step = state.begin_step(0, extras, takes_own=takes_own)
            if step is not None:
                sent += run(state, runner, step, sampling)
        if choice.random() < 0.25 and not state.is_prefill:
            sent += answer(state, choice)
    return sent


def run(
    state: RequestState,
    runner: OneByOne,
    step: Step,
    sampling: SamplingParams,
) -> list[Message]:
    """The forwards of a step, as a stage's loop asks for them."""
    following: Step | None = step
    while following is not None:
        *others, draws = forward_step(runner, 0, sampling, following, 1 + BUDGET.num_ranked)
        for earlier in others:
            assert state.draw_on(earlier) is not None
        following = state.draw_on(draws)
    return [message for _, message in state.end_step(draws, 0.0, 1.0)]


def answer(state: RequestState, choice: random.Random) -> list[Message]:
    """The next stage accepts some tokens, and sets another one right if it does not accept all."""
    num_accepted = choice.randint(0, len(state.seq) - state.acked)
    end = state.acked + num_accepted
    tokens = state.seq[state.acked : end]
    cases = [branch for branch in state.outcomes.branches.values() if branch.position == end]
    if cases and choice.random() < 0.7:
        tokens = [*tokens, choice.choice(cases).tokens[0]]
    elif end < len(state.seq):
        tokens = [*tokens, choice.randrange(VOCAB_SIZE)]
    verdict = Verdict(1, state.verdict_seen + 1, state.acked, tuple(tokens), False)
    return [message for _, message in state.on_verdict(verdict)]


@pytest.mark.parametrize(
    ("sampling", "seed"),
    [
        *((GREEDY, seed) for seed in range(4)),
        (SamplingParams(temperature=0.7, seed=5), 0),
        (SamplingParams(temperature=0.7, top_k=3, seed=5), 0),
    ],
)
def test_what_is_drafted_does_not_depend_on_who_goes_on(
    make: Make, seed: int, sampling: SamplingParams, readable: int
) -> None:
    print(f"seed {seed}")
    folder = make("llama", max_position_embeddings=LENGTH)
    expected = drafted(OneByOne(native(folder)), seed, sampling)
    assert sum(isinstance(message, Draft) for message in expected) > 8
    alone, interrupted = Counted(native(folder)), Counted(native(folder), readable)
    assert drafted(alone, seed, sampling) == expected
    assert drafted(interrupted, seed, sampling) == expected
    assert max(alone.brought) == (1 if sampling.top_k else 5), "who drops tokens goes one by one"
    assert len(interrupted.brought) >= len(alone.brought)


def test_a_draft_in_bursts_is_what_its_model_writes(make: Make) -> None:
    folder = make("llama", max_position_embeddings=LENGTH)
    messages = drafted(Counted(native(folder)), 0)
    sent = [message for message in messages if isinstance(message, Draft)]
    alone = native(folder)
    first = next(message for message in sent if message.num_own)
    assert first.parent == hash_tokens(PROMPT)
    text = [*PROMPT, *first.tokens[: first.num_own]]
    draws = alone.forward([Row(0, 0, text, first.num_own + 1, GREEDY)])[0]
    assert draws[:-1] == text[len(PROMPT) :]
