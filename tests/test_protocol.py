"""The protocol under the simulator: random pipelines, random delays, crashes and loss.

Every seed makes a pipeline of 2 to 5 stages with 1 to 8 requests and runs it with the checks of
`pipespec.simulate.checks` after every transition. A failure prints the seed; replay it with

    python -c "from pipespec.simulate import scenario as s; s.simulate_seed(SEED, s.FAULTS)"
"""

from __future__ import annotations

from collections import Counter
from functools import cache

import pytest

from pipespec.simulate import Faults, scenario

CAMPAIGNS = {
    "RELIABLE": (scenario.RELIABLE, 300),
    "CRASHES": (scenario.CRASHES, 100),
    "LOSSY": (scenario.LOSSY, 100),
    "EVERYTHING": (scenario.EVERYTHING, 100),
    "UNEQUAL": (scenario.UNEQUAL, 60),
}


def run_seeds(faults: Faults, seeds: range, *, perfect: bool = False) -> Counter[str]:
    counts: Counter[str] = Counter()
    for seed in seeds:
        try:
            counts += scenario.simulate_seed(seed, faults, perfect=perfect).counts
        except AssertionError as error:
            pytest.fail(f"seed {seed}: {error}")
    return counts


@cache
def campaign(name: str) -> Counter[str]:
    faults, num_seeds = CAMPAIGNS[name]
    return run_seeds(faults, range(num_seeds))


@pytest.mark.parametrize("name", CAMPAIGNS)
def test_every_stage_keeps_every_promise_and_the_text_is_the_targets_own(name: str) -> None:
    assert campaign(name)["Output"] >= CAMPAIGNS[name][1]


@pytest.mark.slow
@pytest.mark.parametrize("name", CAMPAIGNS)
def test_so_it_is_with_many_more_seeds(name: str) -> None:
    faults, num_seeds = CAMPAIGNS[name]
    counts = run_seeds(faults, range(num_seeds, 20 * num_seeds))
    assert counts["Output"] >= 19 * num_seeds


def test_the_seeds_meet_the_cases_that_matter() -> None:
    """Thousands of runs prove little if they never meet the hard cases."""
    counts = campaign("RELIABLE")
    for case in (
        "rollbacks",
        "cascading rollbacks",
        "stale draft tokens",
        "overtaken steps",
        "bonus tokens that match the run-ahead",
        "bonus tokens that differ from the run-ahead",
    ):
        assert counts[case] >= 75, f"{case}: {counts[case]} in 300 seeds"
    faulty = campaign("EVERYTHING")
    for case in ("crashes", "old frames", "fenced outputs", "lost at a dead stage"):
        assert faulty[case] >= 5, f"{case}: {faulty[case]} in 100 seeds"


def test_perfect_drafts_cause_no_rollback() -> None:
    counts = run_seeds(scenario.RELIABLE, range(150), perfect=True)
    assert counts["rollbacks"] == 0
    assert counts["stale draft tokens"] == 0
    assert counts["Draft"] > 500


def test_a_seed_replays_exactly() -> None:
    first = scenario.simulate_seed(17, scenario.EVERYTHING)
    second = scenario.simulate_seed(17, scenario.EVERYTHING)
    assert first == second
