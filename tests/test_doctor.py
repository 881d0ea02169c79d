"""The doctor: what it concludes from what it finds, and the whole command on this machine."""

from __future__ import annotations

import io
import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from pipespec import doctor
from pipespec.checkup import devices, host, links, memory, models, shapes, software, steps
from pipespec.checkup.children import Reply, ask
from pipespec.checkup.findings import Finding, Mark, Section, count, ok, problem, warning
from pipespec.checkup.report import show_not_run, show_section, show_steps, verdict
from pipespec.checkup.runner_paths import (
    PathResult,
    Reference,
    RunnerPath,
    milliseconds,
    obstacle,
    paths_of,
    read_result,
    result_findings,
    table_rows,
    with_floors,
)
from pipespec.config import RUNNERS, ModelConfig
from pipespec.placement import Machine, StagePlacement
from tests.processes import DEADLINE_S, nothing_left_in, python, wait_until
from tests.test_machine import FakeNvml, FakeNvmlError
from tests.test_runners_llama import Make
from tests.tiny import one_thread  # noqa: F401

ROOT = Path(__file__).resolve().parents[1]
HF = RunnerPath("hf", "hf", "cpu", "float32")
LEAN = RunnerPath("lean", "llama", "cpu", "bfloat16")


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


# Runner paths


def test_every_real_runner_has_paths_and_the_first_is_the_reference() -> None:
    paths = paths_of((*RUNNERS, "another"))
    assert paths[0] == HF
    assert {path.runner for path in paths if path.kind == "cpu"} >= {"hf", "llama", "another"}
    assert "emulated" not in {path.runner for path in paths}
    on_gpu = {path.label for path in paths if path.kind == "cuda"}
    assert on_gpu == {"hf", "lean, eager", "lean, graphs", "hf, compiled"}
    assert len(set(paths)) == len(paths)


def test_paths_that_cannot_run_say_why() -> None:
    def why(path: RunnerPath, **circumstances: Any) -> str:
        usual = {"no_cuda": "", "with_compile": False, "is_shape": False}
        return obstacle(path, **(usual | circumstances))

    graphs = RunnerPath("lean, graphs", "llama", "cuda", "bfloat16")
    compiled = RunnerPath("hf, compiled", "static", "cpu", "float32")
    assert why(graphs) == "" and why(HF) == ""
    assert why(graphs, no_cuda="no CUDA device") == "no CUDA device"
    assert "--compile" in why(compiled) and why(compiled, with_compile=True) == ""
    assert why(HF, is_shape=True) != "" and why(graphs, is_shape=True) == ""
    assert why(LEAN, is_shape=True) != ""
    assert why(LEAN, is_shape=True, no_cuda="no CUDA device") == ""


def line(draws: Sequence[int], **others: Any) -> dict[str, Any]:
    measured = {"step_s": {"1": 0.002, "8": 0.003}, "bytes_per_s": 1e9}
    return {"model": "m", "draws": list(draws), **measured, **others}


def test_a_draw_is_wrong_only_where_the_reference_was_sure() -> None:
    reference = Reference((1,), (5, 6, 7), (3.0, 0.1, 2.0))
    near = read_result(LEAN, line([5, 9, 7]), reference)
    assert (near.num_equal, near.num_compared, near.num_wrong) == (2, 3, 0)
    wrong = read_result(LEAN, line([5, 9, 9]), reference)
    assert (wrong.num_equal, wrong.num_wrong) == (1, 1)
    assert read_result(HF, line([5, 9, 7]), reference).num_wrong == 1  # 0.1 is much in float32


def test_one_floor_holds_for_all_that_read_the_same() -> None:
    slow = read_result(LEAN, line([5], bytes_per_s=0.5e9), None)
    fast = read_result(RunnerPath("native", "native", "cpu", "bfloat16"), line([5]), None)
    other = read_result(HF, line([5], bytes_per_s=4e9), None)
    failed = read_result(LEAN, {"model": "m", "error": "x"}, None)
    sizes = {("m", "bfloat16"): 1_000_000, ("m", "float32"): 2_000_000}
    found = with_floors([slow, fast, other, failed], sizes)
    assert [result.floor_s for result in found] == pytest.approx([1e-3, 1e-3, 0.5e-3, 1e-3])
    assert found[0].ratio == pytest.approx(2.0) and found[3].ratio is None
    assert with_floors([failed], sizes) == [failed]


def test_findings_tell_near_ties_wrong_paths_and_failures_apart() -> None:
    near = PathResult(LEAN, "m", num_equal=31, num_compared=32)
    [only] = result_findings([near])
    assert only.mark is Mark.OK and "31 of 32" in only.text and "1 differ at near-ties" in only.text
    wrong = PathResult(LEAN, "m", num_equal=3, num_compared=32, num_wrong=20)
    assert marks(result_findings([near, wrong])) == ["problem"]
    other = RunnerPath("native", "native", "cpu", "float32")
    failed = [PathResult(path, "m", error="no compiler") for path in (HF, other)]
    assert marks(result_findings(failed)) == ["problem", "warning"]


