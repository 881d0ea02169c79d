"""The monitor as a program uses it: a real process that samples, and every way for it to end."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from processes import is_gone, python, wait_until

from pipespec import gpu_monitor
from pipespec.errors import UsageError
from pipespec.gpu_monitor import GPUMonitor
from pipespec.monitor.processes import Watched

FAKE = Path(__file__).with_name("fake_sampler.py")
ORIGINAL = ("timestamp", "gpu_utilizations", "gpu_memories", "gpu_powers")


def on_gpus(behaviour: str = "well", num_gpus: int = 2) -> GPUMonitor:
    """A monitor of pretended GPUs."""
    command = (sys.executable, str(FAKE), str(num_gpus), behaviour)
    return GPUMonitor(0.02, command=command)


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    yield
    assert not psutil.Process().children(), "processes are left"


@pytest.mark.alone
def test_gpus_are_sampled_by_the_clock_and_the_process_ends() -> None:
    with on_gpus(num_gpus=3) as monitor:
        pid = monitor.pid
        assert pid is not None
        time.sleep(0.2)
        results = monitor.get_results()
    assert is_gone(pid)
    assert monitor.pid is None
    assert 4 <= len(results) <= 14
    for reading in results:
        assert tuple(reading)[:4] == ORIGINAL
        assert reading["gpu_utilizations"] == [0, 10, 20]
        assert reading["gpu_powers"] == [100, 101, 102]
    times_s = [reading["timestamp"] for reading in results]
    assert times_s == sorted(times_s)
    assert -0.1 < times_s[0] <= 0  # just before the monitor was started
    assert times_s[-1] >= 0.2
    assert monitor.facts["source"] == "nvml"
    assert [device["uuid"] for device in monitor.facts["devices"]] == [
        "GPU-aaaa", "GPU-bbbb", "GPU-cccc",
    ]  # fmt: skip
    assert {device["energy"] for device in monitor.facts["devices"]} == {"counter"}
    assert 0 < monitor.facts["start_cpu_s"] <= monitor.facts["cpu_s"] < 5


@pytest.mark.alone
def test_clear_forgets_and_stop_keeps_what_was_sampled() -> None:
    monitor = on_gpus()
    assert monitor.get_results() == []
    monitor.start()
    monitor.start()  # does nothing
    time.sleep(0.1)
    num_before = len(monitor.get_results())
    monitor.clear()
    after = monitor.get_results()
    assert len(after) < num_before
    assert len(after) >= 2  # one before and one after, however short the time between
    assert after[0]["energies_j"] == [0, 0]
    monitor.stop()
    assert len(monitor.get_results()) > len(after)
    monitor.stop()
    monitor.start()  # and once more
    assert len(monitor.get_results()) >= 2
    monitor.stop()


def test_a_gpu_that_disappears_leaves_its_place_empty_and_the_others_go_on() -> None:
    with on_gpus("lose", num_gpus=3) as monitor:
        wait_until(lambda: monitor.get_results()[-1]["gpu_powers"][1] is None)
        last = monitor.get_results()[-1]
    for key in ("gpu_utilizations", "gpu_memories", "gpu_powers", "energies_j", "memory_used_mib"):
        assert [value is None for value in last[key]] == [False, True, False], key
    assert monitor.get_results()[0]["gpu_powers"] == [100, 101, 102]


def test_without_gpus_it_looks_at_its_own_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with GPUMonitor(0.02, command=(sys.executable, str(FAKE), "0", "well")) as monitor:
        deadline_s = time.monotonic() + 0.1
        while time.monotonic() < deadline_s:
            pass
        last = monitor.get_results()[-1]
    assert monitor.facts["source"] in ("process", "process+rapl")
    assert last["gpu_utilizations"][0] > 0
    assert last["memory_used_mib"][0] > 5


def test_it_follows_other_processes_of_the_same_stages() -> None:
    with (
        python("-c", "while True: pass") as first,
        python("-c", "while True: pass") as second,
        GPUMonitor(0.02, gpus=(), watched=[Watched("a", first.pid), Watched("b", None)]) as monitor,
    ):
        wait_until(lambda: bool(monitor.get_results()[-1]["gpu_utilizations"][0]))
        assert monitor.get_results()[-1]["memory_used_mib"][1] is None
        first.kill()
        wait_until(lambda: is_gone(first.pid))
        monitor.watch([Watched("a", None), Watched("b", second.pid)])
        wait_until(lambda: bool(monitor.get_results()[-1]["gpu_utilizations"][1]))
        for reading in monitor.get_results():
            assert reading["memory_used_mib"][0] is None


def test_it_never_imports_torch() -> None:
    with GPUMonitor(0.02) as monitor:
        assert monitor.pid is not None
        maps = Path(f"/proc/{monitor.pid}/maps").read_text(encoding="utf-8")
    assert "python" in maps
    assert "torch" not in maps


@pytest.mark.alone
@pytest.mark.parametrize("kind", ["processes", "pretended GPUs"])
def test_with_eight_devices_it_takes_about_a_hundredth_of_a_core_at_most(kind: str) -> None:
    """Prints what it takes (`-s` shows it). Of real GPUs, the driver's time comes on top; readings
    that cost more come less often, see `test_readings_that_cost_much_come_less_often`."""
    on_processes = kind == "processes"
    with contextlib.ExitStack() as stack:
        programs = [
            stack.enter_context(python("-c", "import time; time.sleep(60)"))
            for _ in range(8 * on_processes)
        ]
        watched = [Watched(str(i), each.pid, (0,)) for i, each in enumerate(programs)]
        fake = (sys.executable, str(FAKE), "8", "well")
        monitor = stack.enter_context(
            GPUMonitor(gpus=(), watched=watched) if on_processes else GPUMonitor(command=fake)
        )
        monitor.clear()
        before = monitor.facts
        time.sleep(2.0)
        num_readings, after = len(monitor.get_results()), monitor.facts
    cpu_s, wall_s = (after[key] - before[key] for key in ("cpu_s", "wall_s"))
    print(f"{num_readings} readings of 8 {kind} in {wall_s:.1f} s: {cpu_s / wall_s:.2%} of a core")
    assert num_readings >= 15
    assert cpu_s / wall_s < 0.012  # the last reading may come before it can be afforded


# -- how it ends ----------------------------------------------------------------------------------


def test_an_error_in_the_program_ends_it() -> None:
    with pytest.raises(ZeroDivisionError), on_gpus() as monitor:
        raise ZeroDivisionError
    assert monitor.pid is None
    assert len(monitor.get_results()) >= 2


def test_a_monitor_that_is_killed_costs_nothing_but_its_values(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with on_gpus() as monitor:
        before = monitor.get_results()
        assert monitor.pid is not None
        os.kill(monitor.pid, signal.SIGKILL)
        monitor.get_results()
        assert monitor.pid is None
        assert monitor.get_results()[: len(before)] == before
        monitor.clear()
        assert monitor.get_results() == []
    assert len(caplog.records) == 1
    assert "the run goes on without it" in caplog.text
    (error,) = monitor.facts["errors"]  # it may end before it is asked, or after
    assert "its process has ended" in error or "Broken pipe" in error


def test_a_driver_that_never_answers_is_given_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(gpu_monitor, "_START_S", 0.5)
    monkeypatch.setattr(gpu_monitor, "_END_S", 0.2)
    with on_gpus("hang") as monitor:
        assert monitor.pid is None
        assert monitor.get_results() == []
    assert "did not answer for 0.5 s" in caplog.text


def test_a_monitor_that_cannot_be_started_is_done_without(caplog: pytest.LogCaptureFixture) -> None:
    with GPUMonitor(command=("/nowhere/python",)) as monitor:
        assert monitor.get_results() == []
    assert "the run goes on without it" in caplog.text


PROGRAM = """
import signal, sys, time
from pipespec.gpu_monitor import GPUMonitor
with GPUMonitor(0.02) as monitor:
    print(monitor.pid, flush=True)
    {then}
