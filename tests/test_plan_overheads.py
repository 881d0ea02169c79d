"""What runs add to forwards: told from waits, measured with real processes that only sleep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from emulated import write_emulated
from processes import nothing_left_in

from pipespec.config import load_models_config
from pipespec.decoding import open_hierarchy
from pipespec.metrics import StageCounts
from pipespec.planning.overheads import (
    hop_s,
    loop_s,
    make_twins,
    measure_overheads,
    token_s,
)
from pipespec.state.counts import Counts


def counts_of(starts_s: Sequence[float], step_s: float) -> StageCounts:
    counts = Counts()
    for start_s in starts_s:
        counts.num_steps += 1
        counts.step_starts_s.append(start_s)
        counts.step_times_s.append(step_s)
        for values in (counts.query_lengths, counts.offered, counts.accepted, counts.emitted):
            values.append(0)
    return StageCounts.from_values(counts.to_values())


@pytest.mark.parametrize("wait_s", [0.2, 0.0])
def test_a_loop_takes_what_lies_between_steps_but_for_waits(wait_s: float) -> None:
    """0.2 ms after each step; the other stage is waited for now and then, noted or not."""
    starts, now = [], 0.0
    for step in range(100):
        starts.append(now)
        now += 0.0012 + (0.02 if step % 10 == 4 else 0.0)
    found = loop_s(replace(counts_of(starts, 0.001), wait_s=wait_s))
    assert found == pytest.approx(0.0002, rel=0.05)


def test_one_step_tells_nothing_of_a_loop() -> None:
    assert loop_s(counts_of([1.0], 0.001)) == 0.0


def test_a_hop_is_the_mean_of_both_ways() -> None:
    """The draft steps for 1 ms; 2 ms to the target, which steps for 1 ms; 4 ms back."""
    draft = counts_of([0.008 * n for n in range(10)], 0.001)
    target = counts_of([0.008 * n + 0.003 for n in range(10)], 0.001)
    assert hop_s(draft, target) == pytest.approx(0.003)


def test_what_reading_a_draft_takes_is_told_from_the_verifiers_longer_loop() -> None:
    draft = replace(counts_of([0.001 * n for n in range(50)], 0.0008), num_drafted=50)
    target = counts_of([0.010 * n for n in range(5)], 0.0093)
    assert token_s(draft, target) == pytest.approx(0.0005 / 10)


def test_twins_take_the_models_times_and_agree_as_they_do(tmp_path: Path) -> None:
    hierarchy = open_hierarchy(load_models_config(Path(write_emulated(tmp_path, 3))))
    twins = make_twins(hierarchy, [0.5, 1.5, 4.0], [0.6, 0.9])
    assert [model.emulated for model in twins.models] == [
        {"step_ms": {"1": 0.5}, "agreement": 0.6},
        {"step_ms": {"1": 1.5}, "agreement": 0.9},
        {"step_ms": {"1": 4.0}},
    ]
    assert twins.placements == hierarchy.placements and twins.eos == ()


def test_every_strategy_is_measured_with_real_processes(tmp_path: Path) -> None:
    hierarchy = open_hierarchy(load_models_config(Path(write_emulated(tmp_path, 3))))
    with nothing_left_in(tmp_path):
        found = measure_overheads(
            hierarchy,
            [0.5, 1.0, 4.0],
            [0.6, 0.9],
            (100, 101, 102),
            transport="ipc",
            ready_timeout_s=60.0,
        )
    for seconds in (found.greedy_s, found.chain_s):
        assert 0.0 < seconds < 0.05
    for seconds in (found.async_s, found.send_s, found.token_s, found.latency_s):
        assert 0.0 <= seconds < 0.05, "nothing where a busy machine's waits hide it"
