"""Steps of fixed shapes: what a GPU replays from a graph is what the ordinary forward computes, and
steps of one shape give the same bits however a text is cut into them.

Here the static steps run eagerly on the CPU; the tests marked `gpu` run them as graphs.
"""

from __future__ import annotations

import itertools
import logging
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipespec.config import SamplingParams
from pipespec.errors import PipeSpecError
from pipespec.runners.base import Row, TailToken, TreeRow
from pipespec.runners.capture import Capture, Recorder
from pipespec.runners.graphs import FIXED_ROWS, MAX_ROWS, StaticSteps
from pipespec.runners.llama import LlamaRunner
from pipespec.runners.rows import SMALLEST_BUCKET, bucket, chunks
from pipespec.runners.tree_steps import TreeSteps
from pipespec.runners.warm_up import warm_up, warm_up_starts
from pipespec.sampling import draw
from tests.test_runners_llama import (  # noqa: F401
    CONTEXT_LENGTH,
    GREEDY,
    VARIANTS,
    VOCAB_SIZE,
    Make,
    feed,
    largest,
    lean,
    make_fixture,
    random_ids,
)
from tests.tiny import one_thread  # noqa: F401

SAMPLED = SamplingParams(temperature=1.3, seed=7)
LONG = 600  # positions: three buckets


def static(folder: Path, *, fixed_rows: int | None = None, **options: object) -> LlamaRunner:
    """A runner on the CPU that steps as one on a GPU does, without graphs."""
    runner: LlamaRunner = lean(folder, **options)  # type: ignore[arg-type]
    assert runner._model is not None
    model = runner._model
    launched = runner._meanwhile.launched
    runner._steps = StaticSteps(model, VOCAB_SIZE, fixed_rows=fixed_rows, launched=launched)
    runner._trees = TreeSteps(model, VOCAB_SIZE, spare_row=model.num_rows - 1, capture=None)
    return runner


# Shapes


@pytest.mark.parametrize("num_rows", [192, 256, 600, 4096])
def test_the_bucket_of_a_text_holds_it_and_is_one_of_few(num_rows: int) -> None:
    buckets = {end: bucket(end, num_rows) for end in range(1, num_rows + 1)}
    assert all(end <= size <= num_rows for end, size in buckets.items())
    assert all(size <= max(2 * end, SMALLEST_BUCKET) for end, size in buckets.items())
    assert len(set(buckets.values())) <= 1 + max(0, (num_rows - 1).bit_length() - 8)


def test_chunks_on_the_grid_are_cut_wherever_a_text_begins() -> None:
    assert chunks(500, 20) == [(500, 520)]
    assert chunks(500, 20, on_grid=True) == [(500, 512), (512, 520)]
    assert chunks(0, 512, on_grid=True) == [(0, 512)]
    assert chunks(100, 1000, on_grid=True) == [(100, 512), (512, 1024), (1024, 1100)]


def test_a_gpu_is_warmed_up_at_texts_of_several_lengths() -> None:
    assert warm_up_starts(17, 64, on_gpu=False) == [17]
    assert warm_up_starts(17, 64, on_gpu=True) == [47]
    assert warm_up_starts(17, 100_000, on_gpu=True) == [1007, 495, 239]
    assert warm_up_starts(17, 300, on_gpu=True) == [283, 239]
    assert warm_up_starts(60, 64, on_gpu=True) == [60]
    for length in (300, 1000, 5000):
        ends = [start + 17 for start in warm_up_starts(17, length, on_gpu=True)]
        met = {bucket(end, 10_000) for end in ends}
        wanted = {bucket(end, 10_000) for end in range(1, min(length, 1024) + 1)}
        assert met == wanted