def test_the_table_goes_model_by_model_and_leaves_out_failures() -> None:
    results = [
        read_result(HF, line([5]), None),
        read_result(HF, line([5], model="n"), None),
        read_result(LEAN, line([4]), Reference((1,), (5,), (9.0,))),
        read_result(LEAN, {"model": "n", "error": "out of memory"}, None),
    ]
    sizes = {(model, dtype): 1_000_000 for model in "mn" for dtype in ("float32", "bfloat16")}
    assert table_rows(with_floors(results, sizes)) == [
        ("m", "hf", "fp32", "2.00", "-", "-", "3.00", "1.00", "2.0x", "-"),
        ("m", "lean", "bf16", "2.00", "-", "-", "3.00", "1.00", "2.0x", "0/1 WRONG"),
        ("n", "hf", "fp32", "2.00", "-", "-", "3.00", "1.00", "2.0x", "-"),
    ]
    assert [milliseconds(s) for s in (0.000314, 0.00314, 0.0314, None)] == [
        "0.314", "3.14", "31.4", "-",
    ]  # fmt: skip


def test_a_text_is_drawn_again_by_the_runner_that_wrote_it(make: Make) -> None:
    from pipespec.checkup.timing import greedy_draws, read_bandwidth, reference_text, step_times_s
    from tests.test_runners_llama import generate, lean, random_ids

    runner, prompt = lean(make("llama")), random_ids(9)
    text, margins = reference_text(runner, prompt, 20)
    assert text == generate(runner, prompt, 20)
    assert all(margin >= 0.0 for margin in margins)
    assert greedy_draws(runner, prompt, text) == text
    times = step_times_s(runner, 0.01)
    assert set(times) == {1, 2, 4, 8} and min(times.values()) > 0.0
    assert read_bandwidth(1 << 20, "cpu", 0.02) > 1e6


