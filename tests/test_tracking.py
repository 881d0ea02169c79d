"""What a benchmark logs to W&B: for real and offline, read back from what W&B wrote."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from emulated import write_emulated, write_prompts
from offline_runs import OfflineRun, read_offline_runs

from pipespec import benchmark
from pipespec.metrics import speed_up, summarise
from pipespec.results import RunFile, find_files, load_results
from pipespec.tracking.keys import KEYS, When

PROMPTS = ("def mean(values):", "class Stack:", "import os\n")
NAMES = {
    "greedy": "greedy_target.json",
    "chain": "chain_draft-target_2.json",
    "async-chain": "async-chain_draft-target_2.json",
}
DEADLINE_S = 60.0


@dataclass(frozen=True)
class Tracked:
    """A finished benchmark: what it printed, its flags and results, and the runs W&B wrote."""

    printed: str
    flags: tuple[str, ...]
    folder: Path
    results: Mapping[str, RunFile]
    runs: Mapping[str, OfflineRun]
    num_connections: int
    pid: int


def environment(directory: Path, **more: str) -> dict[str, str]:
    """Nobody is logged in, and nothing outside of `directory` is written."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    return {**ours, "HOME": str(directory), "NETRC": str(directory / "netrc"), **more}


@contextmanager
def started(flags: tuple[str, ...], env: Mapping[str, str]) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "pipespec.benchmark", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=DEADLINE_S)


def services_of(pid: int) -> list[psutil.Process]:
    """W&B's processes, which are told for whom they work."""
    found = psutil.process_iter(["name", "cmdline"])
    return [p for p in found if p.info["name"] == "wandb-core" and str(pid) in p.info["cmdline"]]


def count_connections(server: socket.socket) -> int:
    server.setblocking(False)
    count = 0
    while True:
        try:
            server.accept()[0].close()
        except BlockingIOError:
            return count
        count += 1


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> Tracked:
    """All strategies over two emulated models; what W&B takes for its server only listens. With a
    lookahead, the target uses its draft however busy the machine is."""
    folder = tmp_path_factory.mktemp("tracked")
    config, data = write_emulated(folder), write_prompts(folder, PROMPTS)
    flags = ("--models-config-path", config, "--dataset", data, "--max-new-tokens", "24")
    flags = (*flags, "--output-dir", str(folder / "results"), "--lookahead", "2")
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        env = environment(folder, WANDB_MODE="offline", WANDB_BASE_URL=url)
        with started((*flags, "--use-wandb", "--wandb-run", "trial"), env) as process:
            printed, errors = process.communicate(timeout=DEADLINE_S)
        assert process.returncode == 0, errors
        assert errors == ""
        num_connections = count_connections(server)
    results = {name: load_results(folder / "results" / file) for name, file in NAMES.items()}
    runs = read_offline_runs(folder / "results")
    return Tracked(printed, flags, folder / "results", results, runs, num_connections, process.pid)


# -- what is logged -------------------------------------------------------------------------------


def test_each_strategy_is_a_run_of_one_group_with_the_metadata_as_its_config(
    tracked: Tracked,
) -> None:
    assert set(tracked.runs) == set(NAMES)
    for strategy, run in tracked.runs.items():
        assert (run.name, run.group, run.project) == (f"trial-{strategy}", "trial", "pipespec")
        assert run.exit_code == 0
        metadata = tracked.results[strategy].metadata
        assert {key: run.config[key] for key in metadata} == metadata


@pytest.mark.parametrize("strategy", NAMES)
def test_each_sample_is_logged_under_the_keys_of_the_studies_and_under_our_own(
    tracked: Tracked, strategy: str
) -> None:
    results = tracked.results[strategy].results
    *samples, _ = tracked.runs[strategy].rows
    assert [row["pipespec/sample_index"] for row in samples] == [0, 1, 2]
    num_forwards = 0
    for row, result in zip(samples, results, strict=True):
        metrics, summary = result["metrics"], summarise([result])
        num_forwards += metrics["num_target_forwards"]
        assert row["generation step"] == num_forwards
        assert row["pipespec/tokens_per_s"] == pytest.approx(summary.tokens_per_s, rel=1e-4)
        if strategy == "greedy":
            assert "lat_tok_assisted" not in row
            continue
        share = metrics["num_accepted"][-1] / metrics["num_offered"][-1]
        assert row["accept_rate_sample"] == row["pipespec/acceptance_rate"] == pytest.approx(share)
        assert row["acceptance rate (%)"] == pytest.approx(100 * share)
        assert row["lat_tok_assisted"] == pytest.approx(metrics["time_per_token"], rel=1e-4)
        assert row["thr_assisted"] == pytest.approx(1 / metrics["time_per_token"], rel=1e-4)


