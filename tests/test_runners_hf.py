"""The transformers runner serves what has a cache that can be cut back, and refuses the rest.

Its logits are compared with the bare model fed all at once, on architectures that the lean runner
does not know.
"""

from __future__ import annotations

import importlib.util
import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from pipespec.config import SamplingParams
from pipespec.errors import ModelLoadError
from pipespec.runners.base import Row
from pipespec.runners.hf import HfRunner
from pipespec.runners.rows import CHUNK
from tests.tiny import make_tiny, one_thread  # noqa: F401

GREEDY = SamplingParams()
load = partial(HfRunner, name="tiny", dtype="float32", device="cpu", vocab_size=64)
SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
SERVED: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 600},
    # Layers with a window between others: transformers' own cache would forget what lies outside.
    "gemma2": SMALL | {"sliding_window": 4, "max_position_embeddings": 600},
    "gpt_neox": SMALL | {"max_position_embeddings": 600},
}
LAYERS = {"layer_types": ["conv", "full_attention"]}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "mamba": ({"hidden_size": 16, "num_hidden_layers": 1}, "layers of type linear_attention"),
    "rwkv": ({"hidden_size": 16, "num_hidden_layers": 2, "context_length": 8}, "recurrent layers"),
    "lfm2": (SMALL | LAYERS, "layers of type conv"),
    "openai-gpt": ({"n_embd": 16, "n_layer": 1, "n_head": 2}, "no key-value cache"),
}


def make_model(folder: Path, model_type: str, **config: Any) -> Path:
    """Writes a small random model of any type."""
    torch.manual_seed(0)
    made = AutoConfig.for_model(model_type, **{"vocab_size": 64, **config})
    model = AutoModelForCausalLM.from_config(made)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


def random_ids(count: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(64), k=count)


@torch.inference_mode()
def logits_at_once(folder: Path, ids: list[int]) -> Tensor:
    """Of the bare model, without any cache."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    logits: Tensor = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    return logits


@pytest.mark.parametrize("model_type", SERVED)
@pytest.mark.parametrize("seed", range(3))
def test_a_slot_that_is_extended_and_rolled_back_holds_what_the_bare_model_computes(
    tmp_path: Path, model_type: str, seed: int
) -> None:
    print(f"seed {seed}")
    folder = make_model(tmp_path, model_type, **SERVED[model_type])
    runner, choice, held = load(folder), random.Random(seed), list[int]()
    for _ in range(12):
        start = choice.choice([len(held), choice.randint(0, len(held))])
        new = random_ids(choice.randint(1, 17), seed=choice.randrange(1000))
        num_draws = choice.randint(1, len(new))
        logits = runner.logits(Row(0, start, new, num_draws, GREEDY))
        held = held[:start] + new
        expected = logits_at_once(folder, held)[-num_draws:]
        assert expected.std() > 0.1
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0.0)


@pytest.mark.parametrize("model_type", SERVED)
@pytest.mark.parametrize("num_draws", [1, 20, 60])
def test_a_prompt_longer_than_a_chunk_is_computed_as_one(
    tmp_path: Path, model_type: str, num_draws: int
) -> None:
    folder = make_model(tmp_path, model_type, **SERVED[model_type])
    ids = random_ids(CHUNK + 40)
    logits = load(folder).logits(Row(0, 0, ids, num_draws, GREEDY))
    expected = logits_at_once(folder, ids)[-num_draws:]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0.0)


def test_facts_about_the_model_are_read_from_it(tmp_path: Path) -> None:
    info = load(make_model(tmp_path, "gpt2", **SERVED["gpt2"]), vocab_size=60).info
    assert (info.runner, info.dtype, info.vocab_size) == ("hf", "float32", 60)
    assert info.context_length == 600
    assert info.weight_bytes == pytest.approx(4 * info.num_parameters, rel=0.05)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_dtype_is_honoured_exactly(tmp_path: Path, dtype: str) -> None:
    """Whatever the checkpoint is stored in."""
    folder = make_tiny(tmp_path, dtype="bfloat16")
    runner = load(folder, dtype=dtype)
    assert runner.info.dtype == dtype
    bytes_each = torch.finfo(getattr(torch, dtype)).bits // 8
    assert runner.info.num_parameters * bytes_each == pytest.approx(
        runner.info.weight_bytes, rel=0.01
    )


@pytest.mark.parametrize("model_type", REFUSED)
def test_a_model_whose_cache_cannot_be_cut_back_is_refused_in_one_line(
    tmp_path: Path, model_type: str
) -> None:
    config, reason = REFUSED[model_type]
    folder = make_model(tmp_path, model_type, **config)
    message = (
        rf"^tiny: the {model_type} model in [^\n]* has {reason}[^\n]*; PipeSpec serves [^\n]*$"
    )
    with pytest.raises(ModelLoadError, match=message):
        load(folder)


@pytest.mark.parametrize("quantize", ["8bit", "4bit"])
def test_quantizing_on_a_cpu_is_refused_in_one_line(tmp_path: Path, quantize: str) -> None:
    message = rf'^tiny: "quantize": "{quantize}" needs a GPU; [^\n]*$'
    with pytest.raises(ModelLoadError, match=message):
        load(make_tiny(tmp_path), quantize=quantize)


def test_quantizing_without_bitsandbytes_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else found(name)
    )
    with pytest.raises(ModelLoadError, match=r"^tiny: [^\n]*bitsandbytes[^\n]*\[quantize\][^\n]*$"):
        load(make_tiny(tmp_path), device="cuda:0", quantize="4bit")


def test_a_model_spread_over_this_machines_memory_gives_the_same_logits(tmp_path: Path) -> None:
    """`auto` with a limit for the CPU alone: accelerate places every layer there."""
    folder, ids = make_tiny(tmp_path), random_ids(20)
    row = Row(0, 0, ids, 20, GREEDY)
    spread = load(folder, device="auto", max_memory_gib={"cpu": 1.0})
    assert torch.equal(spread.logits(row), load(folder).logits(row))


def test_a_model_that_would_run_from_disk_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"^tiny[^\n]*$"):
        load(make_tiny(tmp_path), device="auto", max_memory_gib={"cpu": 1e-5})
