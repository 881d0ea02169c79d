"""Whatever ends a benchmark early, finished samples are kept and --resume goes on after them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from emulated import write_emulated, write_prompts
from processes import is_gone, wait_until

from pipespec import benchmark
from pipespec.results import load_results, partial_path

DEADLINE_S = 30.0
NUM_SAMPLES = 40  # of about 40 ms each: long after the second is done, the run still goes on
NAMES = {"greedy": "greedy_target.json", "async-chain": "async-chain_draft-target_auto.json"}


def flags_of(folder: Path, strategy: str) -> list[str]:
    """A run of a few seconds, of samples that are finished soon."""
    config = write_emulated(folder, target_ms=5.0, agreement=0.0)
    data = write_prompts(folder, [f"prompt {index}" for index in range(NUM_SAMPLES)])
    flags = ["--strategy", strategy, "--models-config-path", config, "--dataset", data]
    return [*flags, "--max-new-tokens", "8", "--output-dir", str(folder)]


@contextmanager
def started(flags: list[str]) -> Iterator[subprocess.Popen[str]]:
    """The benchmark as a process; it has ended when the block has."""
    process = subprocess.Popen(
        [sys.executable, "-m", "pipespec.benchmark", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=DEADLINE_S)


def read_lines(partial: Path) -> list[dict[str, Any]]:
    """What the partial file holds so far, one object a line, perhaps without a torn last one."""
    if not partial.exists():
        return []
    whole = partial.read_text().rpartition("\n")[0]
    return [json.loads(line) for line in whole.splitlines()]


def wait_for_samples(partial: Path, count: int, process: subprocess.Popen[str]) -> list[int]:
    """Waits until so many samples are on the disk; returns the ids of the processes at work, the
    monitor's last."""
    deadline = time.monotonic() + DEADLINE_S
    while len(stored_samples(partial)) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"{count} samples took too long"
        time.sleep(0.005)
    facts = [line["metadata"] for line in read_lines(partial) if "metadata" in line]
    return [*facts[1]["pids"], facts[1]["monitor"]["pid"]]


def stored_samples(partial: Path) -> list[dict[str, Any]]:
    return [line["result"] for line in read_lines(partial) if "result" in line]


def end_of(process: subprocess.Popen[str]) -> list[str]:
    """Lines of stderr of a process that must end by itself."""
    _, errors = process.communicate(timeout=DEADLINE_S)
    return errors.splitlines()


