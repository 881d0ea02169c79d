"""Predictions for emulated models: the real state machine on the virtual clock."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pipespec.config import ModelConfig, Schedule
from pipespec.emulation import Emulation, parse_emulation
from pipespec.errors import ConfigError
from pipespec.simulate.prediction import (
    LATENCY_S,
    Workload,
    emulated_model,
    emulations_of,
    predict,
    predict_texts,
)

SHORT = Workload(num_texts=2, prompt_tokens=5, new_tokens=60)


def model(name: str, step_ms: float, **values: Any) -> tuple[str, Emulation]:
    return name, parse_emulation({"step_ms": {"1": step_ms}, **values}, name)


TARGET = model("target", 10.0)


def test_greedy_takes_one_step_a_token() -> None:
    prediction = predict([model("draft", 1.0, agreement=0.5), TARGET], "greedy", workload=SHORT)
    assert prediction.num_tokens == 120
    assert prediction.ms_per_token == pytest.approx(10.0)


@pytest.mark.parametrize("num_drafts", [1, 2])
def test_a_chain_never_runs_two_models_at_once(num_drafts: int) -> None:
    """So its time is that of all forwards of all models, one after the other."""
    drafts = [model(f"draft-{n}", 1.0 + n, agreement=0.6 + 0.2 * n) for n in range(num_drafts)]
    prediction = predict([*drafts, TARGET], "chain", Schedule(lookahead=4), SHORT)
    forward_s = sum(text.forward_s for stage in prediction.stages for text in stage)
    assert prediction.total_s == pytest.approx(forward_s, rel=1e-3)


def test_a_chain_of_two_drafts_exactly_its_lookahead_for_each_verification() -> None:
    models = [model("draft", 1.0, agreement=0.0), TARGET]
    prediction = predict(models, "chain", Schedule(lookahead=4), SHORT)
    assert prediction.emitted(1) == [1] * (120 - 2), "each but the prefills' first tokens"
    assert prediction.ms_per_token == pytest.approx(14.0, rel=0.05)


def test_with_a_perfect_draft_the_slower_of_both_sets_the_pace() -> None:
    slow = predict([model("draft", 4.0, agreement=1.0), TARGET], "async-chain", workload=SHORT)
    assert slow.ms_per_token == pytest.approx(4.0, rel=0.15)


def test_the_same_prediction_comes_out_every_time() -> None:
    models = [model("draft", 1.0, agreement=0.7), TARGET]
    one, other = (predict(models, "async-chain", workload=SHORT) for _ in range(2))
    assert one == other


def test_async_pays_the_way_between_processes_and_chain_does_not() -> None:
    models = [model("draft", 0.0, agreement=0.0), model("target", 0.0)]
    chain = predict(models, "chain", Schedule(lookahead=1), SHORT)
    assert chain.total_s < 1e-3
    waiting = predict(models, "async-chain", Schedule("pipespec", 1), SHORT)
    assert waiting.total_s > 100 * LATENCY_S


def test_a_model_with_weights_cannot_be_predicted() -> None:
    with pytest.raises(ConfigError, match=r'^llama is not emulated; it lacks the key "emulated"'):
        emulations_of([ModelConfig("meta/llama", ("cpu",))])


def test_a_stage_that_reads_during_its_forwards_passes_verdicts_on_at_once() -> None:
    """Between a fast draft and the target, whose correction voids what both are at."""
    named = [model("draft", 1.0, agreement=0.5), model("middle", 8.0, agreement=0.5), TARGET]
    reading = [emulated_model(name, emulation, 4096) for name, emulation in named]
    deaf = [replace(each, reads_meanwhile=False) for each in reading]
    schedule = Schedule("pipespec", 0, outcomes=0)
    soon, late = (
        predict_texts(models, "async-chain", schedule, SHORT.submits())
        for models in (reading, deaf)
    )
    assert soon.outputs == late.outputs
    assert soon.total_s < 0.98 * late.total_s
