"""`--deterministic`: the same bits however a text is cut into steps, in bfloat16 too; and where a
machine's kernels do not keep to that, one line instead of a promise."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipespec import AsyncChainSpeculativeDecoder, ChainSpeculativeDecoder, GreedyDecoder
from pipespec.benchmark import make_parser
from pipespec.commands.settings import read_settings
from pipespec.config import GenerationParams, ModelConfig, SamplingParams, model_to_json
from pipespec.decoding import open_hierarchy
from pipespec.errors import ConfigError, ModelLoadError
from pipespec.placement import StagePlacement
from pipespec.runners.base import ModelRunner, Row, RunnerInfo
from pipespec.runners.determinism import check_deterministic, first_dependence
from pipespec.runners.factory import load_runner
from pipespec.runners.llama import LlamaRunner
from tests.test_runners_llama import (  # noqa: F401
    GREEDY,
    VOCAB_SIZE,
    Make,
    feed,
    lean,
    make_fixture,
    native,
    random_ids,
)
from tests.tiny import one_thread  # noqa: F401

LONG = 1200


def runner_of(folder: Path, dtype: str) -> LlamaRunner:
    runner: LlamaRunner = lean(folder, dtype=dtype, deterministic=True)
    return runner


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("variant", ["llama", "llama, biases", "qwen3", "mistral, window"])
def test_bits_do_not_depend_on_how_a_text_is_cut_into_steps(
    make: Make, variant: str, dtype: str
) -> None:
    folder = make(variant, max_position_embeddings=LONG)
    ids, prompt = random_ids(700), 520
    reference = runner_of(folder, dtype)
    reference.logits(Row(0, 0, ids[:prompt], 1, GREEDY))
    alone = torch.cat([feed(reference, ids[at : at + 1], start=at) for at in range(prompt, 700)])
    for seed in range(3):
        choice, runner, at = random.Random(seed), runner_of(folder, dtype), prompt
        runner.logits(Row(0, 0, ids[:prompt], 1, GREEDY))
        found = []
        while at < 700:
            wrong = choice.choices(range(VOCAB_SIZE), k=choice.randint(0, 5))  # rejected drafts
            new = [*ids[at : at + choice.randint(1, 17)], *wrong]
            kept = len(new) - len(wrong)
            found.append(feed(runner, new, start=at)[:kept])
            at += kept
        assert torch.equal(torch.cat(found), alone)


def test_a_step_of_one_shape_reaches_the_end_of_any_context(make: Make) -> None:
    """It feeds as many tokens there as anywhere, of which the last stand beyond the context."""
    folder, ids = make("llama", max_position_embeddings=511), random_ids(511)
    runner, ordinary = runner_of(folder, "float32"), lean(folder)
    for each in (runner, ordinary):
        feed(each, ids[:500])
    assert (feed(runner, ids[500:], 500) - feed(ordinary, ids[500:], 500)).abs().max() < 1e-5
    assert (feed(runner, ids[-1:], 510) - feed(ordinary, ids[-1:], 510)).abs().max() < 1e-5


def test_branches_are_not_served_in_steps_of_one_shape(make: Make) -> None:
    assert runner_of(make("llama"), "float32").info.num_tail_rows == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("load", [runner_of, lambda folder, dtype: native(folder, dtype=dtype)])
def test_the_self_test_passes_on_this_machine(make: Make, load: Any, dtype: str) -> None:
    for folder in (make("llama"), make("qwen3", max_position_embeddings=LONG)):
        check_deterministic(load(folder, dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_self_test_passes_on_a_gpu(make: Make, dtype: str) -> None:
    folder = make("llama", max_position_embeddings=LONG)
    check_deterministic(lean(folder, dtype=dtype, device="cuda:0", deterministic=True))


class Planted:
    """A runner whose logits are off by the last bit in one kind of circumstance."""

    def __init__(self, runner: LlamaRunner, kind: str) -> None:
        self._runner, self._kind = runner, kind
        self._longest = 0

    @property
    def info(self) -> RunnerInfo:
        return self._runner.info

    def release(self, slot: int) -> None:
        self._longest = 0
        self._runner.release(slot)

    def logits(self, row: Row) -> Tensor:
        logits, end = self._runner.logits(row).clone(), row.start + len(row.ids)
        off = torch.zeros(len(logits), dtype=torch.bool)
        if self._kind == "row" and len(row.ids) < 20:
            off[5:] = True
        if self._kind == "neighbours" and len(logits) > 1:
            off[0] = len(row.ids) > 13 and row.ids[1] % 2 == 0
        if self._kind == "fill":
            off[:] = self._longest > end + 10 and len(row.ids) == 1
        self._longest = max(self._longest, end)
        logits[off] = torch.nextafter(logits[off], torch.tensor(torch.inf))
        return logits


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("row", "the row of its step in which a token is fed"),
        ("neighbours", "the tokens that are fed after it in its step"),
        ("fill", "what the cache holds beyond the text"),
    ],
)
def test_the_self_test_names_a_planted_difference(make: Make, kind: str, named: str) -> None:
    runner = Planted(runner_of(make("llama", max_position_embeddings=LONG), "float32"), kind)
    assert first_dependence(runner) == named
    with pytest.raises(ModelLoadError, match=rf"^--deterministic: .* tiny .* {named}; [^\n]*$"):
        check_deterministic(runner)
    assert ModelLoadError.exit_code == 2


def test_a_runner_that_fails_the_self_test_is_closed_and_not_returned(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = []
    monkeypatch.setattr(
        "pipespec.runners.determinism.first_dependence", lambda _runner: "the weather"
    )
    monkeypatch.setattr(LlamaRunner, "close", lambda runner: closed.append(runner))
    with pytest.raises(ModelLoadError, match="depend on the weather"):
        load(make("llama"), runner="llama")
    assert len(closed) == 1


def load(folder: Path, **options: Any) -> ModelRunner:
    model = ModelConfig(str(folder), ("cpu",), "bfloat16", deterministic=True, **options)
    return load_runner(model, StagePlacement("cpu"), folder, VOCAB_SIZE)


def test_the_native_runner_needs_no_steps_of_one_shape(make: Make) -> None:
    assert [load(make("llama"), runner=runner).info.runner for runner in ("auto", "llama")] == [
        "native",
        "llama",
    ]


def test_a_model_that_only_transformers_serves_is_refused(make: Make) -> None:
    with pytest.raises(ModelLoadError, match=r"^--deterministic: .* the hf runner[^\n]*$"):
        load(make("llama"), runner="hf")


# The flag


def settings_of(*flags: str) -> Any:
    return read_settings(make_parser().parse_args(flags))


def test_the_flag_concerns_the_target_and_is_recorded_with_it() -> None:
    draft, target = settings_of("--deterministic").models
    assert (draft.deterministic, target.deterministic) == (False, True)
    assert model_to_json(target)["deterministic"] is True
    assert "deterministic" not in model_to_json(draft)
    assert not any(model.deterministic for model in settings_of().models)


def test_a_models_config_may_say_it_too() -> None:
    assert ModelConfig("m", ("cpu",), deterministic=True).deterministic
    with pytest.raises(ConfigError, match='"deterministic" is "yes"; it must be true or false'):
        ModelConfig("m", ("cpu",), deterministic="yes")  # type: ignore[arg-type]


@pytest.mark.parametrize("runner", ["native", "llama"])
def test_in_bfloat16_all_strategies_write_the_same_tokens(make: Make, runner: str) -> None:
    """The draft is the target in other arithmetic: it agrees often, and steps have all lengths."""
    folder = str(make("llama", max_position_embeddings=LONG, vocab_size=128))
    options: dict[str, Any] = {"tokenizer": "pipespec:demo/draft-1M", "runner": runner}
    models = [
        ModelConfig(folder, ("cpu",), "float32", **options),
        ModelConfig(folder, ("cpu",), "bfloat16", deterministic=True, **options),
    ]
    hierarchy = open_hierarchy(models).limited_to(300)
    texts = [
        (random_ids(30, seed=seed), GenerationParams(max_new_tokens=60, sampling=sampling))
        for sampling in (GREEDY, SamplingParams(temperature=0.9, seed=5))
        for seed in range(2)
    ]
    with GreedyDecoder(hierarchy) as greedy:
        expected = [greedy.generate(*text).token_ids for text in texts]
    for decoder in (ChainSpeculativeDecoder(hierarchy), AsyncChainSpeculativeDecoder(hierarchy)):
        with decoder:
            found = [decoder.generate(*text).token_ids for text in texts]
        assert found == expected
        assert all(sum(map(len, pair)) > 100 for pair in (found[:2], found[2:]))
