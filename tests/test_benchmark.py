"""The benchmark as a user runs it: real worker processes, real files, models without weights."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from emulated import write_emulated, write_prompts

from pipespec import benchmark, print_benchmark_stats
from pipespec.results import load_results

PROMPTS = ("def mean(values):", "class Stack:", "import os\n")
STRATEGIES = ("greedy", "chain", "async-chain")
ORIGINAL_METADATA = ("strategy", "model_configs", "lookahead", "dataset", "num_samples")
ORIGINAL_RESULT = ("sample_index", "strategy", "metrics", "output_text", "input_text", "gpustats")


@dataclass(frozen=True)
class Finished:
    """A benchmark that ran to its end: its flags, its folder of result files, what it printed."""

    flags: tuple[str, ...]
    folder: Path
    printed: str

    def file(self, strategy: str) -> Path:
        names = "target" if strategy == "greedy" else "draft-middle-target"
        suffix = "" if strategy == "greedy" else "_auto"
        return self.folder / f"{strategy}_{names}{suffix}.json"


def command(*flags: str) -> list[str]:
    return [sys.executable, "-m", "pipespec.benchmark", *flags]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """All strategies over three emulated models and three prompts, in a process of its own."""
    folder = tmp_path_factory.mktemp("finished")
    config, data = write_emulated(folder, 3), write_prompts(folder, PROMPTS)
    flags = ("--models-config-path", config, "--dataset", data, "--max-new-tokens", "24")
    results = folder / "results"
    run = subprocess.run(
        command(*flags, "--output-dir", str(results)),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    return Finished(flags, results, run.stdout)


@pytest.fixture
def again(finished: Finished, tmp_path: Path) -> Finished:
    """A copy of the finished benchmark, to run its command on once more."""
    folder = Path(shutil.copytree(finished.folder, tmp_path / "results"))
    return Finished((*finished.flags, "--output-dir", str(folder)), folder, "")


# -- what a run leaves and prints -----------------------------------------------------------------


def test_one_table_compares_all_strategies_and_says_where_the_files_are(finished: Finished) -> None:
    lines = [line.split() for line in finished.printed.splitlines()]
    rows = {words[0]: words for words in lines if words and words[0] in STRATEGIES}
    assert list(rows) == list(STRATEGIES)
    assert rows["greedy"][-1] == "-"
    assert rows["chain"][-1] == rows["async-chain"][-1] == "yes"
    for strategy in STRATEGIES:
        assert finished.file(strategy).is_file()
        assert str(finished.file(strategy)) in finished.printed


def test_the_statistics_of_its_files_are_what_it_printed(
    finished: Finished, capsys: pytest.CaptureFixture[str]
) -> None:
    """One definition of every number, for the run at hand and for reading it later."""
    printed = {words[0]: words for line in finished.printed.splitlines() if (words := line.split())}
    capsys.readouterr()
    assert print_benchmark_stats.main([str(finished.folder), "--format", "json"]) == 0
    (table,) = json.loads(capsys.readouterr().out)
    assert [row["strategy"] for row in table["rows"]] == list(STRATEGIES)
    for row in table["rows"]:
        rates = [f"{rate:.3f}" for rate in row["acceptance_rate"]]
        blocks = [f"{tokens:.2f}" for tokens in row["block_efficiency"]]
        speeds = [f"{row['tokens_per_s']:,.1f}", f"{row['ms_per_token']:.2f}"]
        words = printed[row["strategy"]]
        assert words[1:3] == speeds
        assert words[5:-1] == [
            f"{row['speed_up_same_prompts']:.2f}x", *(rates or ["-"]), *(blocks or ["-"]),
        ]  # fmt: skip


def test_what_is_no_terminal_gets_plain_lines(finished: Finished) -> None:
    assert "\x1b" not in finished.printed
    assert "\r" not in finished.printed
    assert "async-chain: loading draft middle target" in finished.printed


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_result_file_has_the_originals_keys_first_and_ours_after_them(
    finished: Finished, strategy: str
) -> None:
    run = load_results(finished.file(strategy))
    assert tuple(run.metadata)[:5] == ORIGINAL_METADATA
    assert type(run.metadata["lookahead"]) is int
    assert run.metadata["lookahead_mode"] == ("none" if strategy == "greedy" else "auto")
    for key in ("schema_version", "versions", "host", "commit", "pids", "dataset_digest"):
        assert run.metadata[key] is not None or key == "commit"
    assert run.metadata["versions"]["torch"]
    assert [result["sample_index"] for result in run.results] == [0, 1, 2]
    for result, prompt in zip(run.results, PROMPTS, strict=True):
        assert tuple(result)[:6] == ORIGINAL_RESULT
        assert result["input_text"] == prompt
        assert result["metrics"]["tokens_generated"] == 24 == len(result["output_ids"])
        assert len(result["token_lengths"]) == 24
        assert sum(result["token_lengths"]) == len(result["output_text"])


@pytest.mark.parametrize("strategy", ["chain", "async-chain"])
def test_verifications_of_the_target_account_for_every_token(
    finished: Finished, strategy: str
) -> None:
    run = load_results(finished.file(strategy))
    assert run.metadata["effective_schedule"]["lookahead"] == run.metadata["lookahead"]
    for result in run.results:
        metrics = result["metrics"]
        assert 1 + sum(metrics["accepted_tokens"][-1]) == metrics["tokens_generated"]
        assert len(metrics["model_times"]) == 3
        assert len(metrics["acceptance_rate"]) == 2


def test_every_strategy_writes_the_same_tokens(finished: Finished) -> None:
    outputs = [
        [result["output_ids"] for result in load_results(finished.file(strategy)).results]
        for strategy in STRATEGIES
    ]
    assert outputs[0] == outputs[1] == outputs[2]
    assert len({tuple(ids) for ids in outputs[0]}) == len(PROMPTS)


def test_async_chain_has_a_process_for_every_model_and_none_is_left(finished: Finished) -> None:
    in_one = load_results(finished.file("chain")).metadata["pids"]
    pids = load_results(finished.file("async-chain")).metadata["pids"]
    assert len(in_one) == 1
    assert len(set(pids)) == 3
    assert not set(in_one) & set(pids)
    assert not [pid for pid in pids if psutil.pid_exists(pid)]


# -- running it again -----------------------------------------------------------------------------


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


def test_a_finished_run_is_skipped_and_its_table_printed(
    again: Finished, finished: Finished, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in again.folder.iterdir()}
    assert benchmark.main([*again.flags]) == 0
    printed = capsys.readouterr().out
    assert printed.count("done before") == 3
    assert "loading" not in printed
    table = finished.printed[finished.printed.index("strategy ") :].splitlines()[:5]
    assert "\n".join(table) in printed
    assert {path: path.read_bytes() for path in again.folder.iterdir()} == before


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (("--max-new-tokens", "7"), "max_new_tokens (24 there, 7 now)"),
        (("--num-samples", "2"), "num_samples (3 there, 2 now)"),
        (("--temperature", "0.5"), "sampling"),
        (("--stop", "x"), "stop"),
    ],
)
def test_a_file_of_another_run_stops_the_command_and_is_kept(
    change: tuple[str, ...],
    named: str,
    again: Finished,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = {path: path.read_bytes() for path in again.folder.iterdir()}
    assert benchmark.main([*again.flags, *change]) == 2
    line = one_line(capsys)
    assert named in line
    assert str(again.file("greedy")) in line
    assert "--force" in line
    assert {path: path.read_bytes() for path in again.folder.iterdir()} == before


def test_other_prompts_in_a_file_of_the_same_name_are_noticed(
    again: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_prompts(tmp_path, [*PROMPTS[:2], "import sys\n"])
    assert benchmark.main([*again.flags, "--dataset", other]) == 2
    assert "dataset_digest" in one_line(capsys)


def test_force_overwrites(again: Finished) -> None:
    change = ["--strategy", "greedy", "--max-new-tokens", "7", "--force"]
    assert benchmark.main([*again.flags, *change]) == 0
    run = load_results(again.file("greedy"))
    assert run.metadata["max_new_tokens"] == 7
    assert [result["metrics"]["tokens_generated"] for result in run.results] == [7, 7, 7]


def test_a_strategy_alone_is_compared_with_the_greedy_run_that_is_there(
    again: Finished, capsys: pytest.CaptureFixture[str]
) -> None:
    again.file("chain").unlink()
    assert benchmark.main([*again.flags, "--strategy", "chain"]) == 0
    printed = capsys.readouterr().out
    assert f"in {again.file('greedy')}" in printed
    (row,) = [line for line in printed.splitlines() if line.startswith("chain ")]
    assert row.endswith("yes")
    metadata = load_results(again.file("chain")).metadata
    assert metadata["greedy_comparison"] == {"num_compared": 3, "num_different": 0}


# -- flags ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "name", "lookahead"),
    [
        ("--strategy async-chain --lookahead 0 --policy pipespec", "async-chain_draft-target_0", 0),
        ("--strategy async-chain --lookahead 2 --transport tcp", "async-chain_draft-target_2", 2),
        ("--strategy chain --lookahead 3", "chain_draft-target_3", 3),
    ],
)
def test_a_lookahead_is_in_the_file_name_and_obeyed(
    flags: str, name: str, lookahead: int, tmp_path: Path
) -> None:
    config, data = write_emulated(tmp_path), write_prompts(tmp_path, PROMPTS[:1])
    written = [*flags.split(), "--models_config_path", config, "--dataset", data]
    assert benchmark.main([*written, "--output_dir", str(tmp_path), "--max_new_tokens=20"]) == 0
    run = load_results(tmp_path / f"{name}.json")
    assert run.metadata["lookahead"] == lookahead
    assert run.metadata["lookahead_mode"] == "fixed"
    if run.metadata["strategy"] == "chain":
        assert max(run.results[0]["metrics"]["offered_tokens"][0]) == lookahead


def as_jsonl(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "set.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def as_json(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "set.json"
    path.write_text(json.dumps(rows, indent=1))
    return path


def as_folder(folder: Path, rows: list[dict[str, Any]]) -> Path:
    import datasets

    path = folder / "set"
    datasets.Dataset.from_list(rows).save_to_disk(str(path))
    return path


@pytest.mark.parametrize("save", [as_jsonl, as_json, as_folder])
def test_a_data_set_is_the_same_in_every_form(
    save: Callable[[Path, list[dict[str, Any]]], Path], tmp_path: Path
) -> None:
    path = save(tmp_path, [{"question": text} for text in PROMPTS])
    flags = ["--strategy", "greedy", "--models-config-path", write_emulated(tmp_path)]
    results = tmp_path / "results"
    written = [*flags, "--dataset", str(path), "--output-dir", str(results)]
    assert benchmark.main([*written, "--num-samples", "2", "--max-new-tokens", "5"]) == 0
    run = load_results(results / "greedy_target.json")
    assert run.metadata["dataset"] == "set"
    assert run.metadata["dataset_source"] == str(path)
    assert run.metadata["dataset_digest"].startswith("ad850423")
    assert [result["input_text"] for result in run.results] == list(PROMPTS[:2])


@pytest.mark.parametrize(
    ("flags", "prompt"),
    [([], "user: Hi\nassistant: "), (["--no-generation-prompt"], "user: Hi\n")],
)
def test_a_conversation_ends_in_the_replys_header_unless_told_otherwise(
    flags: list[str], prompt: str, tmp_path: Path
) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    data = as_jsonl(tmp_path, [{"conversation": turns}])
    written = ["--strategy", "greedy", "--models-config-path", write_emulated(tmp_path), *flags]
    written += ["--dataset", str(data), "--output-dir", str(tmp_path), "--max-new-tokens", "3"]
    assert benchmark.main(written) == 0
    run = load_results(tmp_path / "greedy_target.json")
    assert run.results[0]["input_text"] == prompt
    assert run.metadata["generation_prompt"] is (not flags)
