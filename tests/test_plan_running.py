"""What runs add to forwards alone: told from waits, measured with real processes that sleep."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

import pytest
from emulated import write_emulated
from processes import nothing_left_in

from pipespec.config import GenerationParams, load_models_config
from pipespec.decoding import open_hierarchy
from pipespec.metrics import StageCounts
from pipespec.planning import running
from pipespec.planning.running import Runs, loop_s, turn_s
from pipespec.planning.system import PlanModel
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
    assert turn_s(draft, target) == pytest.approx(0.003)


def test_forwards_of_one_step_have_no_loop_between_them() -> None:
    """Bursts of three forwards of 1 ms, 0.5 ms apart."""
    starts = [0.0035 * burst + 0.001 * n for burst in range(20) for n in range(3)]
    assert loop_s(counts_of(starts, 0.001)) == pytest.approx(0.0005)


def test_a_hop_is_not_taken_from_stages_that_happen_to_overlap() -> None:
    """The draft starts 1 ms after each verdict; the target goes on at once, without a candidate,
    and ends after the draft."""
    draft = counts_of([0.011 * n + 0.011 for n in range(10)], 0.004)
    target = counts_of([0.011 * n + 0.0005 for n in range(10)], 0.0095)
    assert turn_s(draft, target) == pytest.approx(0.0005)


class HalfTimes:
    """Times alone that are half of what an emulated model's steps take."""

    def __init__(self, step_ms: float) -> None:
        self.step_s = step_ms / 1e3

    def forward_s(self, num_tokens: int, context: int, *, prepares: bool = False) -> float:
        return self.step_s / 2


@pytest.mark.alone
def test_every_strategy_is_measured_where_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All models take twice as long in a run as they are said to take alone."""
    monkeypatch.setattr(running, "_ENOUGH_S", 0.3)
    steps_ms = (2.0, 4.0, 8.0)
    config = write_emulated(tmp_path, 3, target_ms=8.0)
    values = json.loads(Path(config).read_text())
    for value, step_ms in zip(values, steps_ms):
        value["emulated"]["step_ms"] = {"1": step_ms}
    Path(config).write_text(json.dumps(values))
    runs = Runs(
        open_hierarchy(load_models_config(Path(config))),
        [PlanModel("any", HalfTimes(ms), HalfTimes(ms)) for ms in steps_ms],
        [(100, 101, 102)],
        GenerationParams(24),
        "ipc",
        60.0,
    )
    with nothing_left_in(tmp_path):
        found = [runs.greedy(), *runs.chain(), *runs.pipeline((0, 2), 4)]
        hop_s = runs.hop_s()
    assert len(found) == 1 + 3 + 2
    assert median(cost.slow_down for cost in found) < 3.0, "more only where it was disturbed"
    for cost in found:
        assert cost.slow_down > 1.9
        assert 0.0 < cost.loop_s < 0.05
    assert 0.0 < hop_s < 0.05
