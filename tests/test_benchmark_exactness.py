"""Every strategy writes the target's own text; where one does not, the run says how near it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import END, make_tiny, save_tokenizer

from pipespec import benchmark
from pipespec.commands.equality import Divergence, first_divergence, score_margin
from pipespec.config import SamplingParams
from pipespec.results import load_results
from pipespec.sampling import TOKEN_STREAM, gumbel_noise


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A draft and a target with random weights of their own, and two prompts."""
    folder = tmp_path_factory.mktemp("models")
    entries = []
    for seed, name in enumerate(("draft", "target")):
        options = {"max_position_embeddings": 256, "eos_token_id": END, "bos_token_id": None}
        path = make_tiny(folder / name, vocab_size=END + 1, seed=seed, **options)
        save_tokenizer(path)
        entries.append({"path": str(path), "devices": "cpu", "dtype": "float32", "threads": 1})
    (folder / "models.json").write_text(json.dumps(entries))
    prompts = [{"text": "The quick brown fox"}, {"text": "def add(a, b):"}]
    (folder / "prompts.json").write_text(json.dumps(prompts))
    return [
        *("--models-config-path", str(folder / "models.json")),
        *("--dataset", str(folder / "prompts.json"), "--max-new-tokens", "24"),
    ]


def outputs_of(folder: Path, pattern: str) -> list[list[int]]:
    (path,) = folder.glob(pattern)
    return [result["output_ids"] for result in load_results(path).results]


def test_sampled_text_is_the_same_from_every_strategy(flags: list[str], tmp_path: Path) -> None:
    flags = [*flags, "--temperature", "1.3", "--top-p", "0.95", "--top-k", "200"]
    flags += ["--min-p", "0.001"]
    assert benchmark.main([*flags, "--seed", "7", "--output-dir", str(tmp_path / "7")]) == 0
    sampled = outputs_of(tmp_path / "7", "greedy_*")
    assert outputs_of(tmp_path / "7", "chain_*") == sampled
    assert outputs_of(tmp_path / "7", "async-chain_*") == sampled

    other = ["--seed", "8", "--strategy", "greedy", "--output-dir", str(tmp_path / "8")]
    assert benchmark.main([*flags, *other]) == 0
    assert outputs_of(tmp_path / "8", "greedy_*") != sampled


# -- where an output differs from greedy's --------------------------------------------------------


@pytest.fixture
def greedy_file(flags: list[str], tmp_path: Path) -> Path:
    assert benchmark.main([*flags, "--strategy", "greedy", "--output-dir", str(tmp_path)]) == 0
    return tmp_path / "greedy_target.json"


def put_token(path: Path, sample: int, position: int, token: int) -> None:
    """Makes a result file tell of another token than the one that was generated."""
    content = json.loads(path.read_text())
    content["results"][sample]["output_ids"][position] = token
    path.write_text(json.dumps(content))


def run_chain(
    flags: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> tuple[str, dict[str, Any]]:
    """Runs chain against the greedy file that is there; what it printed, and its result file."""
    capsys.readouterr()
    assert benchmark.main([*flags, "--strategy", "chain", "--output-dir", str(folder)]) == 0
    content = json.loads((folder / "chain_draft-target_auto.json").read_text())
    return capsys.readouterr().out, content


def test_a_difference_that_no_rounding_explains_is_called_one(
    flags: list[str], greedy_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = load_results(greedy_file).results[1]["output_ids"][5]
    put_token(greedy_file, 1, 5, (drawn + 1) % END)
    printed, content = run_chain(flags, greedy_file.parent, capsys)
    assert "sample 1 differs from greedy at output token 5" in printed
    assert "not a near-tie: please report this" in printed
    (row,) = [line for line in printed.splitlines() if line.startswith("chain ")]
    assert row.endswith("no, 1/2")
    assert content["metadata"]["greedy_comparison"] == {"num_compared": 2, "num_different": 1}
    assert content["results"][1]["metrics"]["first_divergence"] == 5
    assert content["results"][1]["metrics"]["divergence_margin"] > 1e-4
    assert "first_divergence" not in content["results"][0]["metrics"]


def test_a_near_tie_is_shown_with_its_margin(
    flags: list[str], greedy_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two ids with one and the same output row have one and the same logit."""
    drawn = load_results(greedy_file).results[0]["output_ids"][0]
    twin = END - 1 if drawn != END - 1 else END - 2
    config = json.loads(Path(flags[1]).read_text())
    for entry in config:
        weights = Path(entry["path"]) / "model.safetensors"
        tensors = load_file(weights)
        tensors["lm_head.weight"][twin] = tensors["lm_head.weight"][drawn]
        copy = tmp_path / "tied" / Path(entry["path"]).name
        copy.mkdir(parents=True)
        for file in Path(entry["path"]).iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
        save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
        entry["path"] = str(copy)
    tied = tmp_path / "tied" / "models.json"
    tied.write_text(json.dumps(config))
    written = ["--models-config-path", str(tied), *flags[2:]]
    assert benchmark.main([*written, "--strategy", "greedy", "--output-dir", str(tied.parent)]) == 0
    stored = tied.parent / "greedy_target.json"
    first = load_results(stored).results[0]["output_ids"][0]
    assert first in (drawn, twin)
    put_token(stored, 0, 0, twin if first == drawn else drawn)

    printed, content = run_chain(written, tied.parent, capsys)
    assert "sample 0 differs from greedy at output token 0" in printed
    assert "logits are 0 apart; a near-tie, which rounding decides" in printed
    assert content["results"][0]["metrics"]["divergence_margin"] == 0.0


def test_outputs_diverge_at_the_first_token_that_differs_or_is_missing() -> None:
    assert first_divergence(0, (1,), (5, 6, 7), (5, 6, 7)) is None
    found = first_divergence(3, (1,), (5, 6, 7), (5, 8, 7))
    assert found == Divergence(3, 1, prefix=(1, 5), expected=6, found=8)
    shorter = first_divergence(3, (1,), (5, 6), (5,))
    assert shorter == Divergence(3, 1, prefix=(1, 5), expected=6, found=None)
    assert shorter.describe("float32").endswith("where one of the two had ended")


@pytest.mark.parametrize(
    ("dtype", "margin", "verdict"),
    [
        ("float32", 9e-5, "a near-tie"),
        ("float32", 2e-4, "not a near-tie: please report this"),
        ("bfloat16", 0.1, "in bfloat16 rounding decides near-ties"),
    ],
)
def test_what_a_margin_means_depends_on_the_targets_dtype(
    dtype: str, margin: float, verdict: str
) -> None:
    text = Divergence(0, 2, (1, 2), 7, 9, margin).describe(dtype)
    assert f"the target's logits are {margin:.2g} apart; {verdict}" in text


def test_a_margin_is_measured_in_what_the_choice_compares() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.5, -4.0]])
    assert score_margin(logits, 9, 1, 2, SamplingParams()) == pytest.approx(0.5)
    sampling = SamplingParams(temperature=2.0, seed=5)
    noise = gumbel_noise(5, TOKEN_STREAM, torch.tensor([9, 9]), torch.tensor([1, 2]))
    scores = logits[0, [1, 2]] + 2.0 * noise
    margin = score_margin(logits, 9, 1, 2, sampling)
    assert margin == pytest.approx(abs(float(scores[0] - scores[1])))
    kept_two = SamplingParams(temperature=2.0, top_k=2, seed=5)
    assert score_margin(logits, 9, 1, 0, kept_two) == pytest.approx(2.5 - 1.0)
