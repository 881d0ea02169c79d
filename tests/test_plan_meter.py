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
from pipespec.errors import ConfigError, StageError
from pipespec.hashing import hash_tokens
from pipespec.messages import Submit
from pipespec.placement import StagePlacement
from pipespec.planning.meter import Meter
from pipespec.planning.meters import MeterProcess, Meters
from pipespec.planning.trace import Branch, Text
from pipespec.runners.base import ModelRunner
from pipespec.runners.emulated import EmulatedRunner
from pipespec.worker_spec import StageSpec

VOCAB_SIZE = 200
SAMPLING = SamplingParams()
PROMPT = (5, 6, 7)


def runner(name: str, agreement: float | None = None, context: int = 500) -> ModelRunner:
    values = {"step_ms": {"1": 0.0}, "agreement": agreement}
    return EmulatedRunner(values, name=name, vocab_size=VOCAB_SIZE, context_length=context)


def written(num_tokens: int = 100) -> list[int]:
    submit = Submit(0, PROMPT, (), SAMPLING, num_tokens, (), ())
    return Meter(runner("target"), 1).write(submit, str)


def test_a_text_is_what_greedy_writes_and_ends_where_it_is_to() -> None:
    tokens = written()
    assert len(tokens) == 100
    ended = Submit(0, PROMPT, (), SAMPLING, 100, (tokens[40],), ())
    end = tokens.index(tokens[40])
    assert Meter(runner("target"), 1).write(ended, str) == tokens[: end + 1]


def test_the_target_draws_its_own_text() -> None:
    tokens = written()
    found = Meter(runner("target"), 1).draws(PROMPT, tokens, SAMPLING)
    assert [ranked[0] for ranked in found] == tokens


def test_a_drafts_draws_are_those_of_one_token_at_a_time() -> None:
    tokens = written()
    model = runner("draft", 0.6)
    found = Meter(model, 1).draws(PROMPT, tokens, SAMPLING)
    ids = [*PROMPT, *tokens]
    oracle = model._oracle  # type: ignore[attr-defined]
    assert [r[0] for r in found] == [oracle.draw(hash_tokens(ids[:n])) for n in range(3, 103)]
    assert 0.4 < sum(r[0] == t for r, t in zip(found, tokens)) / 100 < 0.8


def test_a_draft_with_a_short_context_is_asked_about_what_it_can_read() -> None:
    tokens = written()
    found = Meter(runner("draft", 0.6, context=50), 1).draws(PROMPT, tokens, SAMPLING)
    assert len(found) == 48  # after its prompt, and after each token that fits
    whole = Meter(runner("draft", 0.6), 1).draws(PROMPT, tokens, SAMPLING)
    assert found == whole[:48]
    assert Meter(runner("draft", 0.6, context=2), 1).draws(PROMPT, tokens, SAMPLING) == []


def test_a_branch_is_what_a_model_writes_by_itself_and_others_are_asked_along_it() -> None:
    tokens = written()
    text = Text(0, PROMPT, tuple(tokens))
    middle, draft = runner("middle", 0.8), runner("draft", 0.5)
    own = Meter(middle, 1).draws(PROMPT, tokens, SAMPLING)
    offsets = [n for n, (r, t) in enumerate(zip(own, tokens)) if r[0] != t]
    assert len(offsets) > 5
    found = list(Meter(middle, 1).branches(PROMPT, tokens, offsets, 6, SAMPLING))
    branches = [(n, ids) for n, (ids, _) in zip(sorted(offsets, reverse=True), found)]
    followed = Meter(draft, 1).follow(PROMPT, tokens, branches, SAMPLING)
    for (offset, ids), (_, ranked), along in zip(branches, found, followed):
        hashes = Branch(0, offset, tuple(ids)).prefix_hashes(text)
        for model, choices in ((middle, ranked), (draft, along)):
            oracle = model._oracle  # type: ignore[attr-defined]
            assert [r[0] for r in choices] == [oracle.draw(prefix) for prefix in hashes]
        assert [r[0] for r in ranked[:-1]] == ids
        assert ids[0] == own[offset][0] and len(ids) == 6