def test_a_gpu_is_warmed_up_with_and_without_noise(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has a graph of its own for its draws."""
    runner, met = lean(make("llama")), set()
    info = replace(runner.info, device="cuda:0")
    monkeypatch.setattr(LlamaRunner, "info", info)
    monkeypatch.setattr(
        runner,
        "forward",
        lambda rows: met.update((len(row.ids), row.sampling.is_greedy) for row in rows),
    )
    warm_up(runner, 9)
    assert {(count, greedy) for count in range(1, 10) for greedy in (True, False)} <= met


# The same logits and draws as the ordinary forward


@pytest.mark.parametrize("variant", VARIANTS)
def test_static_steps_compute_what_ordinary_ones_do(make: Make, variant: str) -> None:
    ids, runner = random_ids(CONTEXT_LENGTH), static(make(variant))
    reference = feed(lean(make(variant)), ids)
    start = 0
    for count in (5, 1, 2, 8, 3, 4, 17, 1, 20):
        logits = feed(runner, ids[start : start + count], start=start)
        assert largest(logits - reference[start : start + count]) < 1e-5
        start += count


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("query_length", [1, 2, 3, 7, 8, 16, 31, MAX_ROWS])
def test_every_query_length_start_and_bucket_gives_the_ordinary_logits(
    make: Make, dtype: str, query_length: int
) -> None:
    folder = make("llama", max_position_embeddings=LONG)
    ids = random_ids(LONG)
    ordinary, runner = lean(folder, dtype=dtype), static(folder, dtype=dtype)
    for each in (ordinary, runner):
        feed(each, ids)
    tolerance = 1e-5 if dtype == "float32" else 0.1  # a bfloat16 product rounds by its shape
    for start in (560, 511, 500, 255, 250, 100, 0):
        new = ids[start : start + query_length]
        expected = feed(ordinary, new, start=start)
        assert largest(feed(runner, new, start=start) - expected) < tolerance


@pytest.mark.parametrize("fixed_rows", [None, FIXED_ROWS])
@pytest.mark.parametrize("seed", range(3))
def test_slots_extended_and_rolled_back_at_random_equal_fresh_ones(
    make: Make, fixed_rows: int | None, seed: int
) -> None:
    choice = random.Random(seed)
    folder = make("llama")
    runner, held = static(folder, fixed_rows=fixed_rows, num_slots=2), {0: [1], 1: [1]}
    fresh = lean(folder)
    for slot in held:
        feed(runner, [1], slot=slot)
    for _ in range(30):
        slot = choice.randrange(2)
        start = choice.choice([len(held[slot]), choice.randint(0, len(held[slot]))])
        count = min(choice.randint(1, 17), CONTEXT_LENGTH - start)
        if count == 0:
            continue
        new, num_draws = choice.choices(range(VOCAB_SIZE), k=count), choice.randint(1, count)
        logits = runner.logits(Row(slot, start, new, num_draws, GREEDY))
        held[slot] = held[slot][:start] + new
        assert largest(logits - feed(fresh, held[slot])[-num_draws:]) < 1e-5
        fresh.release(0)


@pytest.mark.parametrize("params", [GREEDY, SAMPLED, SamplingParams(1.0, top_p=0.9, seed=3)])
@pytest.mark.parametrize("fixed_rows", [None, FIXED_ROWS])
def test_draws_are_those_that_the_logits_give_on_the_host(
    make: Make, fixed_rows: int | None, params: SamplingParams
) -> None:
    """Made where the logits are if the parameters drop no token, else on the host."""
    ids, runner = random_ids(60), static(make("llama"), fixed_rows=fixed_rows)
    ordinary = lean(make("llama"))
    start = 0
    for count, num_draws in ((20, 1), (1, 1), (8, 8), (5, 2), (17, 17), (3, 3)):
        new = ids[start : start + count]
        found = runner.forward([Row(0, start, new, num_draws, params)])[0]
        logits = feed(ordinary, new, start=start)[-num_draws:]
        end = start + count
        expected = draw(logits, range(end - num_draws + 1, end + 1), params, VOCAB_SIZE)
        assert found == expected
        start = end


def test_the_noise_of_a_step_is_that_of_its_own_request(make: Make) -> None:
    runner = static(make("llama"))
    drawn = {}
    for params in (SAMPLED, GREEDY, SamplingParams(1.3, seed=8), SamplingParams(0.7, seed=7)) * 2:
        row = Row(0, 0, random_ids(30), 30, params)
        drawn.setdefault(params, []).append(runner.forward([row])[0])
    assert all(first == second for first, second in drawn.values())
    assert len({tuple(first) for first, _ in drawn.values()}) == 4


def test_logits_that_are_not_finite_are_an_error_not_a_token(make: Make) -> None:
    runner = static(make("llama"))
    feed(runner, [1, 2, 3])
    assert runner._model is not None
    with torch.inference_mode():
        runner._model.embedding[5] = torch.nan
    with pytest.raises(PipeSpecError, match="NaN or infinite"):
        runner.forward([Row(0, 3, [5], 1, GREEDY)])
    assert len(runner.forward([Row(0, 3, [6], 1, GREEDY)])[0]) == 1


def test_logits_that_were_returned_outlive_the_next_step(make: Make) -> None:
    runner = static(make("llama"))
    first = feed(runner, [1, 2])
    kept = first.clone()
    feed(runner, [3, 4])
    assert torch.equal(first, kept)


def test_a_step_finds_everything_where_the_first_of_its_shape_left_it(make: Make) -> None:
    """A graph holds addresses: none that it reads or writes may move between two steps."""
    runner = static(make("llama"))
    assert runner._steps is not None and runner._model is not None
    seen = []
    for start in range(5):
        runner.forward([Row(0, start, [start, start + 1], 2, SAMPLED)])
        [buffers], model = runner._steps._buffers.values(), runner._model
        space = model.workspace(2)
        held = (buffers.ids, buffers.positions, buffers.logits, space.qkv, space.gate_up)
        seen.append([tensor.data_ptr() for tensor in held])
    assert len({tuple(addresses) for addresses in seen}) == 1
    assert len(runner._steps._forwards) == 1


def test_rows_that_nothing_is_fed_in_stand_behind_the_text(make: Make) -> None:
    runner = static(make("llama"), fixed_rows=FIXED_ROWS)
    feed(runner, [9, 8, 7])
    assert runner._steps is not None
    [buffers] = runner._steps._buffers.values()
    assert buffers.ids.tolist() == [9, 8, 7, 0, 0, 0, 0, 0]
    assert buffers.positions.tolist() == list(range(8))


# Capture, without a GPU


class FakeGraph:
    def __init__(self, work: Callable[[], None]) -> None:
        self.work, self.num_replays = work, 0

    def replay(self) -> None:
        self.num_replays += 1
        self.work()


def test_captured_work_is_replayed_and_not_done_again() -> None:
    graphs, done = [], []

    def record(work: Callable[[], None]) -> FakeGraph:
        graphs.append(FakeGraph(lambda: done.append("replayed")))
        return graphs[-1]

    run = Capture(record)(lambda: done.append("done"))
    run()
    run()
    assert done == ["replayed", "replayed"] and graphs[0].num_replays == 2


def test_once_a_capture_fails_everything_runs_eagerly_after_one_line(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    num_captured = 0

    def record(work: Callable[[], None]) -> FakeGraph:
        nonlocal num_captured
        if num_captured == 3:
            raise RuntimeError("operation not permitted\nwhen stream is capturing")
        num_captured += 1
        return FakeGraph(work)

    ids, runner = random_ids(40), lean(make("llama"))
    reference = feed(lean(make("llama")), ids)
    assert runner._model is not None
    runner._steps = StaticSteps(runner._model, VOCAB_SIZE, capture=Capture(record))
    with caplog.at_level(logging.WARNING):
        start = 0
        for count in (3, 1, 2, 4, 3, 1, 5, 2):
            logits = feed(runner, ids[start : start + count], start=start)
            assert largest(logits - reference[start : start + count]) < 1e-5
            start += count
    [line] = [record.getMessage() for record in caplog.records]
    assert num_captured == 3
    assert "steps run eagerly: operation not permitted when stream is capturing" in line


# On a GPU


def on_gpu(folder: Path, **options: object) -> LlamaRunner:
    runner: LlamaRunner = lean(folder, device="cuda:0", **options)  # type: ignore[arg-type]
    return runner


def draws_of(runner: LlamaRunner) -> list[object]:
    """By each way to step: draws made with the logits, draws from logits, ranks with branches."""
    ids, found = random_ids(40), list[object]()
    for _ in range(3):
        runner.forward([Row(0, 0, ids[:16], 1, GREEDY)])
        for params in (GREEDY, SAMPLED, replace(SAMPLED, top_k=5)):
            row = Row(0, 16, ids[16:20], 4, params)
            tail = tuple(TailToken(ids[n], 20, CONTEXT_LENGTH + n, 19) for n in range(3))
            found += [runner.forward([row]), runner.forward_tree(TreeRow(row, tail, num_ranked=3))]
    return found


@pytest.mark.parametrize("open_runner", [static, pytest.param(on_gpu, marks=pytest.mark.gpu)])
def test_what_a_stage_does_while_its_device_computes_changes_no_draw(
    make: Make, open_runner: Callable[[Path], LlamaRunner]
) -> None:
    runner, given_s = open_runner(make("llama")), list[float]()
    if not runner.info.frees_processor:  # a clock that ticks when it is read
        runner._meanwhile._clock = itertools.count().__next__
    runner.while_computing(given_s.append)
    assert draws_of(runner) == draws_of(open_runner(make("llama")))
    num_steps = 3 * (1 + 2 * 3)
    assert num_steps / 2 < len(given_s) < num_steps, "not in the first step of a length"


@pytest.mark.gpu
@pytest.mark.parametrize("variant", VARIANTS)
def test_graphs_give_the_logits_that_the_cpu_gives(make: Make, variant: str) -> None:
    ids, runner = random_ids(CONTEXT_LENGTH), on_gpu(make(variant))
    reference = feed(lean(make(variant)), ids)
    for _ in range(2):  # captured, then replayed
        start = 0
        for count in (5, 1, 2, 8, 3, 4, 17, 1, 20):
            logits = feed(runner, ids[start : start + count], start=start).cpu()
            assert largest(logits - reference[start : start + count]) < 1e-3
            start += count
    assert runner._steps is not None and runner._steps._capture is not None
    assert not runner._steps._capture.has_failed


@pytest.mark.gpu
@pytest.mark.parametrize("query_length", [1, 2, 8, 17, MAX_ROWS])
def test_graphs_serve_every_start_and_bucket(make: Make, query_length: int) -> None:
    folder = make("llama", max_position_embeddings=LONG)
    ids, runner = random_ids(LONG), on_gpu(folder)
    eager = on_gpu(folder, use_graphs=False)
    for each in (eager, runner):
        feed(each, ids)
    for start in (560, 511, 500, 255, 250, 100, 0):
        new = ids[start : start + query_length]
        expected = feed(eager, new, start=start)
        assert largest(feed(runner, new, start=start) - expected) < 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("params", [GREEDY, SAMPLED, SamplingParams(1.0, top_p=0.9, seed=3)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_draws_on_a_gpu_are_those_that_its_logits_give_on_the_host(
    make: Make, dtype: str, params: SamplingParams
) -> None:
    ids, runner = random_ids(50), on_gpu(make("llama"), dtype=dtype)
    for _ in range(2):
        for start, count in ((0, 20), (20, 1), (21, 8), (29, 5), (34, 1)):
            row = Row(0, start, ids[start : start + count], count, params)
            found = runner.forward([row])[0]
            logits = runner.logits(row).cpu()
            expected = draw(logits, range(start + 1, start + count + 1), params, VOCAB_SIZE)
            assert found == expected


@pytest.mark.gpu
def test_two_runners_with_graphs_share_a_process(make: Make) -> None:
    """As a chain's do; closing one leaves the other's graphs whole."""
    ids, one, other = random_ids(30), on_gpu(make("llama")), on_gpu(make("qwen3"))
    expected = feed(one, ids[:8]).clone()
    feed(other, ids[:8])
    other.close()
    torch.cuda.synchronize()
    assert torch.equal(feed(one, ids[:8]), expected)


@pytest.mark.gpu
def test_a_warmed_up_gpu_captures_nothing_during_a_text(make: Make) -> None:
    runner = on_gpu(make("llama", max_position_embeddings=LONG))
    warm_up(runner, 9)
    assert runner._steps is not None
    num_graphs = len(runner._steps._forwards), len(runner._steps._draws)
    runner.forward([Row(0, 0, random_ids(240), 1, GREEDY)])
    for start in range(240, 500, 9):
        for params in (GREEDY, SAMPLED):
            runner.forward([Row(0, start, random_ids(9), 9, params)])
    assert (len(runner._steps._forwards), len(runner._steps._draws)) == num_graphs


@pytest.mark.gpu
def test_a_capture_that_fails_on_a_gpu_leaves_its_stream_and_the_runner_serves_on(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    ids, runner = random_ids(20), on_gpu(make("llama"))
    reference = feed(runner, ids[:4]).clone()
    assert runner._steps is not None and runner._steps._capture is not None
    before = torch.cuda.current_stream()

    def looks_at_the_host() -> None:
        torch.ones(1, device="cuda:0").item()

    runner._steps._capture(looks_at_the_host)()
    assert torch.cuda.current_stream() == before
    assert runner._steps._capture.has_failed
    assert largest(feed(runner, ids[:4]) - reference) < 1e-3
    assert "steps run eagerly" in caplog.text


@pytest.mark.gpu
def test_a_recorder_replays_on_the_inputs_of_the_moment() -> None:
    device = torch.device("cuda:0")
    source, target = torch.zeros(3, device=device), torch.zeros(3, device=device)

    def work() -> None:
        target.copy_(source * 2)

    graph = Recorder(device)(work)
    source.fill_(4.0)
    graph.replay()
    assert target.tolist() == [8.0, 8.0, 8.0]
