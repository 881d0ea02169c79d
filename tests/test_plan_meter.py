"""Measuring one model: what it draws is what it would draw in a run, and processes end well."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest
from processes import nothing_left_in, wait_until

from pipespec.config import ModelConfig, SamplingParams
from pipespec.emulation import Oracle
from pipespec.errors import ConfigError, StageError
from pipespec.hashing import hash_tokens
from pipespec.messages import Submit
from pipespec.placement import StagePlacement
from pipespec.planning.meter import Meter
from pipespec.planning.meters import MeterProcess, Meters
from pipespec.runners.base import Row, TailToken, TreeRow
from pipespec.runners.emulated import EmulatedRunner
from pipespec.worker_spec import StageSpec

VOCAB_SIZE = 200
SAMPLING = SamplingParams()
PROMPT = (5, 6, 7)


def runner(name: str, agreement: float | None = None, context: int = 500) -> EmulatedRunner:
    values = {"step_ms": {"1": 0.0}, "agreement": agreement}
    return EmulatedRunner(values, name=name, vocab_size=VOCAB_SIZE, context_length=context)


def oracle_of(model: EmulatedRunner) -> Oracle:
    return model._oracle


def written(num_tokens: int = 100) -> list[int]:
    submit = Submit(0, PROMPT, (), SAMPLING, num_tokens, (), ())
    return Meter(runner("target")).write(submit)


def test_a_text_is_what_greedy_writes_and_ends_where_it_is_to() -> None:
    tokens = written()
    assert tokens == oracle_of(runner("target")).continuation(PROMPT, 100, None)
    ended = Submit(0, PROMPT, (), SAMPLING, 100, (tokens[40],), ())
    assert Meter(runner("target")).write(ended) == tokens[: tokens.index(tokens[40]) + 1]


def test_the_target_draws_its_own_text() -> None:
    tokens = written()
    found = Meter(runner("target")).draws(PROMPT, tokens, SAMPLING, 1)
    assert found == [(token,) for token in tokens]


def test_a_drafts_choices_are_those_of_one_token_at_a_time_best_first() -> None:
    tokens, model = written(), runner("draft", 0.6)
    found = Meter(model).draws(PROMPT, tokens, SAMPLING, 5)
    ids, oracle = [*PROMPT, *tokens], oracle_of(model)
    assert found == [tuple(oracle.ranked(hash_tokens(ids[:n]), 5)) for n in range(3, 103)]
    ranks = [ranked.index(token) for ranked, token in zip(found, tokens) if token in ranked]
    assert 40 < ranks.count(0) < 80
    assert ranks.count(1) > ranks.count(4) > 0, "and where it is wrong, on which rank is known"


def test_a_draft_with_a_short_context_is_asked_about_what_it_can_read() -> None:
    tokens = written()
    found = Meter(runner("draft", 0.6, context=50)).draws(PROMPT, tokens, SAMPLING, 5)
    assert len(found) == 48  # after its prompt, and after each token that fits
    assert found == Meter(runner("draft", 0.6)).draws(PROMPT, tokens, SAMPLING, 5)[:48]
    assert Meter(runner("draft", 0.6, context=2)).draws(PROMPT, tokens, SAMPLING, 5) == []


def test_every_forward_is_timed_and_nothing_is_left_behind() -> None:
    model = EmulatedRunner({"step_ms": {"1": 2.0, "5": 10.0}}, name="m", vocab_size=VOCAB_SIZE)
    meter, text = Meter(model), [1, 2, 3]
    rows = [Row(0, 3, [4] * n, n, SAMPLING) for n in (1, 5)]
    tail = [TailToken(9, 4, 70 + n, 3) for n in range(4)]
    short, long, tree = meter.medians_ms(text, [*rows, TreeRow(rows[0], tail, num_ranked=5)], 0.0)
    assert short > 0.9 and min(long, tree) > 4.9, "the table's times, less what sleeps were late"
    assert meter.mean_ms(text, rows[0], 0.01) > 0.9
    assert not model._hashes


# Processes


def stage(emulated: object = None, placement: StagePlacement | None = None) -> StageSpec:
    values = {"step_ms": {"1": 0.0}} if emulated is None else emulated
    model = ModelConfig("emulated/model", ("cpu",), emulated=values)  # type: ignore[arg-type]
    return StageSpec(model, placement or StagePlacement("cpu"), None, None)


def load(process: MeterProcess) -> dict[str, object]:
    process.load(vocab_size=VOCAB_SIZE, context_length=99)
    info: dict[str, object] = process.receive(60.0)
    return info


def asked(process: MeterProcess, prompt: Sequence[object]) -> object:
    return process.ask("draws", prompt=prompt, tokens=[2], sampling=SAMPLING, num_ranked=2)


def test_a_process_is_pinned_before_it_loads_and_is_gone_at_the_end(tmp_path: Path) -> None:
    core = min(os.sched_getaffinity(0))
    with nothing_left_in(tmp_path), Meters() as meters:
        process = meters.start(stage(placement=StagePlacement("cpu", cores=(core,), threads=1)))
        info = load(process)
        assert (info["runner"], info["context_length"]) == ("emulated", 99)
        (child,) = psutil.Process().children()
        assert child.cpu_affinity() == [core]
        assert child.environ()["OMP_NUM_THREADS"] == "1"


def test_a_model_that_cannot_be_loaded_is_told_in_its_own_words(tmp_path: Path) -> None:
    with nothing_left_in(tmp_path), Meters() as meters:
        process = meters.start(stage({"step_ms": {}}))
        with pytest.raises(ConfigError, match=r'^model: "emulated" needs "step_ms"'):
            load(process)


def test_a_question_that_fails_is_told_with_its_traceback(tmp_path: Path) -> None:
    with nothing_left_in(tmp_path), Meters() as meters:
        process = meters.start(stage())
        load(process)
        with pytest.raises(StageError, match=r"^measuring model failed: ") as caught:
            asked(process, ["x"])
        assert any("Traceback" in line for line in caught.value.log_tail)
        assert asked(process, [1]), "and the next one is answered"


def script(*lines: str) -> Sequence[str]:
    """Another program in the place of a meter; it may be given arguments."""
    return (sys.executable, "-c", "\n".join(lines))


def test_a_process_that_dies_is_told_with_its_last_words(tmp_path: Path) -> None:
    dies = script("import sys", "print('so long', file=sys.stderr)", "sys.exit(3)")
    with nothing_left_in(tmp_path), Meters(dies) as meters:
        process = meters.start(stage())
        with pytest.raises(StageError, match="ended with status 3") as caught:
            load(process)
        assert caught.value.log_tail == ("so long",)


def test_one_that_does_not_answer_is_given_up_and_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipespec.planning.meters._END_TIMEOUT_S", 0.2)
    deaf = script("import time", "time.sleep(600)")
    with nothing_left_in(tmp_path), Meters(deaf) as meters:
        process = meters.start(stage())
        with pytest.raises(StageError, match=r"no answer for 0.2 s"):
            process.receive(timeout_s=0.2)


def test_a_process_ends_when_nobody_can_ask_it_any_more(tmp_path: Path) -> None:
    with nothing_left_in(tmp_path), Meters() as meters:
        process = meters.start(stage())
        load(process)
        (child,) = psutil.Process().children()
        process.hang_up()
        wait_until(lambda: child.status() == psutil.STATUS_ZOMBIE)