@pytest.mark.parametrize("strategy", ["chain", "async-chain"])
def test_a_run_ends_with_the_comparison_with_greedy(tracked: Tracked, strategy: str) -> None:
    results, greedy = tracked.results[strategy].results, tracked.results["greedy"].results
    ours, baseline = summarise(results), summarise(greedy)
    last = tracked.runs[strategy].rows[-1]
    assert last["baseline_latency_tok"] == pytest.approx(baseline.time_per_token_s)
    assert last["baseline_thr"] == pytest.approx(baseline.tokens_per_s)
    assert last["assisted_latency_tok"] == pytest.approx(ours.time_per_token_s)
    assert last["assisted_thr"] == pytest.approx(ours.tokens_per_s)
    assert last["speedup_ratio"] == pytest.approx(speed_up(results, greedy).speed_up)
    assert last["accept_rate"] == pytest.approx(ours.acceptance_rate[-1])
    summary = tracked.runs[strategy].summary
    assert summary["pipespec/num_tokens"] == 72
    assert summary["pipespec/block_efficiency"] == pytest.approx(ours.block_efficiency[-1])


def test_rollbacks_of_chain_are_its_verifications_with_a_rejection(tracked: Tracked) -> None:
    metrics = [result["metrics"] for result in tracked.results["chain"].results]
    rejecting = 0
    for sample in metrics:
        steps = list(zip(sample["offered_tokens"][-1], sample["accepted_tokens"][-1]))
        rejecting += sum(emitted <= offered for offered, emitted in steps[:-1])
    logged = tracked.runs["chain"].rows[-1]["total_rollbacks"]
    assert rejecting <= logged <= rejecting + len(metrics)  # the last may end with the text


def test_greedy_has_the_baseline_and_nothing_of_a_draft(tracked: Tracked) -> None:
    last = tracked.runs["greedy"].rows[-1]
    assert last["baseline_thr"] == last["generation/throughput"]
    assert not {"assisted_thr", "speedup_ratio", "accept_rate", "total_rollbacks"} & set(last)
    assert "token_accuracy_table" not in tracked.runs["greedy"].tables


def test_the_table_of_accepted_tokens_counts_every_one(tracked: Tracked) -> None:
    for strategy in ("chain", "async-chain"):
        table = tracked.runs[strategy].tables["token_accuracy_table"]
        assert table["columns"] == ["token", "accepted_count"]
        counts = [count for _, count in table["data"]]
        assert counts == sorted(counts, reverse=True)
        metrics = [result["metrics"] for result in tracked.results[strategy].results]
        assert sum(counts) == sum(sample["num_accepted"][-1] for sample in metrics)
        text = "".join(result["output_text"] for result in tracked.results[strategy].results)
        assert all(token in text for token, _ in table["data"])


@pytest.mark.parametrize("strategy", NAMES)
def test_the_profile_accounts_for_the_time_of_every_stage(tracked: Tracked, strategy: str) -> None:
    table = tracked.runs[strategy].tables["profiling_summary_table"]
    total_s = summarise(tracked.results[strategy].results).total_time_s
    stages = {name.rpartition(": ")[0] for name, *_ in table["data"]}
    assert len(stages) == (1 if strategy == "greedy" else 2)
    for stage in stages:
        rows = [row for row in table["data"] if row[0].startswith(stage)]
        assert [row[0].rpartition(": ")[2] for row in rows][0::2] == ["prefill", "wait"]
        assert sum(row[2] for row in rows) >= 0.999 * total_s
        assert sum(row[4] for row in rows) == pytest.approx(sum(row[2] for row in rows) / total_s)


def test_acceptance_by_position_adds_up_to_what_was_scored_and_accepted(tracked: Tracked) -> None:
    metrics = [result["metrics"] for result in tracked.results["chain"].results]
    table = tracked.runs["chain"].tables["pipespec/acceptance_by_position"]
    _, scored, accepted, rates = zip(*table["data"])
    assert sum(scored) == sum(sample["num_offered"][-1] for sample in metrics)
    assert sum(accepted) == sum(sample["num_accepted"][-1] for sample in metrics)
    assert list(scored) == sorted(scored, reverse=True)
    assert rates == pytest.approx([part / whole for part, whole in zip(accepted, scored)])


