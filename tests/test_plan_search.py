"""The search: what it finds best is best, and it finds the same every time."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from pipespec.config import ModelConfig, SamplingParams, Schedule
from pipespec.errors import DataError
from pipespec.messages import Submit
from pipespec.planning.devices import allocations, one_more, read_target_times
from pipespec.planning.search import Ranking, all_subsets, sample, search, useless_stages
from pipespec.planning.system import (
    Choice,
    Cost,
    Overheads,
    StageCost,
    System,
    emulated_system,
)
from pipespec.planning.times import EmulatedTimes, MeasuredTimes, Times, interpolate

VOCAB_SIZE = 300


def submits(num_texts: int = 2, num_tokens: int = 60) -> list[Submit]:
    return [
        Submit(n, (5, 6, n), (), SamplingParams(), num_tokens, (), ()) for n in range(num_texts)
    ]


def model(name: str, step_ms: float, **values: Any) -> ModelConfig:
    emulated = {"step_ms": {"1": step_ms}, **values}
    return ModelConfig(f"emulated/{name}", ("cpu",), emulated=emulated)


def system_of(*models: ModelConfig, num_texts: int = 2, num_tokens: int = 60) -> System:
    return emulated_system(models, submits(num_texts, num_tokens), VOCAB_SIZE)


TARGET = model("target", 20.0)


# Searched once, looked at by several tests. The draft can branch: its long forwards cost nothing.
@cache
def pair() -> System:
    return system_of(model("draft", 2.0, agreement=0.7), TARGET, num_tokens=40)


@cache
def pair_ranking() -> Ranking:
    return search(pair())


@cache
def trio_ranking() -> Ranking:
    good, hopeless = model("good", 1.0, agreement=0.9), model("hopeless", 1.0, agreement=0.0)
    return search(system_of(good, hopeless, TARGET, num_tokens=16))


def test_a_good_draft_is_used_and_a_hopeless_one_is_not() -> None:
    ranking = trio_ranking()
    assert ranking.best.choice.stages == (0, 2)
    assert ranking.best.tokens_per_s > 2 * ranking.greedy.tokens_per_s
    (useless,) = useless_stages(ranking)
    assert useless.stage == 1 and useless.gain > 0.0


def test_where_no_draft_pays_greedy_is_best_and_every_draft_is_named() -> None:
    ranking = search(system_of(model("slow", 19.0, agreement=0.05), TARGET))
    assert ranking.best.choice == Choice((1,), "greedy")
    assert ranking.best.tokens_per_s == pytest.approx(50.0, rel=0.01)
    assert [item.stage for item in useless_stages(ranking)] == [0]


def test_every_subset_is_ranked_in_every_strategy_best_first() -> None:
    ranking = trio_ranking()
    rows = ranking.best_of_each()
    found = {(plan.choice.stages, plan.choice.strategy) for plan in rows}
    subsets = [(0, 2), (1, 2), (0, 1, 2)]
    assert found == {(s, kind) for s in subsets for kind in ("chain", "async-chain")} | {
        ((2,), "greedy")
    }
    speeds = [plan.tokens_per_s for plan in ranking.plans]
    assert speeds == sorted(speeds, reverse=True)


def test_drafts_are_ordered_by_their_step_times_whatever_the_config_says() -> None:
    system = system_of(model("slow", 5.0), model("fast", 1.0), TARGET)
    assert all_subsets(system) == [(2,), (1, 2), (0, 2), (1, 0, 2)]


def test_the_same_ranking_comes_out_every_time() -> None:
    one, other = pair_ranking(), search(pair())
    assert [p.choice for p in one.plans] == [p.choice for p in other.plans]
    assert [p.tokens_per_s for p in one.plans] == [p.tokens_per_s for p in other.plans]


def test_the_best_chain_lookahead_is_the_one_that_simulating_all_of_them_finds() -> None:
    by_hand = {
        count: pair().predict(Choice((0, 1), "chain", Schedule(lookahead=count))).tokens_per_s
        for count in range(1, 17)
    }
    found = next(p for p in pair_ranking().best_of_each() if p.choice.strategy == "chain")
    assert found.tokens_per_s >= 0.99 * max(by_hand.values())


def test_outcomes_and_trees_are_tried_where_a_draft_can_branch() -> None:
    ranking, system = pair_ranking(), pair()
    best = ranking.best.choice.schedule
    assert best.outcomes > 0
    assert ranking.best.prediction.outcome_hit_rate > 0.2
    straight = tuple(replace(item, num_tail_rows=0) for item in system.models)
    without = search(replace(system, models=straight))
    assert without.num_simulated < ranking.num_simulated
    chains = [plan.choice for plan in without.plans if plan.choice.strategy == "async-chain"]
    assert all(choice.schedule.outcomes == 0 for choice in chains)
    assert ranking.best.tokens_per_s > without.best.tokens_per_s


def test_long_looks_are_at_the_texts_themselves() -> None:
    system = system_of(model("slow", 19.0, agreement=0.05), TARGET, num_texts=4, num_tokens=50)
    ranking = search(system)
    assert (ranking.num_texts, ranking.num_tokens) == (4, 200)


@pytest.mark.parametrize(
    ("num_texts", "num_tokens", "budget", "expected"),
    [
        (2, 50, 1000, [(0, 50), (1, 50)]),
        (6, 100, 180, [(0, 60), (2, 60), (4, 60)]),
        (20, 100, 1000, [(n, 100) for n in range(0, 20, 2)]),
        (1, 5000, 1000, [(0, 1000)]),
    ],
)
def test_a_sample_is_evenly_spaced_and_about_as_long_as_asked_for(
    num_texts: int, num_tokens: int, budget: int, expected: list[tuple[int, int]]
) -> None:
    chosen = sample(submits(num_texts, num_tokens), budget)
    assert [(item.request, item.max_new_tokens) for item in chosen] == expected


# Costs


def test_each_kind_of_cost_counts_more_than_the_one_before() -> None:
    cost = StageCost(slow_down=2.0, loop_s=1e-3)
    system = replace(
        system_of(model("a", 2.0, agreement=0.8), TARGET),
        overheads=Overheads(cost, (cost, cost), {(0, 1): {0: (cost, cost)}}, hop_s=1e-3),
        slow_downs=((1.0, 1.5), (1.2, 1.0)),
    )
    choice = Choice((0, 1), "async-chain")
    speeds = [system.predict(choice, cost=cost).tokens_per_s for cost in Cost]
    assert speeds == sorted(speeds, reverse=True) and len(set(speeds)) == len(Cost)


def test_two_stages_on_one_core_that_always_compute_take_twice_as_long() -> None:
    """A draft that is always busy: run-ahead is long, its step short enough."""
    draft = model("a", 20.0, agreement=1.0)
    system = replace(system_of(draft, TARGET), slow_downs=((1.0, 2.0), (2.0, 1.0)))
    choice = Choice((0, 1), "async-chain", Schedule("pipespec", 0))
    alone = system.predict(choice, cost=Cost.IDEAL).tokens_per_s
    assert alone == pytest.approx(50.0, rel=0.1)
    together = system.predict(choice, cost=Cost.SHARED)
    assert together.tokens_per_s == pytest.approx(25.0, rel=0.15)


def test_greedy_and_chain_pay_for_no_neighbour() -> None:
    system = replace(
        system_of(model("a", 2.0, agreement=0.8), TARGET), slow_downs=((1.0, 9.0), (9.0, 1.0))
    )
    for choice in (Choice((1,), "greedy"), Choice((0, 1), "chain", Schedule(lookahead=4))):
        ideal, shared = (system.predict(choice, cost=c) for c in (Cost.IDEAL, Cost.SHARED))
        assert ideal.total_s == shared.total_s


def test_what_a_loop_takes_is_not_counted_as_a_forward() -> None:
    overheads = Overheads(greedy=StageCost(loop_s=5e-3))
    system = replace(system_of(TARGET), overheads=overheads)
    prediction = system.predict(Choice((0,), "greedy"))
    assert prediction.ms_per_token == pytest.approx(25.0, rel=0.01)
    assert prediction.busy_shares == (pytest.approx(0.8, rel=0.01),)


def test_costs_are_those_of_the_strategy_the_models_and_the_number_of_outcomes() -> None:
    def cost(loop_ms: float) -> StageCost:
        return StageCost(loop_s=loop_ms / 1e3)

    overheads = Overheads(
        cost(1.0),
        (cost(2.0), cost(3.0), cost(4.0)),
        {(0, 2): {0: (cost(5.0), cost(6.0)), 4: (cost(9.0), cost(8.0))}},
    )
    assert overheads.at(Choice((2,), "greedy"), 2) == cost(1.0)
    assert overheads.at(Choice((1, 2), "chain"), 1) == cost(3.0)
    pair = Choice((0, 2), "async-chain", Schedule(outcomes=1))
    assert overheads.at(pair, 0).loop_s == pytest.approx(6e-3)
    assert overheads.at(pair, 2).loop_s == pytest.approx(6.5e-3)
    assert overheads.at(Choice((1, 2), "async-chain"), 1) == StageCost()


def test_a_stage_says_what_it_drew_before_its_loop_is_done() -> None:
    """After each verdict, which rejects all, the target waits for four tokens of 2 ms and 3 ms on
    each way; its loop is in the way only where it is longer than that."""
    system = system_of(model("a", 2.0, agreement=0.0), TARGET)
    choice = Choice((0, 1), "async-chain", Schedule(lookahead=4, outcomes=0))

    def total_s(loop_s: float) -> float:
        costs = (StageCost(), StageCost(loop_s=loop_s))
        overheads = Overheads(pipelines={(0, 1): {0: costs}}, hop_s=3e-3)
        return replace(system, overheads=overheads).predict(choice).total_s

    assert total_s(12e-3) == pytest.approx(total_s(0.0), rel=0.01)
    assert total_s(40e-3) > 1.5 * total_s(0.0)


# Times


def test_tables_are_linear_between_entries_and_go_on_as_they_end() -> None:
    points = ((2, 10.0), (4, 20.0), (8, 30.0))
    found = [interpolate(points, at) for at in (1, 2, 3, 4, 6, 8, 10)]
    assert found == [10.0, 10.0, 15.0, 20.0, 25.0, 30.0, 35.0]
    assert interpolate(((1, 3.0), (5, 2.0)), 9) == 2.0
    assert interpolate(((7, 3.0),), 100) == 3.0


def test_step_times_grow_with_the_text_and_prompts_have_a_table_of_their_own() -> None:
    times = MeasuredTimes(
        decode=((100, ((1, 1.0), (8, 2.0))), (300, ((1, 3.0), (8, 4.0)))),
        prefill=((50, 20.0), (100, 40.0)),
        branching=((100, ((1, 5.0), (8, 6.0))),),
    )
    assert times.forward_s(1, 200) == pytest.approx(2e-3)
    assert times.forward_s(8, 100) == pytest.approx(2e-3)
    assert times.forward_s(75, 100) == pytest.approx(30e-3)
    assert times.forward_s(8, 100, prepares=True) == pytest.approx(6e-3)


# Devices


def emulated_times(step_ms: float) -> Times:
    from pipespec.emulation import parse_emulation

    return EmulatedTimes(parse_emulation({"step_ms": {"1": step_ms}}, "target"))


def test_a_device_more_goes_where_it_brings_more() -> None:
    draft = model("draft", 2.0, agreement=0.9)
    system = system_of(draft, model("target", 40.0))
    tables = {1: emulated_times(40.0), 2: emulated_times(36.0)}
    told: list[int] = []
    found = allocations(system, tables, 2, lambda item: told.append(item.num_devices))
    assert sorted(told) == [1, 2, 2]
    assert (found[0].num_target_devices, found[0].drafts) == (1, (0,))
    answer = one_more(found, 2)
    assert answer is not None and answer.for_target is not None and answer.for_draft is not None
    assert answer.base.num_devices == 1
    assert answer.for_draft.plan.tokens_per_s > 1.5 * answer.base.plan.tokens_per_s
    gain = answer.for_target.plan.tokens_per_s / answer.base.plan.tokens_per_s
    assert gain == pytest.approx(40 / 36, rel=0.02)


def test_with_one_device_there_is_no_other_way() -> None:
    system = system_of(model("draft", 2.0, agreement=0.9), model("target", 40.0))
    found = allocations(system, {1: emulated_times(40.0)}, 1, lambda _item: None)
    assert [item.num_devices for item in found] == [1]
    assert one_more(found, 1) is None


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "is not JSON"),
        ("[]", "must hold a JSON object"),
        ("{}", "must hold a JSON object"),
        ('{"two": {"1": 5}}', '"two" is no number of devices'),
        ('{"2": {"1": -5}}', '"2": "emulated" needs "step_ms"'),
    ],
)
def test_a_wrong_table_is_told_in_one_line(content: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "tables.json"
    path.write_text(content)
    with pytest.raises(DataError) as caught:
        read_target_times(path)
    assert told in str(caught.value) and str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_table_is_told_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"--target-step-ms: .*nowhere.json: No such file"):
        read_target_times(tmp_path / "nowhere.json")
