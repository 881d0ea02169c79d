"""What the monitor's sources read: a pretended NVML, real processes, a pretended power meter."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from fake_nvml import FakeNvml

from pipespec.monitor.nvml import NvmlSource
from pipespec.monitor.packages import PackageSource
from pipespec.monitor.processes import ProcessSource, Watched
from pipespec.monitor.readings import Values
from pipespec.monitor.sampler import Sampler, open_sources

H100 = ("H100", 80)


# -- GPUs -----------------------------------------------------------------------------------------


def test_a_gpu_tells_everything_in_the_units_of_the_file() -> None:
    source = NvmlSource(FakeNvml(H100, H100))
    (_, second) = source.read(0.0)
    assert second == {
        "gpu_utilizations": 10,
        "gpu_memories": pytest.approx(1.25),
        "memory_used_mib": 1024,
        "gpu_powers": 101.0,
        "energies_j": pytest.approx(2000.0),  # the second look
        "temperatures_c": 41,
        "sm_clocks_mhz": 1980,
        "memory_clocks_mhz": 2619,
    }
    assert source.facts[1] == {
        "kind": "gpu", "name": "H100", "uuid": "GPU-bbbb", "memory_total_mib": 81920,
    }  # fmt: skip


def test_gpus_are_read_in_the_order_of_their_uuids() -> None:
    source = NvmlSource(FakeNvml(H100, H100, H100), ["GPU-cccc", "GPU-aaaa"])
    assert [values["gpu_utilizations"] for values in source.read(0.0)] == [20, 0]
    assert [fact["uuid"] for fact in source.facts] == ["GPU-cccc", "GPU-aaaa"]


def test_a_gpu_that_is_lost_has_no_values_and_the_others_go_on() -> None:
    nvml = FakeNvml(H100, H100, H100)
    source = NvmlSource(nvml)
    nvml.lost.add(1)
    first, second, third = source.read(0.0)
    assert (first["gpu_powers"], second, third["gpu_powers"]) == (100.0, {}, 102.0)
    source.close()
    assert nvml.num_open == 0


def test_a_gpu_that_was_never_there_keeps_its_place() -> None:
    source = NvmlSource(FakeNvml(H100), ["GPU-zzzz", "GPU-aaaa"])
    missing, there = source.read(0.0)
    assert missing == {}
    assert there["gpu_powers"] == 100.0
    assert source.facts[0]["uuid"] == "GPU-zzzz"
    assert source.facts[0]["name"] is None


def test_what_a_gpu_cannot_tell_is_asked_once() -> None:
    nvml = FakeNvml(H100, without=("nvmlDeviceGetTotalEnergyConsumption",))
    source = NvmlSource(nvml)
    for now_s in (0.0, 0.1, 0.2):
        (values,) = source.read(now_s)
    assert "energies_j" not in values
    assert nvml.num_calls["nvmlDeviceGetTotalEnergyConsumption"] == 1
    assert nvml.num_calls["nvmlDeviceGetPowerUsage"] == 4


def test_what_changes_slowly_is_asked_once_a_second() -> None:
    nvml = FakeNvml(H100)
    source = NvmlSource(nvml)
    for tenth in range(21):
        (values,) = source.read(tenth / 10)
        assert values["temperatures_c"] == 40
    assert nvml.num_calls["nvmlDeviceGetTemperature"] == 1 + 3


# -- processes ------------------------------------------------------------------------------------

BUSY = "import time\nprint(flush=True)\nwhile time.process_time() < 30: pass"
IDLE = "print(flush=True)\ninput()"


def started(code: str) -> subprocess.Popen[bytes]:
    """A process that runs `code` already."""
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe)
    assert process.stdout is not None
    process.stdout.readline()
    return process


@pytest.mark.alone
def test_a_process_that_computes_is_told_from_one_that_waits() -> None:
    core = min(os.sched_getaffinity(0))
    with started(BUSY) as busy, started(IDLE) as idle:
        os.sched_setaffinity(busy.pid, {core})
        source = ProcessSource([Watched("busy", busy.pid, (core,)), Watched("idle", idle.pid)])
        source.read(0.0)
        time.sleep(0.3)
        first, second = source.read(1.0)  # by now, cores are looked at again
        busy.kill()
        idle.kill()
    # Others may want the core as well; whoever has it, it is never idle.
    assert first["gpu_utilizations"] is not None and 5 < first["gpu_utilizations"] <= 100
    assert first["core_utilizations"] is not None and first["core_utilizations"] > 70
    assert second["gpu_utilizations"] == pytest.approx(0, abs=2)
    assert "core_utilizations" not in second
    for values in (first, second):
        assert values["memory_used_mib"] is not None and 3 < values["memory_used_mib"] < 200
        assert values["gpu_memories"] is not None and 0 < values["gpu_memories"] < 50


@pytest.mark.alone
def test_utilization_is_a_share_of_the_cores_that_a_process_was_given() -> None:
    def spin(seconds: float) -> float:
        """Percent of one core that this process got."""
        start_s, start_cpu_s = time.perf_counter(), time.process_time()
        while time.perf_counter() - start_s < seconds:
            pass
        return 100 * (time.process_time() - start_cpu_s) / seconds

    source = ProcessSource([Watched("four", os.getpid(), (), 4), Watched("one", os.getpid())])
    source.read(0.0)
    share = spin(0.1)
    four, one = (values["gpu_utilizations"] for values in source.read(0.1))
    assert four == pytest.approx(share / 4, rel=0.1)
    assert one == pytest.approx(share, rel=0.1)


def test_a_process_that_ended_or_does_not_run_has_no_values() -> None:
    with started(IDLE) as process:
        source = ProcessSource([Watched("a", process.pid), Watched("b", None)])
        assert source.read(0.0)[0]["memory_used_mib"]
        process.kill()
    assert source.read(0.1) == [{}, {}]
    assert source.read(2.0) == [{}, {}]


def test_another_process_takes_the_place_of_one_that_ended() -> None:
    source = ProcessSource([Watched("a", None)])
    source.watch([Watched("a", os.getpid())])
    (values,) = source.read(0.0)
    assert values["memory_used_mib"]


# -- power of packages ----------------------------------------------------------------------------


def package(folder: Path, number: int, name: str, energy_uj: int, range_uj: int) -> Path:
    zone = folder / f"intel-rapl:{number}"
    zone.mkdir(parents=True)
    (zone / "name").write_text(f"{name}\n")
    (zone / "energy_uj").write_text(f"{energy_uj}\n")
    (zone / "max_energy_range_uj").write_text(f"{range_uj}\n")
    return zone


def test_a_package_s_counter_gives_energy_and_power_also_where_it_starts_over(
    tmp_path: Path,
) -> None:
    zone = package(tmp_path, 0, "package-0", 9_000_000, 10_000_000)
    package(tmp_path, 1, "psys", 1, 10_000_000)
    (tmp_path / "intel-rapl:2").mkdir()
    source = PackageSource(tmp_path)
    assert source.facts == [{"kind": "cpu-package", "name": "package-0"}]
    assert source.read(0.0) == [{"energies_j": 0.0, "gpu_powers": None}]
    (zone / "energy_uj").write_text("2000000")
    (values,) = source.read(0.5)
    assert values["energies_j"] == pytest.approx(3.0)
    assert values["gpu_powers"] == pytest.approx(6.0)
    (zone / "energy_uj").write_text("")
    assert source.read(1.0) == [{}]


def test_without_a_power_meter_there_is_no_package(tmp_path: Path) -> None:
    assert PackageSource(tmp_path / "powercap").facts == []


# -- which source, and when -----------------------------------------------------------------------


def kinds(gpus: list[str] | None, watched: list[Watched], nvml: Any) -> list[str]:
    sources, _ = open_sources(gpus, watched, lambda: nvml)
    found = [fact["kind"] for source in sources for fact in source.facts]
    return [kind for kind in found if kind != "cpu-package"]


def test_gpus_come_first_and_processes_after_them() -> None:
    own = [Watched("own", os.getpid())]
    nvml = FakeNvml(H100, H100)
    assert kinds(["GPU-aaaa"], own, nvml) == ["gpu", "process"]
    assert kinds([], own, nvml) == ["process"]
    assert kinds(None, own, nvml) == ["gpu", "gpu"]
    assert kinds(None, own, None) == ["process"]
    assert kinds(None, own, FakeNvml()) == ["process"]


def test_a_driver_that_does_not_start_leaves_its_gpus_without_values() -> None:
    sources, errors = open_sources(["GPU-aaaa"], [], lambda: None)
    assert len(errors) == 1
    assert sources[0].read(0.0) == [{}]
    assert sources[0].facts[0]["uuid"] == "GPU-aaaa"


class Ticking:
    """A source whose device has used ever more joules, and which may fail."""

    facts = ({"kind": "gpu", "name": "ticking"},)

    def __init__(self) -> None:
        self.joules = 100.0
        self.error: Exception | None = None

    def read(self, _now_s: float) -> list[Values]:
        if self.error is not None:
            raise self.error
        self.joules += 7.0
        return [{"energies_j": self.joules, "gpu_utilizations": 12.345}]

    def close(self) -> None:
        pass


def test_energy_counts_from_the_first_reading_on_and_from_each_clear() -> None:
    sampler = Sampler([Ticking()], 0.1)
    sampler.sample()
    assert [reading["energies_j"] for reading in sampler.take()] == [[0], [7], [14]]
    sampler.clear()
    assert [reading["energies_j"] for reading in sampler.take()] == [[0], [7]]
    assert sampler.facts[0]["energy"] == "counter"


def test_readings_have_the_original_s_keys_and_rounded_numbers() -> None:
    (reading, _) = Sampler([Ticking()], 0.1).take()
    assert reading["gpu_utilizations"] == [12.3]
    assert reading["gpu_memories"] == reading["gpu_powers"] == [None]
    assert set(reading) == {
        "timestamp", "gpu_utilizations", "gpu_memories", "gpu_powers", "energies_j",
    }  # fmt: skip


def test_a_source_that_fails_is_reported_once_and_has_no_values_meanwhile() -> None:
    source = Ticking()
    sampler = Sampler([source, Ticking()], 0.1)
    source.error = OverflowError("a driver's bug")
    sampler.sample()
    reading = sampler.take()[-1]
    assert reading["gpu_utilizations"] == [None, 12.3]
    assert reading["energies_j"] == [None, 14]
    assert sampler.errors == ["OverflowError: a driver's bug"]


def test_readings_that_cost_much_come_less_often() -> None:
    clock_s, cpu_s = [0.0], [0.0]

    class Costly(Ticking):
        def read(self, now_s: float) -> list[Values]:
            clock_s[0] += 0.02
            cpu_s[0] += 0.005
            return super().read(now_s)

    sampler = Sampler([Costly()], 0.1, lambda: clock_s[0], lambda: cpu_s[0])
    assert sampler.due_in_s == pytest.approx(0.5 - 0.02)  # 5 ms are 1 % of half a second
    clock_s[0] += 0.49
    assert sampler.is_due
    sampler = Sampler([Costly()], 2.0, lambda: clock_s[0], lambda: cpu_s[0])
    assert sampler.due_in_s == pytest.approx(2.0 - 0.02)