def test_only_keys_of_the_table_and_our_own_are_logged(tracked: Tracked) -> None:
    known = {key.name for key in KEYS if key.when is not When.NEVER}
    for run in tracked.runs.values():
        for row in run.rows:
            names = {name.split("/")[0] if "_table" in name else name for name in row}
            assert {name for name in names if not name.startswith("pipespec/")} <= known


# -- how it is logged -----------------------------------------------------------------------------


def test_offline_mode_reaches_for_no_network_and_leaves_no_process(tracked: Tracked) -> None:
    assert tracked.num_connections == 0
    assert not services_of(tracked.pid)
    assert tracked.printed.count("`wandb sync` uploads ") == 3


def test_wandbs_files_are_beside_the_results_and_no_result_files(tracked: Tracked) -> None:
    assert {path.name for path in find_files([tracked.folder])} == set(NAMES.values())
    assert list(tracked.folder.glob("wandb/**/*.json"))


def test_a_benchmark_that_is_done_is_logged_from_its_files(
    tracked: Tracked, tmp_path: Path
) -> None:
    env = environment(tmp_path, WANDB_MODE="offline", WANDB_DIR=str(tmp_path))
    with started((*tracked.flags, "--use-wandb", "--strategy", "chain"), env) as process:
        printed, errors = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, errors
    assert "done before" in printed
    again = read_offline_runs(tmp_path)["chain"]
    first = tracked.runs["chain"]
    assert len(again.rows) == len(first.rows)
    speeds = [[row.get("thr_assisted") for row in run.rows[:-1]] for run in (again, first)]
    assert speeds[0] == pytest.approx(speeds[1], rel=1e-4)
    assert again.rows[-1]["speedup_ratio"] == first.rows[-1]["speedup_ratio"]


def test_an_interrupted_run_ends_the_service_and_keeps_what_was_logged(tmp_path: Path) -> None:
    config = write_emulated(tmp_path, target_ms=5.0)
    data = write_prompts(tmp_path, [f"prompt {index}" for index in range(200)])
    flags = ("--strategy", "greedy", "--models-config-path", config, "--dataset", data)
    flags = (*flags, "--max-new-tokens", "8", "--output-dir", str(tmp_path), "--use-wandb")
    partial = tmp_path / "greedy_target.json.partial"
    with started(flags, environment(tmp_path, WANDB_MODE="offline")) as process:
        wait_for_samples(partial, 3, process)
        (service,) = services_of(process.pid)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 130
    assert len(errors.splitlines()) == 1, errors
    assert not service.is_running()
    run = read_offline_runs(tmp_path)["greedy"]
    assert run.exit_code == 1
    assert len(run.rows) >= 3


def test_a_service_that_dies_costs_one_line_and_no_sample(tmp_path: Path) -> None:
    config = write_emulated(tmp_path, target_ms=5.0)
    data = write_prompts(tmp_path, [f"prompt {index}" for index in range(15)])
    flags = ("--models-config-path", config, "--dataset", data, "--max-new-tokens", "8")
    flags = (*flags, "--output-dir", str(tmp_path), "--use-wandb", "--lookahead", "2")
    partial = tmp_path / "greedy_target.json.partial"
    with started(flags, environment(tmp_path, WANDB_MODE="offline")) as process:
        wait_for_samples(partial, 2, process)
        (service,) = services_of(process.pid)
        service.kill()
        printed, errors = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, errors
    assert errors == ""
    assert printed.count("W&B failed (") == 1
    assert printed.count("W&B") == 2  # where it was logged to, and that it failed
    for name in NAMES.values():
        assert len(load_results(tmp_path / name).results) == 15


def wait_for_samples(partial: Path, count: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not partial.exists() or partial.read_text().count('{"result"') < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"{count} samples took too long"
        time.sleep(0.01)


def test_without_a_login_the_command_stops_before_anything_runs(tmp_path: Path) -> None:
    flags = ("--models-config-path", write_emulated(tmp_path), "--output-dir", str(tmp_path / "r"))
    with started((*flags, "--use-wandb"), environment(tmp_path)) as process:
        printed, errors = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 2
    assert printed == ""
    (line,) = errors.splitlines()
    assert "`wandb login`" in line
    assert "WANDB_MODE=offline" in line
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("flag", ["--wandb-project", "--wandb-entity", "--wandb-run"])
def test_where_to_log_without_logging_is_an_error(
    flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_emulated(tmp_path)
    assert benchmark.main(["--models-config-path", config, flag, "mine"]) == 2
    assert capsys.readouterr().err == f"error: {flag} does nothing without --use-wandb; add that\n"
