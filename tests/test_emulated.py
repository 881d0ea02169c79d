"""The emulated runner: tokens are a function of the prefix, drafts agree as often as they should,
and what a config says wrongly is told by the key's name.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from typing import Any

import pytest
from processes import run_python

from pipespec.config import SamplingParams
from pipespec.emulation import parse_emulation
from pipespec.errors import ConfigError, PipeSpecError
from pipespec.runners.base import ModelRunner, Row
from pipespec.runners.emulated import EmulatedRunner

VOCAB_SIZE = 50
INSTANT = {"step_ms": {"1": 0}}


def runner(name: str = "model", vocab_size: int = VOCAB_SIZE, **values: Any) -> EmulatedRunner:
    return EmulatedRunner(INSTANT | values, name=name, vocab_size=vocab_size)


def feed(
    model: EmulatedRunner, ids: Sequence[int], start: int = 0, slot: int = 0, **sampling: Any
) -> list[int]:
    """The draws after every one of `ids`."""
    return model.forward([Row(slot, start, ids, len(ids), SamplingParams(**sampling))])[0]


def random_ids(count: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(1, VOCAB_SIZE), k=count)


def agreement_of(one: Sequence[int], other: Sequence[int]) -> float:
    return sum(a == b for a, b in zip(one, other, strict=True)) / len(one)


# Tokens


def test_it_is_a_model_runner_with_nothing_in_memory() -> None:
    model = runner(context_length=99)
    assert isinstance(model, ModelRunner)
    info = model.info
    assert (info.runner, info.vocab_size, info.context_length) == ("emulated", VOCAB_SIZE, 99)
    assert (info.num_parameters, info.weight_bytes) == (0, 0)


@pytest.mark.parametrize("agreement", [None, 0.5])
def test_tokens_are_a_function_of_the_prefix_however_it_was_fed(agreement: float | None) -> None:
    """Rolled back, extended and interleaved at random, a slot says what a fresh one says."""
    choice, model = random.Random(1), runner(agreement=agreement)
    held: dict[int, list[int]] = {0: [], 1: []}
    for _ in range(200):
        slot = choice.randrange(2)
        start = choice.choice([len(held[slot]), choice.randint(0, len(held[slot]))])
        new = random_ids(choice.randint(1, 17), seed=choice.randrange(10))
        draws = feed(model, new, start=start, slot=slot)
        held[slot] = held[slot][:start] + new
        assert draws == feed(runner(agreement=agreement), held[slot])[start:]


def test_only_as_many_draws_are_returned_as_were_asked_for() -> None:
    ids, model = random_ids(10), runner()
    assert model.forward([Row(0, 0, ids, 3, SamplingParams())])[0] == feed(runner(), ids)[-3:]


def test_a_wrong_token_derails_all_that_follows() -> None:
    """A function of the position alone would go on as if nothing had happened."""
    right, wrong = random_ids(400), random_ids(400)
    wrong[5] += 1
    one, other = feed(runner(), right), feed(runner(), wrong)
    assert one[:5] == other[:5]
    assert agreement_of(one[5:], other[5:]) < 3 / VOCAB_SIZE


def test_sampling_parameters_change_nothing() -> None:
    ids = random_ids(50)
    assert feed(runner(), ids) == feed(runner(), ids, temperature=2.0, seed=9, top_k=3)


def test_the_seed_and_nothing_of_the_model_chooses_the_targets_tokens() -> None:
    ids = random_ids(300)
    assert feed(runner("one"), ids) == feed(runner("other", step_ms={"3": 0}), ids)
    assert agreement_of(feed(runner(), ids), feed(runner(seed=1), ids)) < 0.1


@pytest.mark.parametrize("agreement", [0.0, 0.3, 0.8, 1.0])
def test_a_draft_agrees_as_often_as_its_config_says(agreement: float) -> None:
    """Over 4000 prefixes, within four standard errors."""
    ids = random_ids(4000)
    rate = agreement_of(feed(runner("target"), ids), feed(runner("d", agreement=agreement), ids))
    assert rate == pytest.approx(
        agreement, abs=4 * math.sqrt(agreement * (1 - agreement) / 4000) + 1e-9
    )


def test_where_a_worse_draft_is_right_a_better_one_is_right_too() -> None:
    ids = random_ids(1000)
    target = feed(runner("target"), ids)
    worse, better = (feed(runner(str(x), agreement=x), ids) for x in (0.4, 0.7))
    assert all(b == t for t, w, b in zip(target, worse, better, strict=True) if w == t)


def test_two_drafts_that_are_wrong_are_wrong_in_their_own_ways() -> None:
    ids = random_ids(1000)
    one, other = (feed(runner(name, agreement=0.0), ids) for name in ("one", "other"))
    assert agreement_of(one, other) < 0.1


def test_all_ids_but_the_last_token_are_drawn_about_equally_often() -> None:
    draws = feed(runner(vocab_size=5, eos_token_id=2), [1, 3, 4] * 2000)
    counts = [draws.count(token) for token in range(5)]
    assert counts[2] == 0
    assert all(abs(count - 1500) < 4 * math.sqrt(1500) for count in counts[:2] + counts[3:])


@pytest.mark.parametrize("eos_token_id", [0, 7, VOCAB_SIZE - 1])
@pytest.mark.parametrize("agreement", [None, 0.0])
def test_the_text_ends_where_the_config_says(agreement: float | None, eos_token_id: int) -> None:
    """A draft that is always wrong misses the end, and never ends the text elsewhere."""
    model = runner(eos_after=20, eos_token_id=eos_token_id, agreement=agreement)
    draws = feed(model, [1] * 40)  # draw n chooses the token at position n + 1
    ends = [at + 1 for at, token in enumerate(draws) if token == eos_token_id]
    assert ends == ([20] if agreement is None else [])


def test_a_position_beyond_the_context_is_refused() -> None:
    model = runner(context_length=10)
    feed(model, [1] * 10)
    with pytest.raises(PipeSpecError, match=r"^model: position 10 is beyond the context of 10"):
        feed(model, [1], start=10)


def test_a_released_slot_is_empty() -> None:
    model = runner()
    feed(model, [1, 2, 3])
    model.release(0)
    with pytest.raises(AssertionError):
        feed(model, [4], start=3)
    model.close()
    model.close()


# Time


@pytest.mark.parametrize(
    ("num_tokens", "milliseconds"),
    [(1, 100.0), (2, 120.0), (3, 140.0), (5, 170.0), (7, 200.0), (8, 200.5), (107, 250.0)],
)
def test_a_forward_takes_what_the_table_says(num_tokens: int, milliseconds: float) -> None:
    """Linear between entries, whatever their order; beyond the last, so much for each token."""
    table = {"7": 200, "1": 100, "3": 140.0}
    emulation = parse_emulation({"step_ms": table, "prefill_ms_per_token": 0.5}, "model")
    assert emulation.forward_s(num_tokens) == pytest.approx(milliseconds / 1e3)


def test_outside_its_entries_the_table_is_flat() -> None:
    emulation = parse_emulation({"step_ms": {"4": 30, "8": 50}}, "model")
    assert [emulation.forward_s(n) for n in (1, 4, 8, 9, 5000)] == [0.03, 0.03, 0.05, 0.05, 0.05]


def test_a_forward_really_waits_for_all_its_rows_together() -> None:
    """A sleep never ends early; the runner may aim 1 ms early for those that end late."""
    model = runner(step_ms={"1": 5, "4": 40})
    rows = [Row(slot, 0, [1, 2], 1, SamplingParams()) for slot in range(2)]
    start_s = time.perf_counter()
    model.forward(rows)
    assert time.perf_counter() - start_s >= 0.039


# Configs


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"step_ms": None}, '"step_ms", an object'),
        ({"step_ms": {}}, '"step_ms", an object'),
        ({"step_ms": 5}, '"step_ms", an object'),
        ({"step_ms": {"one": 5}}, "'one' is not a number of tokens"),
        ({"step_ms": {"0": 5}}, "'0' is not a number of tokens"),
        ({"step_ms": {"01": 5}}, "'01' is not a number of tokens"),
        ({"step_ms": {"1": "5"}}, "'5' is not a number of milliseconds"),
        ({"step_ms": {"1": True}}, "True is not a number of milliseconds"),
        ({"step_ms": {"1": -1}}, "-1 is out of range"),
        ({"step_ms": {"1": math.nan}}, "nan is out of range"),
        ({"latency": 3}, 'unknown key "latency"'),
        ({"agreement": 1.5}, '"agreement": 1.5; it must be a number from 0 to 1'),
        ({"agreement": math.nan}, '"agreement": nan'),
        ({"agreement": "high"}, "\"agreement\": 'high'"),
        ({"prefill_ms_per_token": -1}, '"prefill_ms_per_token": -1'),
        ({"vocab_size": 2}, '"vocab_size": 2; it must be an integer from 3'),
        ({"vocab_size": 10.0}, '"vocab_size": 10.0; it must be an integer'),
        ({"context_length": 0}, '"context_length": 0'),
        ({"seed": True}, '"seed": True'),
        ({"seed": -1}, '"seed": -1'),
        ({"eos_after": 0}, '"eos_after": 0'),
        ({"eos_token_id": VOCAB_SIZE}, '"eos_token_id" among them, not 50 of 50'),
    ],
)
def test_a_wrong_value_is_told_in_one_line_with_model_and_key(
    values: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        EmulatedRunner(INSTANT | values, name="draft-7B", vocab_size=VOCAB_SIZE)
    message = str(caught.value)
    assert message.startswith("draft-7B: ")
    assert told in message
    assert "\n" not in message


def test_without_a_table_the_key_is_named() -> None:
    with pytest.raises(ConfigError, match=r'^model: "emulated" needs "step_ms"'):
        EmulatedRunner({}, name="model", vocab_size=VOCAB_SIZE)


def test_it_needs_no_torch() -> None:
    code = """
import sys
from pathlib import Path
from pipespec.config import ModelConfig, SamplingParams
from pipespec.placement import StagePlacement
from pipespec.runners.base import Row
from pipespec.runners.factory import load_runner
model = ModelConfig("emulated", ("cpu",), emulated={"step_ms": {"1": 0}})
runner = load_runner(model, StagePlacement("cpu"), None, 100)
runner.forward([Row(0, 0, [1, 2], 2, SamplingParams(temperature=1.0))])
print(runner.info.runner, sorted({"torch", "transformers", "numpy"} & set(sys.modules)))
"""
    run = run_python(code)
    assert run.stdout.strip() == "emulated []", run.stderr
