"""`--drop-stages` with real processes: the first sample is written by all stages, the others by
those that pay, and the text stays the same."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from emulated import write_prompts

from pipespec import benchmark
from pipespec.results import load_results, partial_path
from pipespec.results.reading import RunFile

PROMPTS = ("def mean(values):", "class Stack:", "import os\n")
NUM_TOKENS = 64
# Slower than the target that it drafts for; and a draft that is mostly wrong and slow, too.
USELESS_MIDDLE = (("draft", 1, 0.9), ("middle", 16, 0.98), ("target", 4, None))
USELESS_DRAFT = (("draft", 12, 0.1), ("target", 4, None))


def write_models(folder: Path, models: tuple[tuple[str, float, float | None], ...]) -> str:
    path = folder / "models.json"
    entries = []
    for name, step_ms, agreement in models:
        behaviour: dict[str, Any] = {"step_ms": {"1": step_ms}}
        if agreement is not None:
            behaviour["agreement"] = agreement
        entries.append({"path": f"emulated/{name}", "devices": "cpu", "emulated": behaviour})
    path.write_text(json.dumps(entries))
    return str(path)


def flags_of(folder: Path, config: str, *more: str) -> list[str]:
    flags = ["--models-config-path", config, "--dataset", write_prompts(folder, PROMPTS)]
    flags += ["--max-new-tokens", str(NUM_TOKENS), "--output-dir", str(folder / "results")]
    return [*flags, *more]


@dataclass(frozen=True)
class Finished:
    """A run that left a stage out: its flags, what it printed, its file, and greedy's."""

    flags: list[str]
    printed: str
    path: Path
    run: RunFile
    greedy: RunFile


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("dropped")
    flags = flags_of(folder, write_models(folder, USELESS_MIDDLE), "--drop-stages")
    ended = subprocess.run(
        [sys.executable, "-m", "pipespec.benchmark", *flags],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    results = folder / "results"
    path = results / "async-chain_draft-middle-target_auto.json"
    greedy = load_results(results / "greedy_target.json")
    return Finished(flags, ended.stdout, path, load_results(path), greedy)


def test_samples_after_the_first_are_written_without_the_stage_that_does_not_pay(
    finished: Finished,
) -> None:
    results = finished.run.results
    assert [result["stages"] for result in results] == [[0, 1, 2], [0, 2], [0, 2]]
    steps = [result["metrics"]["num_steps"] for result in results]
    assert [count > 0 for count in steps[0]] == [True, True, True]
    for counts in steps[1:]:
        assert [count > 0 for count in counts] == [True, False, True]


def test_the_text_is_that_of_greedy_whatever_runs(finished: Finished) -> None:
    texts = [result["output_ids"] for result in finished.run.results]
    assert texts == [result["output_ids"] for result in finished.greedy.results]
    assert finished.run.metadata["greedy_comparison"] == {"num_compared": 3, "num_different": 0}


def test_the_estimate_is_in_the_file_and_in_a_line_for_the_user(finished: Finished) -> None:
    payoff = finished.run.metadata["payoff"]
    assert finished.run.metadata["drop_stages"] is True
    assert (payoff["best"], payoff["not_paying"], payoff["dropped"]) == ([0, 2], [1], [1])
    assert (payoff["samples"], payoff["num_tokens"]) == ([0], NUM_TOKENS)
    assert [item["stages"] for item in payoff["alternatives"]] == [[0, 2], [1, 2], [2]]
    first = finished.run.results[0]["metrics"]
    assert payoff["tokens_per_s"] == pytest.approx(NUM_TOKENS / first["total_time"], rel=1e-3)
    lines = finished.printed.splitlines()
    assert "async-chain: going on without middle" in lines
    assert "async-chain: loading draft target" in lines
    (line,) = (line for line in lines if line.startswith("middle does not pay: without it about"))
    assert line.endswith("left out after the first sample")


def test_every_sample_has_the_same_lists_and_they_account_for_every_token(
    finished: Finished,
) -> None:
    for result in finished.run.results:
        metrics = result["metrics"]
        assert [len(metrics[key]) for key in ("model_times", "accepted_tokens")] == [3, 2]
        assert 1 + sum(metrics["accepted_tokens"][-1]) == metrics["tokens_generated"]
    assert finished.run.metadata["effective_schedule"]["mean_candidates"] > 0


def test_the_monitor_follows_the_processes_that_go_on(finished: Finished) -> None:
    assert finished.run.metadata["monitor"]["stages"] == [[0], [1], [2]]
    for result, has_middle in zip(finished.run.results, (True, False, False)):
        for reading in result["gpustats"]:
            assert len(reading["memory_used_mib"]) >= 3
            resident = reading["memory_used_mib"][:3]
            assert [value is not None for value in resident] == [True, has_middle, True]
        utilization = result["metrics"]["mean_utilization"]
        assert [value is not None for value in utilization] == [True, has_middle, True]


def test_no_process_is_left(finished: Finished) -> None:
    pids = finished.run.metadata["pids"]
    assert len(set(pids)) == 5
    assert not [pid for pid in pids if psutil.pid_exists(pid)]


def test_an_interrupted_run_goes_on_without_the_stage(
    finished: Finished, capsys: pytest.CaptureFixture[str]
) -> None:
    path, done = finished.path, finished.run.results[:2]
    entries = [{"metadata": finished.run.metadata}, *({"result": result} for result in done)]
    partial_path(path).write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    path.unlink()
    assert benchmark.main([*finished.flags, "--strategy", "async-chain", "--resume"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("async-chain: loading") == 1
    assert "async-chain: loading draft target" in printed
    run = load_results(path)
    assert run.results[:2] == done
    assert run.results[2]["stages"] == [0, 2]
    assert run.metadata["payoff"] == finished.run.metadata["payoff"]


def test_a_run_that_drops_stages_is_another_run(
    finished: Finished, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [flag for flag in finished.flags if flag != "--drop-stages"]
    assert benchmark.main([*flags, "--strategy", "async-chain"]) == 2
    assert "drop_stages (True there, none now)" in capsys.readouterr().err


def test_without_drafts_that_pay_the_target_goes_on_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_models(tmp_path, USELESS_DRAFT)
    flags = flags_of(tmp_path, config, "--drop-stages", "--strategy", "async-chain")
    assert benchmark.main([*flags, "--lookahead", "2"]) == 0
    assert "async-chain: loading target" in capsys.readouterr().out
    run = load_results(tmp_path / "results" / "async-chain_draft-target_2.json")
    assert [result["stages"] for result in run.results] == [[0, 1], [1], [1]]
    for result in run.results[1:]:
        metrics = result["metrics"]
        assert metrics["accepted_tokens"] == [[1] * (NUM_TOKENS - 1)]
        assert metrics["num_target_forwards"] == NUM_TOKENS
        assert metrics["acceptance_rate"] == [None]


@pytest.mark.parametrize("strategy", ["greedy", "chain"])
def test_other_strategies_have_no_stages_to_drop(
    strategy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--strategy", strategy, "--drop-stages", "--output-dir", str(tmp_path / "results")]
    assert benchmark.main(flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: --drop-stages is for async-chain, and --strategy is {strategy}")
    assert not (tmp_path / "results").exists()
