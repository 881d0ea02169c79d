"""What this process may use, read from a pretended kernel and a pretended NVML."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_nvml import FakeNvml, FakeNvmlError

from pipespec.machine import this_machine


def gpus(
    monkeypatch: pytest.MonkeyPatch, nvml: Any, visible: str | None
) -> list[tuple[str, float]]:
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    found = this_machine({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})
    assert getattr(nvml, "num_open", 0) == 0
    return list(zip(found.gpu_ids, found.gpu_memory_gib, strict=True))


def test_without_a_driver_there_are_no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise FakeNvmlError("driver not loaded")

    assert gpus(monkeypatch, SimpleNamespace(nvmlInit=fail, NVMLError=FakeNvmlError), None) == []
    assert gpus(monkeypatch, None, None) == []  # not even the module


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, [("0", 80), ("1", 40)]),
        ("", []),
        ("  ", []),
        ("-1", []),
        ("1", [("1", 40)]),
        ("1,0", [("1", 40), ("0", 80)]),
        (" 1 , 0 ", [("1", 40), ("0", 80)]),
        ("0,7,1", [("0", 80)]),  # CUDA stops at what it does not know
        ("NoDevFiles", []),
        ("GPU-bbbb", [("GPU-bbbb", 40)]),
        ("GPU-b,GPU-a", [("GPU-b", 40), ("GPU-a", 80)]),
        ("GPU-", []),  # ambiguous
    ],
)
def test_cuda_visible_devices_decides_what_there_is(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, expected: list[tuple[str, float]]
) -> None:
    assert gpus(monkeypatch, FakeNvml(("H100", 80), ("H100", 40)), visible) == expected


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, ("GPU-aaaa", "GPU-bbbb", "GPU-cccc")),
        ("2,0", ("GPU-cccc", "GPU-aaaa")),
        ("GPU-b,GPU-cccc", ("GPU-bbbb", "GPU-cccc")),
        ("", ()),
    ],
)
def test_every_gpu_has_its_full_uuid_whatever_it_is_called(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, expected: tuple[str, ...]
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(("H100", 80), ("H100", 80), ("H100", 80)))
    found = this_machine({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})
    assert found.gpu_uuids == expected


def test_unlike_gpus_are_named_by_uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    found = gpus(monkeypatch, FakeNvml(("T4", 16), ("H100", 80)), None)
    assert found == [("GPU-aaaa", 16), ("GPU-bbbb", 80)]


def test_mig_instances_stand_for_their_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml(("H100", 80), ("H100", 80), mig=(0,))
    assert gpus(monkeypatch, nvml, None) == [("MIG-0-0", 10), ("MIG-0-1", 10), ("1", 80)]


def pretend_kernel(folder: Path, siblings: dict[int, str], cpu_max: str, memory: str) -> Path:
    for core, text in siblings.items():
        topology = folder / f"devices/system/cpu/cpu{core}/topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(f"{text}\n")
    group = folder / "fs/cgroup"
    group.mkdir(parents=True)
    (group / "cpu.max").write_text(f"{cpu_max}\n")
    (group / "memory.max").write_text(f"{memory}\n")
    return folder


@pytest.fixture
def four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {3, 2, 1, 0}, raising=False)


@pytest.mark.usefixtures("four_cores")
def test_physical_cores_come_before_their_siblings(tmp_path: Path) -> None:
    siblings = {0: "0-1", 1: "0-1", 2: "2,3", 3: "2,3"}
    kernel = pretend_kernel(tmp_path, siblings, "max 100000", "max")
    found = this_machine({"CUDA_VISIBLE_DEVICES": ""}, kernel)
    assert found.cores == (0, 2, 1, 3)


@pytest.mark.usefixtures("four_cores")
def test_a_container_s_limits_count(tmp_path: Path) -> None:
    kernel = pretend_kernel(tmp_path, {}, "150000 100000", str(1 << 29))
    found = this_machine({"CUDA_VISIBLE_DEVICES": ""}, kernel)
    assert found.cores == (0, 1)
    assert found.memory_gib == 0.5


@pytest.mark.usefixtures("four_cores")
def test_a_kernel_that_tells_nothing_is_believed(tmp_path: Path) -> None:
    found = this_machine({"CUDA_VISIBLE_DEVICES": ""}, tmp_path)
    assert found.cores == (0, 1, 2, 3)
    assert found.memory_gib > 0.1
