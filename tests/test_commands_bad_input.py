"""Whatever a user gets wrong is answered by one line that says what to do, exit code 2, no file."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from emulated import write_emulated
from processes import run_python

from pipespec import benchmark, run_example
from pipespec.commands.arguments import Parser
from pipespec.errors import UsageError

TARGET = "pipespec:demo/target-12M"
Main = Callable[[list[str]], int]


def write_models(folder: Path, *models: dict[str, Any]) -> str:
    path = folder / "models.json"
    path.write_text(json.dumps(models))
    return str(path)


def one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], main: Main = benchmark.main
) -> str:
    """Runs a command that must fail as promised; returns its line."""
    capsys.readouterr()
    assert main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--num-samples -1", "--num-samples is -1"),
        ("--num-samples 0", "--num-samples is 0"),
        ("--num-samples many", "--num-samples: invalid int value: 'many'"),
        ("--max-new-tokens 0", "--max-new-tokens is 0"),
        ("--temperature -1", "--temperature is -1"),
        ("--temperature nan", "--temperature is nan"),
        ("--top-p 0", "--top-p is 0"),
        ("--top-k -3", "--top-k is -3"),
        ("--min-p 1", "--min-p is 1"),
        ("--seed -1", "--seed is -1"),
        ("--lookahead -1", "--lookahead is -1"),
        ("--lookahead soon", "--lookahead: soon is neither auto nor an integer"),
        ("--strategy chain --lookahead 0", "chain drafts at least 1 token"),
        ("--strategy all --lookahead 0", "--strategy async-chain"),
        ("--run-ahead 0", "--run-ahead is 0"),
        ("--ready-timeout 0", "--ready-timeout is 0"),
        ("--ready-timeout inf", "--ready-timeout is inf"),
        ("--strategy fastest", "invalid choice: 'fastest'"),
        ("--policy guess", "invalid choice: 'guess'"),
        ("--runner vllm", "invalid choice: 'vllm'"),
        ("--num-sample 3", "unrecognized arguments: --num-sample 3"),
        ("--force --resume", "--force and --resume"),
        ("--models-config-path nowhere.json", "configs/models/demo.json"),
        ("--dataset nowhere.jsonl", "there is no file or folder nowhere.jsonl"),
    ],
)
def test_a_wrong_flag_is_named(
    flags: str, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "results"
    line = one_line(capsys, [*flags.split(), "--output-dir", str(results)])
    assert named in line
    assert not list(results.glob("*"))


def test_an_empty_stop_text_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--stop" in one_line(capsys, ["--stop", ""])


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("", "has no rows"),
        ("\n\n", "has no rows"),
        ("{not json\n", "line 1 is not JSON"),
        ('{"prompt": "a"}\n[1, 2]\n', "line 2 is not an object"),
        ('{"answer": "42"}\n', "has none of the columns"),
        ('{"prompt": "  "}\n', '"prompt" is empty'),
        ('{"conversation": [{"role": "user"}]}\n', "turn 1"),
        (json.dumps({"prompt": "word " * 3000}), "sample 0"),
    ],
    ids=["empty", "blank", "not-json", "no-object", "no-column", "no-text", "no-turn", "too-long"],
)
def test_a_wrong_data_set_is_named(
    content: str, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, results = tmp_path / "prompts.jsonl", tmp_path / "results"
    data.write_text(content)
    line = one_line(capsys, ["--dataset", str(data), "--output-dir", str(results)])
    assert named in line
    assert "prompts.jsonl" in line
    assert not results.exists()


def test_a_prompt_longer_than_the_context_says_both_lengths(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "prompts.jsonl"
    data.write_text(json.dumps({"prompt": "word " * 3000}))
    line = one_line(capsys, ["--dataset", str(data)])
    assert "target-12M's context; shorten it" in line


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"devices": "gpu:0"}, '"devices" is "gpu:0"'),
        ({"devices": "cpu:4000"}, "cpu:4000"),
        ({"devices": []}, '"devices" is empty'),
        ({"dtype": "float8"}, '"dtype" is "float8"'),
        ({"device": "cpu"}, 'unknown key "device" (did you mean "devices"?)'),
        ({"runner": "fast"}, '"runner" is "fast"'),
        ({"path": "pipespec:demo/target-12G"}, "did you mean pipespec:demo/target-12M"),
        ({"path": "./nowhere"}, "./nowhere: there is no such folder"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_wrong_model_is_named(
    change: dict[str, Any],
    named: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    target = {"path": TARGET, "devices": "cpu", "dtype": "float32"}
    config = write_models(tmp_path, target, {**target, **change})
    results = tmp_path / "results"
    line = one_line(capsys, ["--models-config-path", config, "--output-dir", str(results)])
    assert named in line
    assert not results.exists()


@pytest.mark.parametrize("content", ["{", "{}", "[]", '["a"]', "[{}]", ""])
def test_a_models_config_of_another_form_is_named(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "models.json"
    path.write_text(content)
    assert "models.json" in one_line(capsys, ["--models-config-path", str(path)])


@pytest.mark.parametrize("strategy", ["chain", "async-chain", "all"])
def test_one_model_is_enough_for_greedy_only(
    strategy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_models(tmp_path, {"path": TARGET, "devices": "cpu"})
    line = one_line(capsys, ["--strategy", strategy, "--models-config-path", config])
    assert "needs a draft and a target" in line
    assert "--strategy greedy" in line


def test_a_folder_that_cannot_be_written_is_named_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    line = one_line(capsys, ["--output-dir", str(tmp_path / "file" / "results")])
    assert "--output-dir: cannot write" in line


def test_missing_gpus_are_reported_before_the_hub_is_asked(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    flags = ["--strategy", "async-chain", "--models-config-path", "configs/models/llama3.json"]
    line = one_line(capsys, flags)
    assert "meta-llama/Llama-3.2-1B-Instruct wants cuda:0, but this machine shows no GPU" in line


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--sample-index", "-1"], "--sample-index is -1"),
        (["--sample-index", "100000"], "has only"),
        (["--prompt", ""], "--prompt is empty"),
        (["--prompt", "word " * 3000], "--prompt has"),
        (["--prompt", "a", "--dataset", "stdlib"], "--prompt and --dataset"),
        (["--strategy", "all"], "invalid choice: 'all'"),
    ],
)
def test_run_example_names_what_is_wrong_with_its_prompt(
    flags: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert named in one_line(capsys, flags, run_example.main)


@pytest.mark.parametrize("module", ["pipespec.benchmark", "pipespec.run_example"])
def test_help_is_grouped_and_loads_no_torch(module: str) -> None:
    code = (
        f"import sys, {module} as command\n"
        "try: command.main(['--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
    )
    run = run_python(code)
    assert run.returncode == 0, run.stderr
    for text in ("what to run:", "the text:", "schedule and processes:", "--lookahead auto|N"):
        assert text in run.stdout


def test_a_flag_may_be_written_with_underscores_and_its_value_is_left_alone() -> None:
    parser = benchmark.make_parser()
    written = ["--num_samples", "3", "--models_config_path=my_models.json", "--stop", "a_b"]
    options = parser.parse_args([*written, "--no_generation_prompt", "--max_new_tokens=7"])
    assert options.num_samples == 3
    assert options.models_config_path == "my_models.json"
    assert options.stop == ["a_b"]
    assert options.no_generation_prompt
    assert options.max_new_tokens == 7


def complaint(parser: Parser, flag: str) -> str:
    """What a parser says of a flag: also that its value is wrong, or that it takes none."""
    try:
        parser.parse_args([flag])
    except UsageError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("command", [benchmark, run_example])
def test_every_flag_of_several_words_has_both_spellings(command: Any) -> None:
    parser = command.make_parser()
    flags = set(re.findall(r"--[a-z]+(?:-[a-z]+)+", parser.format_help()))
    assert {"--models-config-path", "--max-new-tokens", "--ready-timeout"} <= flags
    for flag in flags:
        assert "unrecognized" not in complaint(parser, f"--{flag[2:].replace('-', '_')}=1")
    assert "unrecognized" in complaint(parser, "--no_such_flag=1")


def test_the_defaults_suit_the_models(tmp_path: Path) -> None:
    from pipespec.commands.settings import read_settings

    parser = benchmark.make_parser()
    shipped = read_settings(parser.parse_args([]))
    assert (shipped.dataset, shipped.generation.max_new_tokens) == ("stdlib", 128)
    assert shipped.strategies == ("greedy", "chain", "async-chain")
    flags = ["--models-config-path", "configs/models/llama3.json"]
    hub = read_settings(parser.parse_args(flags))
    assert (hub.dataset, hub.generation.max_new_tokens) == ("humaneval", 4096)
    assert [model.name for model in hub.models][-1] == "Meta-Llama-3.1-70B-Instruct"


def test_lookahead_0_is_the_papers_setting_for_async_chain() -> None:
    from pipespec.commands.settings import read_settings

    flags = ["--strategy", "async-chain", "--lookahead", "0", "--policy", "pipespec"]
    settings = read_settings(benchmark.make_parser().parse_args(flags))
    assert settings.schedule.lookahead == 0
    assert settings.schedule_of("async-chain").policy == "pipespec"


def test_a_dry_run_tells_memory_and_placement_without_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ["--models-config-path", "configs/models/llama3.json", "--dry-run"]
    assert benchmark.main(flags) == 0
    shown = capsys.readouterr().out
    for text in ("Meta-Llama-3.1-70B-Instruct", "cuda:2 cuda:3", "KV cache", "GiB"):
        assert text in shown
    assert not list(tmp_path.iterdir())


def test_weights_that_are_not_here_are_named_with_what_to_do(tmp_path: Path) -> None:
    """A gated model of the hub, on a machine that cannot ask the hub."""
    name = "meta-llama/Llama-3.2-1B-Instruct"
    config = write_models(tmp_path, *[{"path": name, "devices": "cpu"}] * 2)
    command = [sys.executable, "-m", "pipespec.benchmark", "--models-config-path", config]
    run = subprocess.run(
        command,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.returncode == 2
    (line,) = run.stderr.splitlines()
    assert line.startswith(f"error: {name} is not in the Hugging Face cache")
    assert "a gated model also needs HF_TOKEN" in line


def test_a_folder_without_weights_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    config = write_models(tmp_path, *[{"path": "model", "devices": "cpu"}] * 2)
    line = one_line(capsys, ["--models-config-path", config])
    assert "has no model.safetensors; it is not a complete model" in line


@pytest.mark.parametrize("strategy", ["greedy", "chain", "async-chain"])
def test_a_model_that_cannot_be_loaded_is_named_by_whoever_loads_it(
    strategy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_emulated(tmp_path, context_length=4000, typo=1)
    results = tmp_path / "results"
    flags = ["--models-config-path", config, "--output-dir", str(results)]
    line = one_line(capsys, [*flags, "--strategy", strategy])
    assert 'target: unknown key "typo" in "emulated"' in line
    assert not list(results.glob("*"))