def test_the_static_cache_is_rewound_like_any_other(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the compiler, which takes long and changes no result."""
    import torch

    from pipespec.checkup.static_compile import StaticCompileRunner
    from pipespec.checkup.timing import greedy_draws, reference_text, step_times_s
    from tests.test_runners_llama import VOCAB_SIZE, plain, random_ids

    monkeypatch.setattr(torch, "compile", lambda forward, **_options: forward)
    folder, prompt = make("llama"), random_ids(9)
    text, _ = reference_text(plain(folder), prompt, 20)
    runner = StaticCompileRunner(
        folder, dtype="float32", device="cpu", vocab_size=VOCAB_SIZE, context_length=64
    )
    assert greedy_draws(runner, prompt, text) == text
    assert set(step_times_s(runner, 0.01)) == {1, 2, 4, 8}
    assert greedy_draws(runner, prompt, text) == text
    runner.close()


@pytest.mark.parametrize("tied", [True, False])
def test_random_weights_of_a_known_shape_are_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: bool
) -> None:
    from pipespec.checkpoint import CheckpointShape
    from tests.test_runners_llama import feed, lean, plain, random_ids

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    known = shapes.KNOWN_CONFIGS[shapes.SHAPES["llama-1b"]]
    small = {**known, **sizes, **heads, "vocab_size": 128, "tie_word_embeddings": tied}
    monkeypatch.setattr(shapes, "KNOWN_CONFIGS", {"tiny": small})
    monkeypatch.setattr(shapes, "SHAPES", {"tiny": "tiny"})
    monkeypatch.setattr(shapes, "_SHARD_BYTES", 20_000)
    shapes.write_checkpoint("tiny", tmp_path / "tiny")
    assert len(list((tmp_path / "tiny").glob("*.safetensors"))) > 2
    shape = CheckpointShape.read(tmp_path / "tiny")
    assert shape.num_parameters == shapes.shape_of("tiny").num_parameters
    ids = random_ids(20)
    ours, theirs = feed(lean(tmp_path / "tiny"), ids), feed(plain(tmp_path / "tiny"), ids)
    assert ours.std() > 0.01 and (ours - theirs).abs().max() < 1e-4


def test_a_shape_that_does_not_fit_is_said_before_it_is_written() -> None:
    assert "too much for 8 GiB of memory" in steps.shape_obstacle("llama-8b", 8.0, on_cpu=True)


# The report


def test_the_report_fits_into_80_columns() -> None:
    console = Console(file=io.StringIO(), width=200)
    long = "a text that goes on " * 12
    show_section(
        console, Section("Title", [ok(long), warning(long, long), problem("x" * 300, "y")])
    )
    row = ("target-of-12M", "GPU: hf, compiled", "bf16", *["123.4"] * 5)
    show_steps(console, [(*row, "123.4x", "32/32 WRONG")] * 2)
    show_not_run(console, {f"path {index}": "no CUDA device" for index in range(20)})
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert sum("-> " in line for line in lines) == 2


def test_the_last_line_counts_what_is_wrong() -> None:
    assert verdict([Section("", [ok("a")])]) == "Everything is in order."
    found = [Section("", [warning("a"), problem("b", "c")]), Section("", [warning("d")])]
    assert verdict(found) == "1 problem and 2 warnings."


# The command


def test_the_whole_examination_of_this_machine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "report.json"
    with nothing_left_in(tmp_path):
        status = doctor.main(["--seconds", "0.3", "--json", str(report)])
    output = capsys.readouterr().out
    values = json.loads(report.read_text())
    assert status == 0, output
    titles = [section["title"] for section in values["sections"]]
    assert titles == [
        "Software", "Host", "GPUs", "Models of demo.json", "Messages between processes", "Memory",
        "Steps",
    ]  # fmt: skip
    assert all(title in output for title in titles)
    measured = {(step["path"], step["device"], step["dtype"]) for step in values["steps"]}
    for label in ("hf", "lean"):
        assert {(label, "cpu", "float32"), (label, "cpu", "bfloat16")} <= measured
    for step in values["steps"]:
        assert step["error"] == "" and step["num_wrong"] == 0
        assert step["num_compared"] == steps.NUM_TOKENS and step["ratio"] > 0
        if step["dtype"] == "float32" and step["path"] == "hf":
            assert step["num_equal"] == steps.NUM_TOKENS
    assert "--compile" in values["not_run"]["hf, compiled on CPU, fp32"]
    speeds = values["sections"][5]["values"]["bytes_per_s"]
    assert speeds["cpu"] > 1e8
    assert not report.with_name("report.json.partial").exists()


@pytest.mark.gpu
def test_the_examination_of_a_gpu_runs_its_paths(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    assert doctor.main(["--seconds", "2", "--json", str(report)]) == 0
    found = {
        (step["path"], step["dtype"]): step
        for step in json.loads(report.read_text())["steps"]
        if step["device"] == "cuda"
    }
    for label in ("hf", "lean, eager", "lean, graphs"):
        for dtype in ("float32", "bfloat16"):
            assert found[label, dtype]["error"] == "" and found[label, dtype]["num_wrong"] == 0


def test_gpu_paths_are_listed_where_they_cannot_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    plan = steps.Plan(("hf",), 0.0, "no CUDA device", False, Machine((0,), 1.0), {})
    outcome = steps.Outcome()
    monkeypatch.setattr(steps, "_run_group", lambda *_arguments: [])
    steps.run_paths(plan, steps.shipped_subjects(), outcome, lambda _text: None)
    assert outcome.not_run["lean, graphs on GPU, bf16"] == "no CUDA device"
    show_not_run(Console(), outcome.not_run)
    assert "not run (no CUDA device): hf on GPU, fp32" in capsys.readouterr().out


def test_what_is_broken_makes_the_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(links, "NUM_TRIPS", 5)
    config = "configs/models/llama3-8gpu.json"
    assert doctor.main(["--models-config-path", config, "--seconds", "0"]) == 1
    output = capsys.readouterr().out
    assert "PROBLEM" in output and "change" in output
    assert "not run (--seconds 0)" in output


@pytest.mark.parametrize(
    "flags",
    [
        ["--seconds", "-1"],
        ["--seconds", "nan"],
        ["--json", "/nowhere/at/all.json"],
        ["--shapes", "llama-2b"],
        ["--models-config-path", "nowhere.json"],
    ],
)
def test_wrong_flags_are_answered_by_one_line(
    flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor.main(flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --") or "nowhere.json" in error
    assert len(error.splitlines()) == 1


def test_ctrl_c_ends_the_examination_and_keeps_what_was_found(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    with (
        nothing_left_in(tmp_path),
        python("-m", "pipespec.doctor", "--json", str(report)) as process,
    ):
        wait_until(lambda: "Messages" in (report.read_text() if report.exists() else ""))
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=DEADLINE_S)
        assert process.returncode == 130, errors
        assert errors.splitlines()[-1] == "interrupted"
    titles = [section["title"] for section in json.loads(report.read_text())["sections"]]
    assert "Host" in titles and "Steps" not in titles


def test_a_model_config_says_how_a_stage_is_placed() -> None:
    model = ModelConfig("org/m", ("cuda:1",))
    placement = StagePlacement("cuda:0", visible_devices=("1",), threads=4)
    assert models.placement_finding(model, placement).text == "m, bfloat16: GPU 1, 4 threads"