"""


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda n: n.name
)
def test_it_ends_with_its_program_however_that_ends(number: signal.Signals) -> None:
    with python("-c", PROGRAM.format(then="time.sleep(60)")) as program:
        assert program.stdout is not None
        pid = int(program.stdout.readline())
        if number is signal.SIGINT:  # as a terminal sends it: to all processes of the group
            os.killpg(program.pid, number)
        else:
            program.send_signal(number)
        wait_until(lambda: is_gone(pid), "the monitor is left")


def test_it_ends_with_its_program_though_a_copy_of_that_holds_its_pipes() -> None:
    then = "import os; copy = os.fork(); copy and print(copy, flush=True); time.sleep(60)"
    with python("-c", PROGRAM.format(then=then)) as program:
        assert program.stdout is not None
        pid, copy = int(program.stdout.readline()), int(program.stdout.readline())
        program.kill()
        wait_until(lambda: is_gone(pid), "the monitor is left")
        assert not is_gone(copy)
        os.kill(copy, signal.SIGKILL)


@pytest.mark.parametrize("interval_s", [0.0, -1.0, float("nan"), float("inf")])
def test_an_interval_that_is_none_is_refused(interval_s: float) -> None:
    with pytest.raises(UsageError, match="interval"):
        GPUMonitor(interval_s)
