"""The protocol under the simulator: random pipelines, random delays, crashes and loss.

Every seed makes a pipeline of 2 to 5 stages with 1 to 8 requests and runs it with the checks of
`pipespec.simulate.checks` after every transition. A failure prints the seed; replay it with

    python -c "from pipespec.simulate import scenario as s; s.simulate_seed(SEED, s.FAULTS)"
"""

from __future__ import annotations

from collections import Counter

import pytest

from pipespec.simulate import Faults, scenario

CAMPAIGNS = {
    "RELIABLE": (scenario.RELIABLE, 600),
    "CRASHES": (scenario.CRASHES, 200),
    "LOSSY": (scenario.LOSSY, 200),
    "EVERYTHING": (scenario.EVERYTHING, 200),
    "UNEQUAL": (scenario.UNEQUAL, 120),
}


def run_seeds(faults: Faults, seeds: range, *, perfect: bool = False) -> Counter[str]:
    counts: Counter[str] = Counter()
    for seed in seeds:
        try:
            counts += scenario.simulate_seed(seed, faults, perfect=perfect).counts
        except AssertionError as error:
            pytest.fail(f"seed {seed}: {error}")
    return counts


@pytest.mark.parametrize("name", CAMPAIGNS)
def test_every_stage_keeps_every_promise_and_the_text_is_the_targets_own(name: str) -> None:
    faults, num_seeds = CAMPAIGNS[name]
    counts = run_seeds(faults, range(num_seeds))
    assert counts["Output"] >= num_seeds


@pytest.mark.slow
@pytest.mark.parametrize("name", CAMPAIGNS)
def test_so_it_is_with_many_more_seeds(name: str) -> None:
    faults, num_seeds = CAMPAIGNS[name]
    counts = run_seeds(faults, range(num_seeds, 10 * num_seeds))
    assert counts["Output"] >= 9 * num_seeds


def test_the_seeds_meet_the_cases_that_matter() -> None:
    """Thousands of runs prove little if they never meet the hard cases."""
    counts = run_seeds(scenario.RELIABLE, range(200))
    for case in (
        "rollbacks",
        "cascading rollbacks",
        "stale draft tokens",
        "overtaken steps",
        "bonus tokens that match the run-ahead",
        "bonus tokens that differ from the run-ahead",
    ):
        assert counts[case] >= 50, f"{case}: {counts[case]} in 200 seeds"
    faulty = run_seeds(scenario.EVERYTHING, range(100))
    for case in ("crashes", "old frames", "fenced outputs", "lost at a dead stage"):
        assert faulty[case] >= 5, f"{case}: {faulty[case]} in 100 seeds"


def test_perfect_drafts_cause_no_rollback() -> None:
    counts = run_seeds(scenario.RELIABLE, range(300), perfect=True)
    assert counts["rollbacks"] == 0
    assert counts["stale draft tokens"] == 0
    assert counts["Draft"] > 1000


def test_a_seed_replays_exactly() -> None:
    first = scenario.simulate_seed(17, scenario.EVERYTHING)
    second = scenario.simulate_seed(17, scenario.EVERYTHING)
    assert first == second
