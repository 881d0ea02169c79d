"""What the doctor's checks conclude from a machine's software, cores, GPUs, models and links."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipespec.checkup import devices, host, links, memory, models, software
from pipespec.checkup.children import Reply, ask
from pipespec.checkup.findings import Finding, Mark, count
from pipespec.config import ModelConfig
from pipespec.placement import Machine, StagePlacement
from tests.processes import DEADLINE_S, nothing_left_in
from tests.test_machine import FakeNvml, FakeNvmlError

ROOT = Path(__file__).resolve().parents[1]


def marks(findings: Sequence[Finding]) -> list[str]:
    return [finding.mark.value for finding in findings]


def text_of(findings: Sequence[Finding]) -> str:
    return "\n".join(f"{finding.text} -> {finding.remedy}" for finding in findings)


# Software


def test_a_package_that_is_missing_or_old_is_a_problem() -> None:
    wanted = {"python": "3.11", "torch": "2.9", "rich": "13.9", "msgpack": "1.1", "wandb": ""}
    here = {"python": "3.12.1", "torch": "2.8.1+cu130", "msgpack": "1.10", "wandb": "0.1"}
    findings, versions = software.check_versions(wanted, here.get)
    assert marks(findings) == ["ok", "problem", "problem"]
    assert "torch 2.8.1+cu130 is older than 2.9" in text_of(findings)
    assert "rich is not installed -> run pip install" in text_of(findings)
    assert versions["rich"] is None


def test_what_is_wanted_is_what_setup_cfg_asks_for() -> None:
    wanted = software.read_requirements(ROOT / "setup.cfg")
    assert {"python", "torch", "pyzmq", "nvidia-ml-py", "rich"} <= set(wanted)
    assert wanted["python"] == "3.11" and wanted["torch"]


@pytest.mark.parametrize(
    ("version", "least", "older"),
    [("2.9", "2.9", False), ("2.10", "2.9", False), ("2.9.0+cpu", "2.9.1", True), ("1", "", False)],
)
def test_versions_are_compared_as_numbers(version: str, least: str, older: bool) -> None:
    assert software.is_older(version, least) is older


def test_a_cpu_build_of_torch_is_a_problem_only_beside_a_gpu() -> None:
    assert marks(software.check_torch_build("2.13.0+cpu", 2)) == ["problem"]
    assert marks(software.check_torch_build("2.13.0+cpu", 0)) == ["ok"]
    assert software.check_torch_build("2.13.0+cu130", 2) == []


# Cores and memory


def pretend_cpu(sysfs: Path, core: int, siblings: str, governor: str = "performance") -> None:
    folder = sysfs / f"devices/system/cpu/cpu{core}"
    (folder / "topology").mkdir(parents=True)
    (folder / "cpufreq").mkdir()
    (folder / "topology/thread_siblings_list").write_text(siblings)
    (folder / "cpufreq/scaling_governor").write_text(governor)


def test_whole_cores_at_full_clock_are_in_order(tmp_path: Path) -> None:
    for core in range(4):
        pretend_cpu(tmp_path, core, str(core))
    findings = host.check_cores((0, 1, 2, 3), 8, tmp_path)
    assert marks(findings) == ["ok", "ok"]
    assert findings[0].text == "4 cores to use (0-3) of 8"


def test_hyperthreads_and_a_saving_governor_are_warned_of(tmp_path: Path) -> None:
    for core, siblings in enumerate(("0,2", "1,3", "0,2", "1,3")):
        pretend_cpu(tmp_path, core, siblings, "powersave")
    text = text_of(host.check_cores((0, 1, 2, 3), 4, tmp_path))
    assert "the 4 cores are hyperthreads of 2" in text
    assert "clock governor powersave" in text and "cpupower" in text


def test_one_core_and_a_broken_quota_are_warned_of(tmp_path: Path) -> None:
    (tmp_path / "fs/cgroup").mkdir(parents=True)
    (tmp_path / "fs/cgroup/cpu.max").write_text("150000 100000")
    findings = host.check_cores((3,), 8, tmp_path)
    assert marks(findings) == ["ok", "warning", "warning"]
    assert "grants 1.5" in findings[0].text and "stages take turns" in findings[1].text


def test_load_and_little_memory_are_warned_of() -> None:
    assert host.check_load(0.1, 0.2, 8).mark is Mark.OK
    assert host.check_load(3.2, 4.0, 8).mark is Mark.WARNING
    assert host.check_memory(30.0, 64.0).mark is Mark.OK
    assert host.check_memory(2.0, 64.0).mark is Mark.WARNING


# GPUs


class Nvml(FakeNvml):
    """GPUs as a driver shows them; `quirks` replaces what it answers."""

    NVML_P2P_CAPS_INDEX_NVLINK = 2
    NVML_P2P_STATUS_OK = 0

    def __init__(self, *gpus: tuple[str, int], **quirks: Any) -> None:
        super().__init__(*gpus)
        answers = {
            "PersistenceMode": 1,
            "EccMode": (1, 1),
            "EnforcedPowerLimit": 700_000,
            "PowerManagementDefaultLimit": 700_000,
            "CudaComputeCapability": (9, 0),
            "UtilizationRates": SimpleNamespace(gpu=0),
            "ComputeRunningProcesses": [],
            "CurrPcieLinkGeneration": 5,
            "CurrPcieLinkWidth": 16,
        }
        self.used_gib = quirks.pop("used_gib", 0)
        self.linked = quirks.pop("linked", ())
        for name, value in (answers | quirks).items():
            setattr(self, f"nvmlDeviceGet{name}", self._answer(value))

    def _answer(self, value: Any) -> Any:
        def ask(_handle: int) -> Any:
            if value is None:
                raise FakeNvmlError("not supported")
            return value

        return ask

    def nvmlSystemGetDriverVersion(self) -> bytes:  # noqa: N802
        return b"580.65"

    def nvmlSystemGetCudaDriverVersion(self) -> int:  # noqa: N802
        return 13010

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(total=self.gpus[handle][1] << 30, used=self.used_gib << 30)

    def nvmlDeviceGetP2PStatus(self, one: int, other: int, _index: int) -> int:  # noqa: N802
        return 0 if (one, other) in self.linked else 3


def gpu_findings(nvml: Any, visible: str | None = None, num_visible: int = 9) -> list[Finding]:
    findings = list(devices.check_devices(nvml, visible, num_visible).findings)
    assert nvml.num_open == 0
    return findings


def test_healthy_gpus_are_described_and_nothing_else() -> None:
    findings = gpu_findings(Nvml(("H200", 141), ("H200", 141), linked=[(0, 1)]))
    assert marks(findings) == ["ok"] * 4
    text = text_of(findings)
    assert "driver 580.65, CUDA up to 13.1" in text
    assert "GPU 1: H200, 141 GiB, compute capability 9.0, up to 700 W, ECC on, PCIe 5 x16" in text
    assert "NVLink between all 2 GPUs" in text


def test_what_spoils_measurements_on_a_gpu_is_warned_of() -> None:
    nvml = Nvml(
        ("T4", 16),
        PersistenceMode=0,
        EnforcedPowerLimit=50_000,
        PowerManagementDefaultLimit=70_000,
        CudaComputeCapability=(7, 5),
        UtilizationRates=SimpleNamespace(gpu=93),
        ComputeRunningProcesses=[1, 2],
        used_gib=12,
    )
    text = text_of(gpu_findings(nvml))
    assert "no bfloat16 arithmetic" in text
    assert "persistence mode is off" in text and "nvidia-smi -i 0 -pm 1" in text
    assert "capped at 50 of 70 W" in text
    assert "12.0 GiB, 93 % busy, 2 processes" in text


def test_what_nvml_does_not_tell_is_left_out() -> None:
    unknown = dict.fromkeys(
        (
            "PersistenceMode",
            "EccMode",
            "EnforcedPowerLimit",
            "UtilizationRates",
            "CurrPcieLinkWidth",
        )
    )
    findings = gpu_findings(Nvml(("GB10", 128), **unknown))
    assert marks(findings) == ["ok", "ok"]
    assert findings[1].text == "GPU 0: GB10, 128 GiB, compute capability 9.0"


def test_missing_links_and_hidden_gpus_are_warned_of() -> None:
    three = [("A100", 80)] * 3
    text = text_of(gpu_findings(Nvml(*three, linked=[(0, 2)]), visible="0,2", num_visible=2))
    assert "pairs of GPUs with NVLink: 0-2; the others go over PCIe" in text
    assert "CUDA_VISIBLE_DEVICES=0,2 leaves 2 of 3 GPUs" in text


def test_no_driver_is_no_problem() -> None:
    def fail() -> None:
        raise FakeNvmlError("driver not loaded")

    nvml = SimpleNamespace(nvmlInit=fail, NVMLError=FakeNvmlError, num_open=0)
    assert marks(gpu_findings(nvml)) == ["ok"]


# Models


def test_a_token_is_said_to_be_there_and_never_shown(tmp_path: Path) -> None:
    findings = models.check_hub({"HF_TOKEN": "hf_secret"}, tmp_path / "hub")
    assert "a token is set" in text_of(findings) and "hf_secret" not in text_of(findings)
    assert "no token" in text_of(models.check_hub({}, tmp_path / "hub"))


def test_a_device_that_is_not_there_is_a_problem() -> None:
    machine = Machine(cores=(0, 1), memory_gib=16.0)
    config = ROOT / "configs/models/llama3.json"
    section = models.check_models(config, machine, {})
    assert marks(section.findings)[-1] == "problem"
    assert "wants cuda:0" in section.findings[-1].text


def test_a_config_that_fits_is_shown_stage_by_stage() -> None:
    machine = Machine(cores=(4, 6), memory_gib=16.0)
    section = models.check_models(ROOT / "configs/models/demo.json", machine, {})
    assert count([section], Mark.PROBLEM) == 0
    assert "core 4, 1 thread" in text_of(section.findings)
    assert "core 6, 1 thread" in text_of(section.findings)


def test_a_model_config_says_how_a_stage_is_placed() -> None:
    model = ModelConfig("org/m", ("cuda:1",))
    placement = StagePlacement("cuda:0", visible_devices=("1",), threads=4)
    assert models.placement_finding(model, placement).text == "m, bfloat16: GPU 1, 4 threads"


# Processes


def test_messages_are_timed_between_real_processes() -> None:
    cores = sorted(os.sched_getaffinity(0))
    section = links.check_links(cores, os.environ)
    assert count([section], Mark.PROBLEM) == 0, section.findings
    for transport in ("ipc", "tcp"):
        for peers in ("idle", "busy"):
            measured = section.values[transport][peers]
            assert 0 < measured["median_us"] <= measured["p99_us"]


def test_a_link_without_an_answer_is_a_problem() -> None:
    assert links.link_finding("tcp", {}, "no answer within 30 s").mark is Mark.PROBLEM
    half = {"idle": {"median_us": 60.0, "p99_us": 90.0}}
    assert links.link_finding("ipc", half, "").mark is Mark.PROBLEM
    slow = {kind: {"median_us": 2000.0, "p99_us": 9000.0} for kind in ("idle", "busy")}
    assert links.link_finding("ipc", slow, "").mark is Mark.WARNING


CHILDREN = {
    "crashes": "import sys; print('{\"a\": 1}'); print('noise'); sys.exit('it broke')",
    "hangs": "import time; print('{\"a\": 1}', flush=True); time.sleep(60)",
    "answers": "import json, sys; print(json.dumps(json.load(sys.stdin)))",
    "dies": "import os; os.kill(os.getpid(), 9)",
}


@pytest.mark.parametrize(
    ("child", "error", "has_line"),
    [
        ("crashes", "it broke", True),
        ("hangs", "no answer within 1 s", True),
        ("answers", "", True),
        ("dies", "killed; perhaps the system ran out of memory", False),
    ],
)
def test_a_child_is_heard_and_ended_whatever_it_does(
    tmp_path: Path, child: str, error: str, has_line: bool
) -> None:
    (tmp_path / f"child_{child}.py").write_text(CHILDREN[child])
    with nothing_left_in(tmp_path):
        reply = ask(
            f"child_{child}",
            {"a": 1},
            placement=StagePlacement("cpu", cores=(0,)),
            inherited={**os.environ, "PYTHONPATH": str(tmp_path)},
            timeout_s=1.0 if child == "hangs" else DEADLINE_S,
        )
    assert reply.error == error
    assert reply.first("a") == (1 if has_line else None)


def test_a_torch_that_does_not_see_the_gpus_is_a_problem() -> None:
    blind = Reply(({"cuda": None, "num_devices": 0, "peers": []},), "")
    cuda = memory.cuda_of(blind, 2)
    assert cuda.why_not == "this torch is a build without CUDA"
    assert marks(memory.speed_findings(blind, cuda, 2)) == ["problem"]
    assert memory.cuda_of(blind, 0).why_not == "no CUDA device"
    seeing = Reply(
        (
            {"cuda": "13.0", "num_devices": 2, "peers": [[0, 1]]},
            {"device": "cpu", "bytes": 1 << 29, "bytes_per_s": 12e9},
            {"device": "cuda:0", "bytes": 1 << 32, "bytes_per_s": 4.1e12},
        ),
        "",
    )
    cuda = memory.cuda_of(seeing, 2)
    assert (cuda.num_devices, cuda.why_not) == (2, "")
    findings = memory.speed_findings(seeing, cuda, 2)
    assert marks(findings) == ["ok", "ok", "warning"]
    assert "cuda:0 reads 4,100.0 GB/s" in text_of(findings)
