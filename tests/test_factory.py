"""Which runner serves a model, and one line for whatever is wrong with its folder or device."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipespec.config import ModelConfig
from pipespec.errors import ModelLoadError, PipeSpecError
from pipespec.placement import StagePlacement
from pipespec.runners.base import ModelRunner
from pipespec.runners.factory import load_runner
from pipespec.runners.memory import out_of_memory_as
from tests.tiny import ARCHITECTURES, make_tiny, one_thread  # noqa: F401

MODEL = ModelConfig("folder/tiny", ("cpu",), "float32")
CPU = StagePlacement("cpu")
DOWN = "model.layers.0.mlp.down_proj.weight"


def load(
    folder: Path, runner: str = "auto", placement: StagePlacement = CPU, **options: Any
) -> ModelRunner:
    return load_runner(replace(MODEL, runner=runner, **options), placement, folder, 128)


def error_line(
    folder: Path, runner: str = "auto", placement: StagePlacement = CPU, **options: Any
) -> str:
    with pytest.raises(ModelLoadError) as caught:
        load(folder, runner, placement, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.exit_code == 2
    return message


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


# The choice


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_auto_takes_the_native_runner_on_a_cpu_for_the_architectures_it_knows(
    tmp_path: Path, architecture: str
) -> None:
    assert load(make_tiny(tmp_path, architecture)).info.runner == "native"


def test_auto_takes_the_llama_runner_for_a_dtype_that_the_native_one_has_not(
    tmp_path: Path,
) -> None:
    folder = make_tiny(tmp_path)
    assert load(folder, dtype="float16").info.runner == "llama"
    line = error_line(folder, "native", dtype="float16")
    assert line == 'tiny: "runner": "native" cannot do "dtype": "float16"; use "llama"'


def test_without_a_compiler_auto_takes_the_llama_runner_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_tiny(tmp_path / "model")
    monkeypatch.setenv("PATH", str(tmp_path))
    with caplog.at_level("INFO", "pipespec.runners.factory"):
        assert load(folder).info.runner == "llama"
    (message,) = caplog.messages
    assert message.startswith("tiny: the llama runner serves it: the native runner needs a C++")
    assert error_line(folder, "native").endswith('clang++; or "runner": "llama"')


def test_the_native_runner_is_not_forced_onto_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    line = error_line(make_tiny(tmp_path), "native", StagePlacement("cuda:0"))
    assert line == 'tiny: "runner": "native" cannot do cuda:0; use "llama"'


@pytest.mark.parametrize(
    "values",
    [
        {"model_type": "olmo", "architectures": ["OlmoForCausalLM"]},
        {"hidden_act": "gelu"},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    ],
    ids=lambda values: next(iter(values)),
)
def test_auto_leaves_what_the_lean_runners_cannot_compute_to_transformers(
    tmp_path: Path, values: dict[str, Any]
) -> None:
    folder = make_tiny(tmp_path)
    change_config(folder, **values)
    if values.get("model_type") == "olmo":
        change_weights(folder, lambda w: [w.pop(name) for name in list(w) if "norm" in name])
    assert load(folder).info.runner == "hf"
    for runner in ("native", "llama"):
        message = error_line(folder, runner)
        assert message.startswith("tiny: ")
        assert message.endswith('use "runner": "hf"')
        assert "config.json" in message


def test_a_runner_that_is_asked_for_is_taken(tmp_path: Path) -> None:
    folder = make_tiny(tmp_path)
    names = ["native", "llama", "hf"]
    assert [load(folder, name).info.runner for name in names] == names


def test_weights_that_are_not_safetensors_are_left_to_transformers(tmp_path: Path) -> None:
    folder = make_tiny(tmp_path)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert load(folder).info.runner == "hf"
    assert "neither model.safetensors nor" in error_line(folder, "llama")


@pytest.mark.parametrize("runner", ["native", "llama"])
def test_facts_about_the_model_are_the_same_from_any_runner(tmp_path: Path, runner: str) -> None:
    folder = make_tiny(tmp_path, tie_word_embeddings=True)
    lean, plain = load(folder, runner).info, load(folder, "hf").info
    assert lean.name == plain.name == "tiny"
    for field in ("device", "dtype", "vocab_size", "context_length", "num_parameters"):
        assert getattr(lean, field) == getattr(plain, field), field


@pytest.mark.parametrize("runner", ["native", "llama"])
@pytest.mark.parametrize(
    ("placement", "options", "told"),
    [
        (CPU, {"quantize": "4bit"}, '"quantize": "4bit"'),
        (StagePlacement("auto"), {}, "several devices"),
    ],
)
def test_a_lean_runner_is_not_forced_to_what_it_cannot_do(
    tmp_path: Path, runner: str, placement: StagePlacement, options: dict[str, Any], told: str
) -> None:
    line = error_line(make_tiny(tmp_path), runner, placement, **options)
    assert line == f'tiny: "runner": "{runner}" cannot do {told}; use "hf"'


def test_quantizing_without_a_gpu_is_told_at_once(tmp_path: Path) -> None:
    line = error_line(make_tiny(tmp_path), quantize="8bit")
    assert line.startswith('tiny: "quantize": "8bit" needs a GPU')


@pytest.mark.parametrize(
    "placement",
    [StagePlacement("cuda:63"), StagePlacement("auto", visible_devices=tuple("abcdefgh") * 8)],
    ids=["one", "several"],
)
def test_a_gpu_that_torch_does_not_see_is_told_in_one_line(
    tmp_path: Path, placement: StagePlacement
) -> None:
    line = error_line(make_tiny(tmp_path), placement=placement)
    assert re.match(r"tiny is to run on (cuda:63|auto), but torch sees (no|\d+) CUDA device", line)
    assert '"devices"' in line


# Folders with something wrong


@pytest.mark.parametrize("runner", ["native", "llama", "hf"])
def test_a_tensor_that_is_missing_is_named(tmp_path: Path, runner: str) -> None:
    folder = make_tiny(tmp_path)
    change_weights(folder, lambda weights: weights.pop(DOWN))
    line = error_line(folder, runner)
    assert DOWN in line
    assert str(folder) in line


@pytest.mark.parametrize("runner", ["native", "llama", "hf"])
def test_a_tensor_of_another_shape_is_named_with_both_shapes(tmp_path: Path, runner: str) -> None:
    folder = make_tiny(tmp_path)
    change_weights(folder, lambda weights: weights.update({DOWN: torch.zeros(3, 4)}))
    line = error_line(folder, runner)
    assert DOWN in line
    assert "(3, 4)" in line
    assert "(48, 80)" in line


@pytest.mark.parametrize("runner", ["auto", "native", "llama", "hf"])
@pytest.mark.parametrize("kept", [0, 7, 2000], ids=["empty", "cut in the header", "cut"])
def test_a_damaged_weights_file_is_told_in_one_line(tmp_path: Path, runner: str, kept: int) -> None:
    path = make_tiny(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    assert str(tmp_path) in error_line(tmp_path, runner)


@pytest.mark.parametrize("runner", ["auto", "native", "llama", "hf"])
def test_a_shard_that_is_missing_is_named(tmp_path: Path, runner: str) -> None:
    shards = sorted(make_tiny(tmp_path, max_shard_size="30KB").glob("*.safetensors"))
    shards[1].unlink()
    assert shards[1].name in error_line(tmp_path, runner)


@pytest.mark.parametrize("runner", ["auto", "native", "llama"])
@pytest.mark.parametrize(
    "index", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": "../b"}}']
)
def test_an_index_that_makes_no_sense_is_named(tmp_path: Path, runner: str, index: str) -> None:
    make_tiny(tmp_path, max_shard_size="30KB")
    (tmp_path / "model.safetensors.index.json").write_text(index)
    assert "model.safetensors.index.json" in error_line(tmp_path, runner)


@pytest.mark.parametrize("runner", ["auto", "native", "llama", "hf"])
@pytest.mark.parametrize("text", ["", "{", "[1]", "\xff"], ids=["empty", "cut", "list", "binary"])
def test_a_config_that_is_not_json_is_told_in_one_line(
    tmp_path: Path, runner: str, text: str
) -> None:
    make_tiny(tmp_path)
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    assert str(tmp_path) in error_line(tmp_path, runner)


@pytest.mark.parametrize("runner", ["auto", "native", "llama", "hf"])
@pytest.mark.parametrize(
    "values",
    [
        {"vocab_size": "many"},
        {"hidden_size": -48},
        {"num_attention_heads": 0},
        {"num_key_value_heads": 3},
        {"intermediate_size": float("inf")},
        {"hidden_act": "nothing"},
        {"model_type": "nothing"},
    ],
    ids=str,
)
def test_a_config_that_makes_no_sense_is_told_in_one_line(
    tmp_path: Path, runner: str, values: dict[str, Any]
) -> None:
    change_config(make_tiny(tmp_path), **values)
    assert str(tmp_path) in error_line(tmp_path, runner)


def test_code_that_comes_with_a_checkpoint_is_not_run_and_nobody_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda question: pytest.fail(question))
    folder = make_tiny(tmp_path)
    (folder / "own.py").write_text("raise SystemExit('ran')")
    change_config(
        folder,
        model_type="own",
        auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"},
    )
    assert "custom code" in error_line(folder)


# Memory


def test_a_model_that_does_not_fit_is_told_in_one_line(tmp_path: Path) -> None:
    """Its context asks for more than any machine has."""
    change_config(make_tiny(tmp_path), max_position_embeddings=1 << 50)
    line = error_line(tmp_path)
    assert line.startswith("tiny does not fit on cpu in float32; use a smaller model")


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory. Tried ..."), MemoryError()]
)
def test_running_out_of_memory_becomes_one_line(error: Exception) -> None:
    with (
        pytest.raises(PipeSpecError, match=r"^no room$") as caught,
        out_of_memory_as(PipeSpecError, "no room"),
    ):
        raise error
    assert caught.value.__cause__ is error


def test_other_errors_keep_their_own_words() -> None:
    with pytest.raises(RuntimeError, match="shapes"), out_of_memory_as(PipeSpecError, "no room"):
        raise RuntimeError("shapes cannot be multiplied")