@pytest.mark.parametrize(
    ("strategy", "number", "exit_code", "says"),
    [
        ("async-chain", signal.SIGINT, 130, "interrupted"),
        ("greedy", signal.SIGTERM, 143, "stopped by a signal"),
    ],
)
def test_an_interrupted_run_keeps_its_samples_and_resumes_after_them(
    strategy: str,
    number: signal.Signals,
    exit_code: int,
    says: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags, path = flags_of(tmp_path, strategy), tmp_path / NAMES[strategy]
    partial = partial_path(path)
    with started(flags) as process:
        pids = wait_for_samples(partial, 2, process)
        process.send_signal(number)
        (line,) = end_of(process)
        assert process.returncode == exit_code
    kept = stored_samples(partial)
    assert 2 <= len(kept) < NUM_SAMPLES
    assert not path.exists()
    assert line.startswith(f"{says}; {len(kept)} of {NUM_SAMPLES} samples of {strategy} are kept")
    assert "--resume" in line
    assert not [pid for pid in pids if psutil.pid_exists(pid)]

    assert benchmark.main(flags) == 2
    assert "--resume goes on" in capsys.readouterr().err
    assert benchmark.main([*flags, "--resume", "--max-new-tokens", "9"]) == 2
    assert "max_new_tokens (8 there, 9 now)" in capsys.readouterr().err
    assert stored_samples(partial) == kept

    assert benchmark.main([*flags, "--resume"]) == 0
    run = load_results(path)
    assert [result["sample_index"] for result in run.results] == list(range(NUM_SAMPLES))
    assert list(run.results[: len(kept)]) == kept
    assert len(run.metadata["resumed"]) == 1
    assert not partial.exists()


@pytest.mark.parametrize(("stage", "name"), [(0, "draft"), (1, "target")])
def test_a_killed_stage_ends_the_run_with_its_name(stage: int, name: str, tmp_path: Path) -> None:
    flags, path = flags_of(tmp_path, "async-chain"), tmp_path / NAMES["async-chain"]
    with started(flags) as process:
        pids = wait_for_samples(partial_path(path), 2, process)
        os.kill(pids[stage], signal.SIGKILL)
        errors = end_of(process)
        assert process.returncode == 1
    kept = stored_samples(partial_path(path))
    assert 2 <= len(kept) < NUM_SAMPLES
    assert errors[0].startswith(f"error: stage {stage} ({name}) was killed by signal 9 (SIGKILL)")
    assert f"{len(kept)} of {NUM_SAMPLES} samples of async-chain are kept" in errors[0]
    assert all(line.startswith("  | ") for line in errors[1:])
    assert any(f"stage {stage} INFO" in line for line in errors[1:])
    assert not [pid for pid in pids if psutil.pid_exists(pid)]


@pytest.mark.parametrize("strategy", ["greedy", "async-chain"])
def test_nothing_outlives_a_benchmark_that_is_killed(strategy: str, tmp_path: Path) -> None:
    flags, path = flags_of(tmp_path, strategy), tmp_path / NAMES[strategy]
    with started(flags) as process:
        pids = wait_for_samples(partial_path(path), 1, process)
        process.kill()
        process.wait(DEADLINE_S)
        wait_until(lambda: all(map(is_gone, pids)), "processes are left")


def test_a_killed_monitor_does_not_stop_the_run(tmp_path: Path) -> None:
    flags, path = flags_of(tmp_path, "async-chain"), tmp_path / NAMES["async-chain"]
    with started([*flags, "--num-samples", "15"]) as process:
        pids = wait_for_samples(partial_path(path), 2, process)
        os.kill(pids[-1], signal.SIGKILL)
        (line,) = end_of(process)
        assert process.returncode == 0
    assert "the monitor is lost" in line
    run = load_results(path)
    assert "was lost" in run.metadata["monitor"]["errors"][0]
    assert run.results[0]["gpustats"]
    assert run.results[-1]["gpustats"] == []
    assert run.results[-1]["metrics"]["mean_utilization"] == [None, None]


def test_a_resumed_run_says_what_each_of_its_monitors_took(tmp_path: Path) -> None:
    flags, path = flags_of(tmp_path, "greedy"), tmp_path / NAMES["greedy"]
    flags += ["--num-samples", "3"]
    assert benchmark.main(flags) == 0
    whole = load_results(path)
    lines = [{"metadata": whole.metadata}, {"result": whole.results[0]}]
    partial_path(path).write_text("".join(json.dumps(line) + "\n" for line in lines))
    path.unlink()
    assert benchmark.main([*flags, "--resume"]) == 0
    run = load_results(path)
    (earlier,) = run.metadata["monitor"]["earlier"]
    assert earlier["pid"] == whole.metadata["monitor"]["pid"] != run.metadata["monitor"]["pid"]
    assert all(len(result["gpustats"]) >= 2 for result in run.results)


def test_all_strategies_go_on_where_the_command_ended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Greedy is done, async-chain was interrupted: one command with --resume finishes the rest."""
    data = write_prompts(tmp_path, ["one", "two", "three"])
    flags = ["--models-config-path", write_emulated(tmp_path), "--dataset", data]
    flags += ["--max-new-tokens", "8", "--output-dir", str(tmp_path)]
    assert benchmark.main(flags) == 0
    path = tmp_path / NAMES["async-chain"]
    whole = load_results(path)
    lines = [{"metadata": whole.metadata}, {"result": whole.results[0]}]
    torn = '{"result":{"sample_index":1,"strat'
    partial_path(path).write_text("".join(json.dumps(line) + "\n" for line in lines) + torn)
    path.unlink()
    capsys.readouterr()
    assert benchmark.main([*flags, "--resume"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("done before") == 2
    assert "async-chain: loading" in printed
    again = load_results(path)
    assert again.results[0] == whole.results[0]
    assert [r["output_ids"] for r in again.results] == [r["output_ids"] for r in whole.results]
