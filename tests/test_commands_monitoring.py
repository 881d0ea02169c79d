"""Which devices a run's monitor looks at, on pretended machines: GPUs by their UUIDs whatever
CUDA_VISIBLE_DEVICES calls them, and processes where a stage is on none."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, cast

import pytest
from emulated import write_emulated, write_prompts
from fake_nvml import FakeNvml

from pipespec import benchmark
from pipespec.commands.monitoring import RunMonitor
from pipespec.config import ModelConfig
from pipespec.decoding import Hierarchy
from pipespec.placement import place, this_machine
from pipespec.results import load_results

FAKE = (sys.executable, str(Path(__file__).with_name("fake_sampler.py")), "4")


def hierarchy(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, *devices: str, emulated: int | None = None
) -> Hierarchy:
    """Models on these devices ("cuda:0+cuda:1" is a set) of a machine with four GPUs."""
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(*[("H100", 80)] * 4))
    machine = this_machine({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})
    models = tuple(
        ModelConfig(f"model-{i}", tuple(names.split("+")), emulated={} if i == emulated else None)
        for i, names in enumerate(devices)
    )
    nothing = (None,) * len(models)
    placements = place(models, machine)
    tokenizer = cast(Any, None)
    return Hierarchy(models, nothing, nothing, placements, machine, tokenizer, 1, 1, ())


class Local:
    """Stands for a decoder of one process."""


def watched(
    found: Hierarchy, strategy: str = "chain", behaviour: str = "well", interval_s: float = 0.05
) -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, Any]]:
    """`gpustats`, metrics and metadata of one sample."""
    with RunMonitor(interval_s, found, strategy, (*FAKE, behaviour)) as monitor:
        stages = range(len(found.models))
        monitor.follow(list(stages)[-1:] if strategy == "greedy" else stages, cast(Any, Local()))
        monitor.begin()
        stats, metrics = monitor.end()
    return stats, metrics, monitor.metadata(None)["monitor"]


@pytest.mark.parametrize(
    ("visible", "uuids"),
    [
        (None, "abcd"),
        ("2,0", "ca"),
        (" 3 , 1,0", "dba"),
        ("GPU-d,GPU-bb", "db"),
        ("GPU-cccc,0,7,1", "ca"),
    ],
)
def test_devices_are_those_of_the_stages_whatever_cuda_calls_them(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, uuids: str
) -> None:
    stats, metrics, facts = watched(hierarchy(monkeypatch, visible, "cuda:1", "cuda:0"))
    assert [device["uuid"] for device in facts["devices"]] == [f"GPU-{u * 4}" for u in uuids]
    assert facts["stages"] == [(1,), (0,)]
    assert facts["source"] == "nvml"
    percent = [10 * "abcd".index(u) for u in uuids]  # a pretended GPU says which one it is
    assert stats[-1]["gpu_utilizations"] == percent
    assert metrics["mean_utilization"] == pytest.approx([percent[1], percent[0]])
    assert metrics["energy_j"] == sum(metrics["energy_per_stage_j"])


def test_no_visible_gpu_means_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    stats, metrics, facts = watched(hierarchy(monkeypatch, "", "auto", "cpu"))
    assert facts["source"].startswith("process")
    assert facts["stages"] == [(0,), (1,)]
    assert [device["name"] for device in facts["devices"][:2]] == ["model-0", "model-1"]
    assert stats[0]["memory_used_mib"][0] == stats[0]["memory_used_mib"][1]  # one process
    assert len(stats) >= 2
    if facts["source"] == "process":
        assert metrics["energy_j"] is None


def test_a_set_of_gpus_is_one_stage_and_those_of_nobody_do_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stats, metrics, facts = watched(hierarchy(monkeypatch, None, "cuda:0", "cuda:2+cuda:3"))
    assert facts["stages"] == [(0,), (2, 3)]
    taken_j = stats[-1]["energies_j"]
    assert metrics["energy_per_stage_j"] == [taken_j[0], taken_j[2] + taken_j[3]]
    assert metrics["energy_j"] == taken_j[0] + taken_j[2] + taken_j[3]
    assert metrics["mean_utilization"] == pytest.approx([0, 25])


def test_greedy_has_the_target_s_devices_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    found = hierarchy(monkeypatch, None, "cuda:0", "cuda:2")
    stats, metrics, facts = watched(found, "greedy")
    assert facts["stages"] == [(2,)]
    assert metrics["energy_j"] == stats[-1]["energies_j"][2]
    assert metrics["mean_utilization"] == pytest.approx([20])


def test_a_stage_without_weights_is_its_process_wherever_it_is_placed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = hierarchy(monkeypatch, "1,0", "cuda:0", "cuda:1", emulated=0)
    stats, metrics, facts = watched(found)
    assert facts["stages"] == [(2,), (1,)]
    assert [device["kind"] for device in facts["devices"][:3]] == ["gpu", "gpu", "process"]
    assert stats[-1]["memory_used_mib"][2] > 1
    assert metrics["energy_per_stage_j"][0] is None
    assert metrics["energy_per_stage_j"][1] > 0


def test_a_gpu_that_is_lost_costs_its_energy_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    found = hierarchy(monkeypatch, None, "cuda:0", "cuda:1")
    with RunMonitor(0.01, found, "chain", (*FAKE, "lose")) as monitor:
        monitor.follow((0, 1), cast(Any, Local()))
        stats, metrics = monitor.end()
        while stats[-1]["gpu_powers"][1] is not None:
            stats, metrics = monitor.end()
    assert metrics["energy_j"] is None
    assert metrics["energy_per_stage_j"][0] > 0
    assert metrics["energy_per_stage_j"][1] is None


def test_a_stage_that_was_left_out_has_no_values(monkeypatch: pytest.MonkeyPatch) -> None:
    found = hierarchy(monkeypatch, "", "cpu", "cpu", "cpu")
    with RunMonitor(0.05, found, "async-chain") as monitor:
        monitor.follow((0, 2), cast(Any, Local()))
        monitor.begin()
        (stats, metrics) = monitor.end()
    resident = stats[-1]["memory_used_mib"]
    assert [value is None for value in resident[:3]] == [False, True, False]
    assert metrics["mean_utilization"][1] is None


def test_a_run_that_went_on_keeps_what_was_said_before(monkeypatch: pytest.MonkeyPatch) -> None:
    found = hierarchy(monkeypatch, "", "cpu")
    with RunMonitor(0.05, found, "greedy") as monitor:
        monitor.follow((0,), cast(Any, Local()))
        first = monitor.metadata(None)["monitor"]
        second = monitor.metadata({**first, "wall_s": 1.0})["monitor"]
        third = monitor.metadata({**second, "wall_s": 2.0})["monitor"]
    assert [each["wall_s"] for each in third["earlier"]] == [1.0, 2.0]
    assert "earlier" not in first


def test_without_an_interval_there_is_no_monitor(monkeypatch: pytest.MonkeyPatch) -> None:
    with RunMonitor(0.0, hierarchy(monkeypatch, "", "cpu"), "greedy") as monitor:
        monitor.follow((0,), cast(Any, Local()))
        monitor.begin()
        assert monitor.end() == ([], {})
    assert monitor.metadata(None) == {}


def test_the_processes_that_may_run_on_several_cores_are_measured_by_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cores = sorted(os.sched_getaffinity(0))
    found = hierarchy(monkeypatch, "", "cpu:0", "cpu")
    facts = {}
    for strategy in ("chain", "async-chain"):
        with RunMonitor(0.05, found, strategy) as monitor:
            monitor.follow((0, 1), cast(Any, Local()))
            facts[strategy] = monitor.metadata(None)["monitor"]["devices"]
    assert facts["async-chain"][0]["cores"] == list(found.placements[0].cores) == cores[:1]
    # One process does one thing at a time: it has the target's cores.
    assert facts["chain"][0]["cores"] == list(found.placements[1].cores)
    assert facts["chain"][0]["num_cores"] == (len(found.placements[1].cores) or 1)


def test_a_flag_that_is_no_interval_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    for value in ("-1", "nan", "inf"):
        assert benchmark.main([f"--monitor-interval={value}"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: --monitor-interval is ")


def test_a_run_without_a_monitor_says_nothing_of_devices(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--models-config-path", write_emulated(tmp_path), "--num-samples", "1"]
    flags += ["--dataset", write_prompts(tmp_path, ["one"]), "--output-dir", str(tmp_path)]
    flags += ["--max-new-tokens", "4", "--strategy", "greedy", "--monitor-interval", "0"]
    assert benchmark.main(flags) == 0
    run = load_results(tmp_path / "greedy_target.json")
    assert run.metadata["monitor"] is None
    assert run.results[0]["gpustats"] == []
    assert "energy_j" not in run.results[0]["metrics"]
    assert "utilization" not in capsys.readouterr().out
