"""`python -m pipespec.plan`, whole: real processes and tiny models, emulated ones beside a run."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from emulated import write_emulated, write_prompts
from processes import nothing_left_in
from tiny import END, make_tiny, save_tokenizer

from pipespec import benchmark, plan
from pipespec.config import GenerationParams, SamplingParams, Schedule, load_models_config
from pipespec.decoding import (
    AsyncChainSpeculativeDecoder,
    ChainSpeculativeDecoder,
    open_hierarchy,
)
from pipespec.messages import Submit
from pipespec.metrics import StageCounts
from pipespec.planning import measure, running, search
from pipespec.planning.system import Choice, emulated_system
from pipespec.results import load_results

PROMPTS = ["def mean(values):\n", "The quick brown fox"]


def shown(arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Runs the command; its standard output."""
    capsys.readouterr()
    assert plan.main(list(arguments)) == 0
    return capsys.readouterr().out


def ranking_rows(printed: str) -> list[str]:
    """Each begins with its rank and its stages; the rows of runs begin with stages."""
    return [line for line in printed.splitlines() if re.match(r"\d+  \d", line)]


def widest_of_tables(printed: str) -> int:
    """The width of the rules below the headers."""
    return max(len(line) for line in printed.splitlines() if line.startswith("─"))


def blurred(source: Path, folder: Path, noise: float) -> None:
    """The same model with noise on its weights: a draft that is right now and then."""
    import torch
    from safetensors.torch import load_file, save_file

    make_tiny(folder, vocab_size=END + 1, seed=0, **OPTIONS)
    weights = load_file(source / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for name, weight in weights.items():
        weights[name] = weight + noise * torch.randn(weight.shape, generator=generator)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


OPTIONS: dict[str, Any] = {
    "max_position_embeddings": 256,
    "eos_token_id": END,
    "bos_token_id": None,
}


@pytest.fixture(scope="module")
def tiny_flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A tiny model, a blurred copy of it as its draft, and two prompts."""
    folder = tmp_path_factory.mktemp("models")
    target = make_tiny(folder / "target", vocab_size=END + 1, seed=0, **OPTIONS)
    blurred(target, folder / "draft", 0.02)
    entries = []
    for name in ("draft", "target"):
        save_tokenizer(folder / name)
        entries.append({"path": name, "devices": "cpu", "dtype": "float32", "threads": 1})
    (folder / "models.json").write_text(json.dumps(entries))
    data = write_prompts(folder, PROMPTS)
    config = str(folder / "models.json")
    return ["--models-config-path", config, "--dataset", data, "--max-new-tokens", "24"]


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few texts are measured and simulated: that a plan comes out is tested here, how good its
    numbers are where they are made."""
    monkeypatch.setattr(running, "_ENOUGH_S", 0.1)
    monkeypatch.setattr(search, "LONG_TOKENS", 400)


# Real models


def test_tiny_models_are_measured_planned_written_and_run(
    tiny_flags: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(measure, "_TABLE_S", 0.05)
    monkeypatch.setattr(measure, "_TOGETHER_S", 0.05)
    profile, config = tmp_path / "profile.json", tmp_path / "best.json"
    kept = [*tiny_flags, "--profile", str(profile)]
    with nothing_left_in(tmp_path):
        printed = shown(
            [*kept, "--write", str(config), "--run", "--output-dir", str(tmp_path / "runs")],
            capsys,
        )
    assert widest_of_tables(printed) <= 80, printed
    assert "pipeline" in printed and "off by" in printed
    # The texts that were measured are those that the run wrote.
    measured = json.loads(profile.read_text())
    (greedy,) = (tmp_path / "runs").glob("greedy_*.json")
    outputs = [result["output_ids"] for result in load_results(greedy).results]
    texts = [measured["parts"][f"text/{number}"] for number in range(len(outputs))]
    assert [text["tokens"] for text in texts] == outputs
    # What was written is a config, and the command that was printed is one that can be given.
    names = [model.name for model in load_models_config(config)]
    assert names[-1] == "target"
    (command,) = [line for line in printed.splitlines() if line.startswith("python -m ")]
    options = benchmark.make_parser().parse_args(shlex.split(command)[3:])
    assert options.models_config_path == str(config)
    open_hierarchy(load_models_config(config))
    # The second time nothing is measured.
    before = profile.stat().st_mtime_ns
    again = shown(kept, capsys)
    assert profile.stat().st_mtime_ns == before
    assert ranking_rows(again) == ranking_rows(printed) != []


def test_a_profile_of_another_text_is_refused_before_anything_is_measured(
    tiny_flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "profile.json"
    path.write_text('{"pipespec_profile": 2, "identity": {}}')
    assert plan.main([*tiny_flags, "--profile", str(path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    (line,) = [line for line in lines if line.startswith("error: ")]
    assert "was measured with another models config" in line


# Emulated models


def emulated_choice(
    folder: Path, choice: Choice, num_tokens: int, text: str = PROMPTS[0]
) -> tuple[list[StageCounts], list[StageCounts], Any, Any]:
    """(predicted counts, counts of a run) of each stage, and both texts."""
    models = load_models_config(Path(write_emulated(folder, len(choice.stages), target_ms=4.0)))
    hierarchy = open_hierarchy(models)
    prompt = tuple(hierarchy.tokenizer.encode(text))
    submit = Submit(0, prompt, (), SamplingParams(), num_tokens, (), ())
    system = emulated_system(models, [submit], hierarchy.vocab_size)
    prediction = system.predict(choice)
    params = GenerationParams(max_new_tokens=num_tokens)
    made = ChainSpeculativeDecoder if choice.strategy == "chain" else AsyncChainSpeculativeDecoder
    with made(hierarchy, choice.schedule) as decoder:
        decoder.generate(prompt, GenerationParams(max_new_tokens=16))
        output = decoder.generate(prompt, params)
    ran = [StageCounts.from_values(counts) for counts in output.counts]
    return [stage[0] for stage in prediction.stages], ran, prediction.outputs[0], output.token_ids


@pytest.mark.parametrize("num_models", [2, 3])
def test_a_chain_is_predicted_to_the_last_verification(num_models: int, tmp_path: Path) -> None:
    choice = Choice(tuple(range(num_models)), "chain", Schedule(lookahead=4))
    predicted, ran, text, written = emulated_choice(tmp_path, choice, 80)
    assert text == written
    # At the end of the text the draft's last burst may be longer than what is still verified.
    assert 0 <= len(ran[0].offered) - len(predicted[0].offered) < 4
    for one, other in zip(predicted[1:], ran[1:], strict=True):
        assert one.offered == other.offered
        assert one.accepted == other.accepted
        assert one.emitted == other.emitted
        assert one.num_drafted == other.num_drafted


def test_async_chain_is_predicted_to_the_last_verification_too(tmp_path: Path) -> None:
    """Draft and target take turns from the first token on, about which the draft is wrong, so that
    it does not matter who is late. (A draft that is right there is a token ahead: the target goes
    on without a candidate for as long as each draft of one comes during its step.)"""
    choice = Choice((0, 1), "async-chain", Schedule(lookahead=1, run_ahead=1))
    predicted, ran, text, written = emulated_choice(tmp_path, choice, 60, "a")
    assert text == written
    *all_but_the_last, _ = predicted[-1].offered
    assert set(all_but_the_last) == {1}, "they take turns"
    assert predicted[-1].offered == ran[-1].offered
    assert predicted[-1].accepted == ran[-1].accepted
    assert predicted[-1].emitted == ran[-1].emitted


@pytest.fixture
def emulated_flags(tmp_path: Path) -> list[str]:
    """A draft four times as fast as the target, and two prompts."""
    data = write_prompts(tmp_path, PROMPTS)
    config = write_emulated(tmp_path, target_ms=4.0)
    return ["--models-config-path", config, "--dataset", data, "--max-new-tokens", "24"]


def test_of_emulated_models_only_what_runs_add_is_measured_and_once(
    emulated_flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "profile.json"
    kept = [*emulated_flags, "--profile", str(path)]
    lines = [line for line in shown(kept, capsys).splitlines() if "simulated" not in line]
    assert any(line.startswith("emulated models; what runs add measured") for line in lines)
    assert any(line.startswith("python -m pipespec.benchmark ") for line in lines)
    parts = json.loads(path.read_text())["parts"]
    assert set(parts) == {"greedy", "in-chain", "hop", "async/0/1"}
    again = [line for line in shown(kept, capsys).splitlines() if "simulated" not in line]
    assert lines == again


def test_a_run_is_compared_with_what_was_predicted(
    emulated_flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "runs"
    printed = shown([*emulated_flags, "--run", "--output-dir", str(folder)], capsys)
    files = sorted(folder.glob("*.json"))
    assert len(files) == 2
    assert all(str(path) in printed for path in files)
    assert printed.count("beyond the ideal") == 2
    assert widest_of_tables(printed) <= 80, printed


@pytest.mark.alone
def test_a_device_more_is_answered_for_target_and_draft(
    emulated_flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tables = tmp_path / "tables.json"
    tables.write_text(json.dumps({"1": {"1": 4.0}, "2": {"1": 3.5}}))
    printed = shown(
        [*emulated_flags, "--target-step-ms", str(tables), "--num-devices", "2"], capsys
    )
    assert "a device more for the target: +1" in printed
    assert "a device more for a draft: +" in printed
    assert "best of all: 1 device for the target, draft: " in printed


@pytest.mark.alone
def test_a_config_without_a_draft_that_pays_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_emulated(tmp_path, agreement=0.02)
    data = write_prompts(tmp_path, PROMPTS)
    written = tmp_path / "best.json"
    printed = shown(
        ["--models-config-path", config, "--dataset", data, "--max-new-tokens", "16",
         "--write", str(written)],
        capsys,
    )  # fmt: skip
    assert "best: greedy of target" in printed
    assert any(line.startswith("without draft: +") for line in printed.splitlines())
    assert [model.name for model in load_models_config(written)] == ["target"]


# Mistakes


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--num-devices", "2"], "--target-step-ms and --num-devices go together"),
        (["--target-step-ms", "x.json", "--num-devices", "0"], "--num-devices is 0"),
        (["--target-step-ms", "x.json", "--num-devices", "2"], "x.json: No such file"),
        (["--profile", "/nowhere/at/all.json"], "--profile: there is no folder /nowhere/at"),
        (["--num-samples", "0"], "--num-samples is 0"),
        (["--write", "/nowhere/at/all.json"], "--write: there is no folder /nowhere/at"),
        (["--write", "."], "--write: . is a folder; name a file"),
        (["--write", "/proc/models.json"], "--write: cannot write /proc/models.json"),
        (["--run", "--output-dir", __file__], "--output-dir: cannot write to"),
        (["--lookahead", "3"], "unrecognized arguments: --lookahead"),
    ],
)
def test_a_mistake_is_told_in_one_line(
    emulated_flags: list[str], flags: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan.main([*emulated_flags, *flags]) == 2
    printed = capsys.readouterr()
    lines = [line for line in printed.err.splitlines() if line.startswith("error")]
    assert len(lines) == 1 and told in lines[0]
    assert not printed.out, "said before anything is measured or simulated"


def test_one_model_is_nothing_to_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main(["--models-config-path", write_emulated(tmp_path, 1)]) == 2
    assert "has one model: there is nothing to plan" in capsys.readouterr().err