def test_times_have_an_entry_for_every_length_and_leave_nothing_behind() -> None:
    values = {"step_ms": {"1": 0.5, "5": 3.0}}
    model = EmulatedRunner(values, name="m", vocab_size=VOCAB_SIZE)
    meter = Meter(model, 5)
    table = meter.decode_ms([1, 2, 3], [1, 5], 0.0)
    assert [count for count, _ in table] == [1, 5]
    assert table[1][1] > table[0][1] > 0.0
    assert [n for n, _ in meter.prefill_ms([1, 2, 3], [3, 9], 0.0)] == [3, 9]
    assert meter.tree_ms([1, 2, 3], [1, 2], 0.0) == [], "this runner has no branches"
    assert meter.steps_ms([1, 2, 3], 1, 0.01) > 0.0
    assert not model._hashes


# Processes


def stage(emulated: object = None, placement: StagePlacement | None = None) -> StageSpec:
    values = {"step_ms": {"1": 0.0}} if emulated is None else emulated
    model = ModelConfig("emulated/model", ("cpu",), emulated=values)  # type: ignore[arg-type]
    return StageSpec(model, placement or StagePlacement("cpu"), None, None)


def load(process: MeterProcess) -> dict[str, object]:
    process.load(vocab_size=VOCAB_SIZE, context_length=99, num_ranked=5, longest=4)
    info: dict[str, object] = process.receive(60.0)
    return info


def test_a_process_is_pinned_before_it_loads_and_is_gone_at_the_end(tmp_path: Path) -> None:
    core = min(os.sched_getaffinity(0))
    with nothing_left_in(tmp_path), Meters() as meters:
        process = meters.start(stage(placement=StagePlacement("cpu", cores=(core,), threads=1)))
        info = load(process)
        assert (info["runner"], info["context_length"]) == ("emulated", 99)
        (child,) = psutil.Process().children()
        assert child.cpu_affinity() == [core]
        assert child.environ()["OMP_NUM_THREADS"] == "1"
        answer = process.ask("steps_ms", ids=[1, 2], length=1, seconds=0.01)
        assert answer > 0.0


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
            process.ask("draws", prompt=["x"], tokens=[2], sampling=[0.0, 1.0, 0, 0.0, 0])
        assert any("Traceback" in line for line in caught.value.log_tail)
        assert process.ask("draws", prompt=[1], tokens=[2], sampling=[0.0, 1.0, 0, 0.0, 0])


def script(*lines: str) -> Sequence[str]:
    """Another program in the place of a meter; it may be given arguments."""
    return (sys.executable, "-c", "\n".join(lines))


def test_a_process_that_dies_is_told_with_its_last_words(tmp_path: Path) -> None:
    dies = script("import sys", "input()", "print('so long', file=sys.stderr)", "sys.exit(3)")
    with nothing_left_in(tmp_path), Meters(dies) as meters:
        process = meters.start(stage())
        with pytest.raises(StageError, match="ended with status 3") as caught:
            load(process)
        assert caught.value.log_tail == ("so long",)


def test_one_that_does_not_answer_is_given_up_and_killed(tmp_path: Path) -> None:
    deaf = script("import time", "time.sleep(600)")
    with nothing_left_in(tmp_path), Meters(deaf) as meters:
        process = meters.start(stage())
        with pytest.raises(StageError, match=r"no answer for 0.2 s"):
            process.receive(timeout_s=0.2)


def test_a_meter_ends_with_its_parent(tmp_path: Path) -> None:
    """Its input ends, whatever became of the parent."""
    with nothing_left_in(tmp_path):
        meters = Meters()
        process = meters.start(stage())
        load(process)
        (child,) = psutil.Process().children()
        assert process._process is not None and process._process.stdin is not None
        process._process.stdin.close()
        wait_until(lambda: child.status() == psutil.STATUS_ZOMBIE)
        meters.close()
