"""Emulated models: easy and hard stretches, nested agreement, second and further choices, all of
them functions of the prefix alone."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import groupby
from typing import Any

import pytest

from pipespec.emulation import Oracle, Stretches, parse_emulation
from pipespec.errors import ConfigError
from pipespec.hashing import extend, hash_tokens

STRETCHES = Stretches(easy=30.0, hard=6.0)
VOCAB_SIZE = 4096
INSTANT = {"step_ms": {"1": 0}}


def draft(agreement: float = 0.95, hard_agreement: float = 0.7, **values: Any) -> Oracle:
    return Oracle(
        agreement, VOCAB_SIZE, hard_agreement=hard_agreement, stretches=STRETCHES, **values
    )


def prefixes(oracle: Oracle, count: int, prompt: int = 0) -> list[int]:
    """Hashes along the target's own text."""
    found = [hash_tokens((prompt,))]
    while len(found) < count:
        found.append(extend(found[-1], oracle.target(found[-1])))
    return found


def share(flags: list[bool]) -> float:
    return sum(flags) / len(flags)


# Stretches


def test_stretches_last_as_long_as_their_mean_lengths_say() -> None:
    """Of some 330 stretches of each kind, within 20 percent: over three standard errors."""
    oracle = draft()
    runs = [
        (hard, len(list(run)))
        for hard, run in groupby(map(oracle.is_hard, prefixes(oracle, 12_000)))
    ]
    for hard, expected in ((False, 30.0), (True, 6.0)):
        lengths = [length for kind, length in runs if kind == hard]
        assert sum(lengths) / len(lengths) == pytest.approx(expected, rel=0.2)


def test_texts_begin_in_a_hard_stretch_as_often_as_they_are_in_one() -> None:
    oracle = draft()
    starts = [oracle.is_hard(hash_tokens((prompt,))) for prompt in range(2000)]
    assert share(starts) == pytest.approx(6 / 36, abs=4 * math.sqrt(6 / 36 * 30 / 36 / 2000))


def test_a_draft_agrees_less_often_in_hard_stretches() -> None:
    oracle = draft(0.95, 0.7)
    at = prefixes(oracle, 6000)
    for hard, agreement in ((False, 0.95), (True, 0.7)):
        agrees = [oracle.agrees(prefix) for prefix in at if oracle.is_hard(prefix) == hard]
        error = math.sqrt(agreement * (1 - agreement) / len(agrees))
        assert share(agrees) == pytest.approx(agreement, abs=4 * error)


def test_a_wrong_token_neither_ends_nor_begins_a_hard_stretch() -> None:
    """The passage is as hard after the draft's word as after the target's."""
    oracle = draft(0.0, 0.0)
    at = prefixes(oracle, 1000)
    for prefix in at:
        right, wrong = oracle.target(prefix), oracle.draw(prefix)
        assert right != wrong
        assert oracle.is_hard(extend(prefix, right)) == oracle.is_hard(extend(prefix, wrong))


def test_a_wrong_token_derails_what_follows_although_the_stretch_goes_on() -> None:
    oracle = draft(1.0, 1.0)
    prefix = hash_tokens((1, 2, 3))
    wrong = (oracle.target(prefix) + 1) % VOCAB_SIZE
    one, other = extend(prefix, oracle.target(prefix)), extend(prefix, wrong)
    same = 0
    for _ in range(100):
        same += oracle.draw(one) == oracle.draw(other)
        one, other = extend(one, oracle.draw(one)), extend(other, oracle.draw(other))
    assert same < 3


def test_where_a_worse_draft_is_right_a_better_one_is_right_in_either_kind_of_stretch() -> None:
    worse, better = draft(0.9, 0.6, own=1), draft(0.96, 0.7, own=2)
    at = prefixes(worse, 2000)
    assert all(better.draw(n) == worse.draw(n) for n in at if worse.agrees(n))
    assert any(better.agrees(n) and not worse.agrees(n) for n in at)


def test_stages_with_different_agreement_see_the_same_text_and_stretches() -> None:
    at = prefixes(draft(0.5, 0.1, own=1), 300)
    assert at == prefixes(draft(1.0, 1.0), 300)


# Ranks


@pytest.mark.parametrize("exponent", [0.5, 0.86, 2.0])
def test_among_its_first_choices_a_wrong_draft_has_the_targets_token_as_the_law_says(
    exponent: float,
) -> None:
    oracle = draft(0.0, 0.0, rank_exponent=exponent)
    at = prefixes(oracle, 1500)
    for num_choices in (2, 3, 8):
        found = [oracle.target(n) in oracle.ranked(n, num_choices) for n in at]
        expected = 1.0 - num_choices**-exponent
        error = math.sqrt(expected * (1 - expected) / len(at))
        assert share(found) == pytest.approx(expected, abs=4 * error)


