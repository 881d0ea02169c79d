"""Energy and utilization of a sample, from readings with known sums."""

from __future__ import annotations

from typing import Any

import pytest

from pipespec.metrics import device_metrics, energy_estimate_j, sample_totals, summarise
from pipespec.metrics.devices import energy_j, mean_utilization

TIMES_S = (-0.1, 0.4, 0.9, 2.9)


def readings(**columns: list[list[float | None]]) -> list[dict[str, Any]]:
    """One list a device, turned into one reading a time."""
    stats: list[dict[str, Any]] = [{"timestamp": at_s} for at_s in TIMES_S]
    for name, lists in columns.items():
        for reading, values in zip(stats, zip(*lists)):
            reading[name] = list(values)
    return stats


def test_a_counter_says_energy_whatever_the_power_was() -> None:
    stats = readings(energies_j=[[5, 6, None, 25]], gpu_powers=[[1, 1, 1, 1]])
    assert energy_j(stats, 0) == 20


def test_without_a_counter_power_is_integrated() -> None:
    stats = readings(gpu_powers=[[100, 200, 200, 0]])
    assert energy_j(stats, 0) == pytest.approx(0.5 * 150 + 0.5 * 200 + 2 * 100)
    stats = readings(gpu_powers=[[100, None, 300, 300]], energies_j=[[None] * 4])
    assert energy_j(stats, 0) == pytest.approx(1.0 * 200 + 2 * 300)


@pytest.mark.parametrize(
    "columns",
    [
        {"energies_j": [[0, 1, 2, None]], "gpu_powers": [[1, 1, 1, 1]]},  # lost on the way
        {"gpu_powers": [[1, 1, 1, None]]},
        {"gpu_powers": [[None, 1, 1, 1]]},
        {"gpu_utilizations": [[1, 1, 1, 1]]},
    ],
)
def test_energy_whose_end_or_beginning_nobody_saw_is_unknown(columns: Any) -> None:
    assert energy_j(readings(**columns), 0) is None
    assert energy_j([], 0) is None


def test_a_reading_s_utilization_is_that_of_the_time_before_it() -> None:
    stats = readings(gpu_utilizations=[[99, 100, 0, 50], [99, None, 40, None]])
    assert mean_utilization(stats, 0) == pytest.approx((0.5 * 100 + 0 + 2 * 50) / 3)
    assert mean_utilization(stats, 1) == 40
    assert mean_utilization(stats[:1], 0) is None


def test_stages_are_charged_for_devices_of_their_own_and_the_total_for_those_in_use() -> None:
    joules = [[0, 0, 0, 10], [0, 0, 0, 20], [0, 0, 0, 30], [0, 0, 0, 40]]
    stats = readings(energies_j=joules, gpu_utilizations=[[80] * 4, [20] * 4, [40] * 4, [0] * 4])
    metrics = device_metrics(stats, [(0,), (1, 2)], (0, 1, 2))
    assert metrics["energy_j"] == 60
    assert metrics["energy_per_stage_j"] == [10, 50]
    assert metrics["mean_utilization"] == pytest.approx([80, 30])


def test_nobody_knows_whose_energy_a_shared_device_took() -> None:
    stats = readings(energies_j=[[0, 0, 0, 10], [0, 0, 0, 20]], gpu_utilizations=[[80] * 4] * 2)
    metrics = device_metrics(stats, [(0,), (0,), (1,), ()], (0, 1))
    assert metrics["energy_j"] == 30
    assert metrics["energy_per_stage_j"] == [None, None, 20, None]
    assert metrics["mean_utilization"] == [80, 80, 80, None]


def test_a_total_that_lacks_a_part_is_unknown() -> None:
    stats = readings(energies_j=[[0, 0, 0, 10], [0, None, None, None]])
    assert device_metrics(stats, [(0,), (1,)], (0, 1))["energy_j"] is None
    assert device_metrics(stats, [(0,), (1,)], None)["energy_j"] is None


def sample(time_s: float, utilization: list[float | None] | None) -> dict[str, Any]:
    metrics = {"total_time": time_s, "tokens_generated": 1, "token_times": []}
    if utilization is not None:
        metrics["mean_utilization"] = utilization
    texts = {"sample_index": 0, "input_text": "", "output_text": ""}
    return {**texts, "metrics": metrics, "gpustats": [{"gpu_powers": [None]}]}


def test_a_run_s_utilization_is_the_mean_over_the_time_in_which_it_is_known() -> None:
    run = [sample(1.0, [50, 10]), sample(3.0, [90, None]), sample(9.0, None)]
    assert summarise(run).mean_utilization == (80, 10)
    assert summarise([sample(1.0, None)]).mean_utilization == ()
    assert summarise([sample(1.0, [None])]).mean_utilization == (None,)


def test_utilization_before_a_sample_is_none_of_it() -> None:
    """By device as by stage: what the reading before the sample says was before."""
    stats = [
        {"timestamp": at_s, "gpu_utilizations": [value, None]}
        for at_s, value in ((-0.1, 0), (0.9, 80), (1.1, 20))
    ]
    assert sample_totals(with_stats(stats)).gpu_utilizations == (pytest.approx(70), None)
    later = [{**reading, "timestamp": reading["timestamp"] + 0.2} for reading in stats]
    assert sample_totals(with_stats(later)).gpu_utilizations == (pytest.approx(100 / 3), None)


def with_stats(stats: list[dict[str, Any]]) -> dict[str, Any]:
    return {**sample(1.0, None), "gpustats": stats}


def test_power_that_is_not_known_gives_no_estimate() -> None:
    assert energy_estimate_j([sample(1.0, None)], [0]) is None
