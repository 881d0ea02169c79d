"""The doctor: which paths it runs and what it makes of their results, its report, and the whole
command on this machine."""

from __future__ import annotations

import io
import json
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pipespec import doctor
from pipespec.checkup import links, shapes, steps
from pipespec.checkup.children import Reply
from pipespec.checkup.findings import Mark, Section, ok, problem, warning
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
from pipespec.config import RUNNERS
from pipespec.placement import Machine
from tests.processes import DEADLINE_S, nothing_left_in, python, wait_until
from tests.test_checkup import marks
from tests.test_runners_llama import Make, make_fixture  # noqa: F401
from tests.tiny import one_thread  # noqa: F401

HF = RunnerPath("hf", "hf", "cpu", "float32")
LLAMA = RunnerPath("llama", "llama", "cpu", "bfloat16")


# Runner paths


def test_every_real_runner_has_paths_and_the_first_is_the_reference() -> None:
    paths = paths_of((*RUNNERS, "another"))
    assert paths[0] == HF
    on_cpu = {path.runner for path in paths if path.kind == "cpu"}
    assert on_cpu == {"hf", "native", "llama", "another", "static"}
    on_gpu = {path.label for path in paths if path.kind == "cuda"}
    assert on_gpu == {"hf", "llama, eager", "llama, graphs", "hf, compiled"}
    assert len(set(paths)) == len(paths)


def test_paths_that_cannot_run_say_why() -> None:
    def why(path: RunnerPath, **circumstances: Any) -> str:
        usual = {"no_cuda": "", "with_compile": False, "is_shape": False}
        return obstacle(path, **(usual | circumstances))

    graphs = RunnerPath("llama, graphs", "llama", "cuda", "bfloat16")
    compiled = RunnerPath("hf, compiled", "static", "cpu", "float32")
    assert why(graphs) == "" and why(HF) == ""
    assert why(graphs, no_cuda="no CUDA device") == "no CUDA device"
    assert "--compile" in why(compiled) and why(compiled, with_compile=True) == ""
    assert why(HF, is_shape=True) != "" and why(graphs, is_shape=True) == ""
    assert why(LLAMA, is_shape=True) != ""
    assert why(LLAMA, is_shape=True, no_cuda="no CUDA device") == ""


def test_a_runner_that_cannot_be_compiled_here_is_listed_and_no_failure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def reply(_module: str, question: dict[str, Any], **_options: Any) -> Reply:
        reason = "no C++ compiler" if question["runner"] == "native" else ""
        found = {"obstacle": reason} if reason else line([5])
        each = [(dtype, m["name"]) for dtype in question["dtypes"] for m in question["models"]]
        return Reply(tuple({**found, "dtype": d, "model": name} for d, name in each), "")

    monkeypatch.setattr(steps, "ask", reply)
    plan = steps.Plan(("hf", "native"), 0.0, "no CUDA device", False, Machine((0,), 1.0), {})
    outcome = steps.Outcome()
    steps.run_paths(plan, steps.shipped_subjects(), outcome, lambda _text: None)
    assert outcome.not_run["native on CPU, bf16"] == "no C++ compiler"
    assert {result.path.runner for result in outcome.results} == {"hf"}


def line(draws: Sequence[int], **others: Any) -> dict[str, Any]:
    measured = {"step_s": {"1": 0.002, "8": 0.003}, "bytes_per_s": 1e9}
    return {"model": "m", "draws": list(draws), **measured, **others}


def test_a_draw_is_wrong_only_where_the_reference_was_sure() -> None:
    reference = Reference((1,), (5, 6, 7), (3.0, 0.1, 2.0))
    near = read_result(LLAMA, line([5, 9, 7]), reference)
    assert (near.num_equal, near.num_compared, near.num_wrong) == (2, 3, 0)
    wrong = read_result(LLAMA, line([5, 9, 9]), reference)
    assert (wrong.num_equal, wrong.num_wrong) == (1, 1)
    assert read_result(HF, line([5, 9, 7]), reference).num_wrong == 1  # 0.1 is much in float32


def test_one_floor_holds_for_all_that_read_the_same() -> None:
    slow = read_result(LLAMA, line([5], bytes_per_s=0.5e9), None)
    fast = read_result(RunnerPath("native", "native", "cpu", "bfloat16"), line([5]), None)
    other = read_result(HF, line([5], bytes_per_s=4e9), None)
    failed = read_result(LLAMA, {"model": "m", "error": "x"}, None)
    sizes = {("m", "bfloat16"): 1_000_000, ("m", "float32"): 2_000_000}
    found = with_floors([slow, fast, other, failed], sizes)
    assert [result.floor_s for result in found] == pytest.approx([1e-3, 1e-3, 0.5e-3, 1e-3])
    assert found[0].ratio == pytest.approx(2.0) and found[3].ratio is None
    assert with_floors([failed], sizes) == [failed]


def test_findings_tell_near_ties_wrong_paths_and_failures_apart() -> None:
    near = PathResult(LLAMA, "m", num_equal=31, num_compared=32)
    [only] = result_findings([near])
    assert only.mark is Mark.OK and "31 of 32" in only.text and "1 differ at near-ties" in only.text
    wrong = PathResult(LLAMA, "m", num_equal=3, num_compared=32, num_wrong=20)
    assert marks(result_findings([near, wrong])) == ["problem"]
    other = RunnerPath("hf, compiled", "static", "cpu", "float32")
    failed = [PathResult(path, "m", error="it broke") for path in (HF, other)]
    assert marks(result_findings(failed)) == ["problem", "warning"]


def test_the_table_goes_model_by_model_and_leaves_out_failures() -> None:
    results = [
        read_result(HF, line([5]), None),
        read_result(HF, line([5], model="n"), None),
        read_result(LLAMA, line([4]), Reference((1,), (5,), (9.0,))),
        read_result(LLAMA, {"model": "n", "error": "out of memory"}, None),
    ]
    sizes = {(model, dtype): 1_000_000 for model in "mn" for dtype in ("float32", "bfloat16")}
    assert table_rows(with_floors(results, sizes)) == [
        ("m", "hf", "fp32", "2.00", "-", "-", "3.00", "1.00", "2.0x", "-"),
        ("m", "llama", "bf16", "2.00", "-", "-", "3.00", "1.00", "2.0x", "0/1 WRONG"),
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
    row = ("target-of-12M", "llama, graphs", "bf16", *["123.4"] * 5)
    show_steps(console, "the GPU", [(*row, "123.4x", "32/32 WRONG")] * 2)
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
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the smallest of the models that ship."""
    smallest = steps.shipped_subjects()[:1]
    monkeypatch.setattr(doctor, "shipped_subjects", lambda: smallest)
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
    for label in ("hf", "native", "llama"):
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
    for label in ("hf", "llama, eager", "llama, graphs"):
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
    assert outcome.not_run["llama, graphs on GPU, bf16"] == "no CUDA device"
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
        ["--json", ""],
        ["--models-config-path", __file__],
        ["--shapes", "llama-2b"],
        ["--models-config-path", "nowhere.json"],
    ],
)
def test_wrong_flags_are_answered_by_one_line(
    flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor.main(flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --") or flags[1] in error
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