@pytest.mark.parametrize("second_share", [0.1, 0.45, 0.9])
def test_with_another_share_of_second_choices_the_ranks_below_keep_their_proportions(
    second_share: float,
) -> None:
    law = draft(0.0, 0.0)
    oracle = replace(law, second_share=second_share)
    at = prefixes(oracle, 3000)
    ranks = [oracle.rank(n) or VOCAB_SIZE for n in at]
    error = math.sqrt(second_share * (1 - second_share) / len(at))
    assert share([rank == 2 for rank in ranks]) == pytest.approx(second_share, abs=4 * error)
    below = [rank for rank in ranks if rank > 2]
    for most in (3, 8):
        expected = 1.0 - (most / 2) ** -law.rank_exponent
        error = math.sqrt(expected * (1 - expected) / len(below))
        assert share([rank <= most for rank in below]) == pytest.approx(expected, abs=4 * error)


def test_all_or_none_may_be_second_choices() -> None:
    at = prefixes(draft(0.0, 0.0), 200)
    always = replace(draft(0.0, 0.0), second_share=1.0)
    assert {always.rank(n) for n in at} == {2}
    never = replace(draft(0.0, 0.0, rank_exponent=0.0), second_share=0.0)
    assert {never.rank(n) for n in at} == {None}


def test_the_default_law_gives_what_was_measured_on_the_demo_family() -> None:
    """Given a mismatch, the target's token is among the first 2, 3, 4, 8 choices in 0.44 to 0.46,
    0.61 to 0.64, 0.70 and 0.82 to 0.84 of cases."""
    exponent = Oracle(0.5, VOCAB_SIZE).rank_exponent
    shares = [1.0 - n**-exponent for n in (2, 3, 4, 8)]
    assert shares == pytest.approx([0.45, 0.62, 0.70, 0.83], abs=0.015)


def test_the_first_choice_is_the_draw_and_all_choices_differ() -> None:
    oracle = draft(0.6, 0.3)
    for prefix in prefixes(oracle, 500):
        choices = oracle.ranked(prefix, 8)
        assert choices[0] == oracle.draw(prefix)
        assert len(set(choices)) == 8
        assert oracle.ranked(prefix, 3) == choices[:3]
        rank = oracle.rank(prefix)
        if rank is not None and rank <= 8:
            assert choices[rank - 1] == oracle.target(prefix)


def test_with_an_exponent_of_zero_no_other_choice_is_the_targets() -> None:
    oracle = draft(0.0, 0.0, rank_exponent=0.0)
    for prefix in prefixes(oracle, 200):
        assert oracle.rank(prefix) is None
        assert oracle.target(prefix) not in oracle.ranked(prefix, 16)


def test_a_small_vocabulary_is_ranked_without_repeating_an_id() -> None:
    oracle = Oracle(0.5, 4, eos=0, eos_after=9)
    for prefix in range(300):
        assert sorted(oracle.ranked(prefix, 3)) in ([1, 2, 3], [1, 2], [1, 3], [2, 3])
        assert 0 in oracle.ranked(prefix, 4, position=9)[:1] or not oracle.agrees(prefix)


# Configs


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"agreement": {"easy": 0.9, "hard": 0.5}}, 'it needs "stretches" too'),
        ({"stretches": {"easy": 0.5, "hard": 3}}, '"stretches.easy": 0.5; it must be a number'),
        ({"stretches": {"easy": 30}}, "\"stretches\": {'easy': 30}; it must be an object"),
        ({"stretches": 3}, '"stretches": 3; it must be an object'),
        (
            {"stretches": {"easy": 9, "hard": 3}, "agreement": {"easy": 2, "hard": 0}},
            '"agreement.easy": 2',
        ),
        ({"rank_exponent": -1}, '"rank_exponent": -1; it must be a number from 0'),
        ({"second_share": 1.5}, '"second_share": 1.5; it must be a number from 0 to 1'),
        ({"source": 3}, '"source": 3; it must be a text'),
    ],
)
def test_a_wrong_value_is_told_with_model_and_key(values: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=r"^draft: ") as caught:
        parse_emulation(INSTANT | values, "draft")
    assert told in str(caught.value)


def test_one_agreement_holds_in_both_kinds_of_stretch() -> None:
    values = INSTANT | {"stretches": {"easy": 9, "hard": 3}, "agreement": 0.8}
    emulation = parse_emulation(values, "draft")
    assert emulation.agreement == (0.8, 0.8)
    oracle = emulation.oracle(100, "draft")
    assert (oracle.agreement, oracle.hard_agreement) == (0.8, 0.8)
