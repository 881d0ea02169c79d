"""Whole pipelines of real worker processes: they serve, fail, are interrupted and end, and nothing
is left of them. Most models are emulated, so the processes are real and their times are known."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import zmq
from emulated import write_emulated
from fake_launcher import WORKER as FAKE_WORKER
from fake_launcher import fake_pipeline
from processes import DEADLINE_S, is_gone, nothing_left_in, python, wait_until
from tiny import make_tiny

from pipespec.config import GenerationParams, ModelConfig, SamplingParams
from pipespec.decoding import (
    AsyncChainSpeculativeDecoder,
    ChainSpeculativeDecoder,
    Generation,
    GreedyDecoder,
    Hierarchy,
    open_hierarchy,
)
from pipespec.errors import StageError, UsageError
from pipespec.messages import Fault, Frame, encode
from pipespec.runners.base import Row
from pipespec.runners.emulated import EmulatedRunner
from pipespec.tokenizer.plain import ByteTokenizer
from pipespec.worker_spec import read_spec, write_spec

PROMPT = "def mean(values):"
ENDLESS = GenerationParams(max_new_tokens=100_000)


@pytest.fixture(autouse=True)
def temporary_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with nothing_left_in(tmp_path_factory.mktemp("t")) as directory:
        yield directory


def emulated(*names: str, steps_ms: tuple[float, ...] = (0.3, 0.6, 1.5)) -> Hierarchy:
    """A hierarchy of emulated models, the last the target; drafts are right four times in five."""
    models = []
    for index, name in enumerate(names):
        values: dict[str, object] = {"step_ms": {"1": steps_ms[index - len(names)]}}
        if index < len(names) - 1:
            values["agreement"] = 0.8
        models.append(ModelConfig(f"emulated/{name}", (f"cpu:{index % 2}",), emulated=values))
    return open_hierarchy(models)


def started(*names: str, transport: str = "ipc") -> AsyncChainSpeculativeDecoder:
    hierarchy = emulated(*(names or ("draft", "target")))
    return AsyncChainSpeculativeDecoder(hierarchy, transport=transport)


def limit(max_new_tokens: int) -> GenerationParams:
    return GenerationParams(max_new_tokens=max_new_tokens)


def target_ids(count: int, prompt: str = PROMPT) -> tuple[int, ...]:
    """What the emulated target writes, computed here token by token."""
    runner = EmulatedRunner({"step_ms": {"1": 0}}, name="target", vocab_size=257)
    ids, start = tuple(prompt.encode()), 0
    written: tuple[int, ...] = ()
    while len(written) < count:
        (draws,) = runner.forward([Row(0, start, ids, 1, SamplingParams())])
        start, ids, written = start + len(ids), tuple(draws), (*written, *draws)
    return written


def assert_serves(decoder: AsyncChainSpeculativeDecoder, count: int = 20) -> None:
    assert decoder.generate(PROMPT, limit(count)).token_ids == target_ids(count)


# -- serving ------------------------------------------------------------------------------------


def test_a_hundred_requests_one_after_the_other() -> None:
    launcher = psutil.Process()
    with started("draft", "middle", "target") as decoder:
        workers = [psutil.Process(pid) for pid in decoder.pipeline.pids]
        for number in range(100):
            prompt = f"request {number}"
            output = decoder.generate(prompt, limit(1 + number % 12))
            assert output.token_ids == target_ids(1 + number % 12, prompt), number
            assert all(counts for counts in output.counts), "every stage has reported"
            if number == 10:
                before = [process.num_fds() for process in (launcher, *workers)]
        assert [process.num_fds() for process in (launcher, *workers)] == before
        assert decoder.pipeline.num_stale_frames == decoder.pipeline.num_malformed_frames == 0


def test_two_pipelines_side_by_side_do_not_hear_each_other() -> None:
    with started() as one, started("draft", "middle", "target") as other:
        with closing(one.stream("one", ENDLESS)) as stream:  # type: ignore[type-var]
            next(stream)
            assert other.generate("other", limit(30)).token_ids == target_ids(30, "other")
        assert one.generate("one", limit(30)).token_ids == target_ids(30, "one")


def test_eight_pipelines_leave_no_file_descriptor_thread_or_process(temporary_dir: Path) -> None:
    launcher = psutil.Process()
    for number in range(8):
        with fake_pipeline("echo", transport="ipc" if number % 4 else "tcp"):
            pass
        assert not launcher.children() and not list(temporary_dir.iterdir())
        if number == 0:
            before = (launcher.num_fds(), launcher.num_threads())
    assert (launcher.num_fds(), launcher.num_threads()) == before


def intervals(output: Generation, stage: int) -> list[tuple[float, float]]:
    """Start and end of each decode step on the clock that all processes of a machine share."""
    counts = output.counts[stage]
    steps = zip(counts["step_starts_s"], counts["step_times_s"], strict=True)
    return [(start_s, start_s + time_s) for start_s, time_s in steps]


def share_inside(output: Generation) -> float:
    """Of the draft's forwards, how many begin and end within one forward of the target."""
    inside = [
        any(begin_s <= start_s and end_s <= stop_s for begin_s, stop_s in intervals(output, 1))
        for start_s, end_s in intervals(output, 0)
    ]
    return sum(inside) / len(inside)


@pytest.mark.alone
def test_drafts_are_computed_while_the_target_computes() -> None:
    hierarchy = emulated("draft", "target", steps_ms=(5.0, 40.0))
    with AsyncChainSpeculativeDecoder(hierarchy) as decoder:
        overlapping = decoder.generate(PROMPT, limit(24))
    with closing(ChainSpeculativeDecoder(hierarchy)) as chain:
        in_turn = chain.generate(PROMPT, limit(24))
    assert overlapping.token_ids == in_turn.token_ids == target_ids(24)
    assert share_inside(in_turn) == 0.0
    assert share_inside(overlapping) > 0.1, "a machine with other work has fewer, not none"


@pytest.mark.alone
def test_workers_are_seen_in_ps_stay_on_their_core_and_cost_nothing_when_idle() -> None:
    hierarchy = emulated("draft", "middle", "target")
    with AsyncChainSpeculativeDecoder(hierarchy) as decoder:
        assert_serves(decoder)
        workers = [psutil.Process(pid) for pid in decoder.pipeline.pids]
        for index, worker in enumerate(workers):
            shown = " ".join(worker.cmdline())
            assert f"-m pipespec.worker --stage {index} " in shown
            cores = list(hierarchy.placements[index].cores)
            assert worker.cpu_affinity() == decoder.pipeline.infos[index]["cores"] == cores
            assert worker.environ()["OMP_NUM_THREADS"] == "1"
        before_s = [sum(worker.cpu_times()[:2]) for worker in workers]
        decoder.pipeline.receive(1.0)
        used_s = [sum(worker.cpu_times()[:2]) for worker in workers]
        shares = [now - then for then, now in zip(before_s, used_s, strict=True)]
        assert max(shares) < 0.05, f"idle stages use {shares} of a core"


def test_real_checkpoints_are_served_without_transformers(tmp_path: Path) -> None:
    folders = tuple(
        make_tiny(tmp_path / name, vocab_size=257, seed=seed)
        for seed, name in enumerate(("draft", "target"))
    )
    models = tuple(ModelConfig(str(folder), ("cpu:0",), "float32") for folder in folders)
    hierarchy = replace(
        emulated("draft", "target"),
        models=models,
        folders=folders,
        tokenizer=ByteTokenizer(),
        vocab_size=257,
        context_length=64,
    )
    with AsyncChainSpeculativeDecoder(hierarchy) as decoder:
        infos = decoder.pipeline.infos
        assert [info["runner"] for info in infos] == ["native", "native"]
        assert [info["uses_transformers"] for info in infos] == [False, False]
        output = decoder.generate(PROMPT, limit(30))
    with closing(GreedyDecoder(hierarchy.target_only)) as greedy:
        assert output.token_ids == greedy.generate(PROMPT, limit(30)).token_ids


# -- giving up ----------------------------------------------------------------------------------


def test_a_stream_that_is_not_read_to_its_end_gives_way_to_the_next_request() -> None:
    with started() as decoder:
        for _ in range(5):
            with closing(decoder.stream(PROMPT, ENDLESS)) as stream:  # type: ignore[type-var]
                next(stream)
            assert_serves(decoder)


def test_a_stream_that_was_left_open_ends_with_a_reason_once_another_text_is_asked_for() -> None:
    with started() as decoder:
        stream = decoder.stream(PROMPT, ENDLESS)
        next(stream)
        assert_serves(decoder)
        with pytest.raises(UsageError, match="one at a time"):
            list(stream)
        assert_serves(decoder)


def test_ctrl_c_gives_up_the_text_and_the_pipeline_goes_on() -> None:
    seed = random.randrange(1 << 32)
    chance = random.Random(seed)
    with started() as decoder:
        for _ in range(8):
            ctrl_c = threading.Timer(chance.random() / 20, os.kill, (os.getpid(), signal.SIGINT))
            with pytest.raises(KeyboardInterrupt):  # noqa: PT012
                ctrl_c.start()  # which may be interrupted already
                decoder.generate(PROMPT, ENDLESS)
            ctrl_c.join()
            assert decoder.generate(PROMPT, limit(20)).token_ids == target_ids(20), f"seed {seed}"


# -- failing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_stage_killed_in_the_middle_of_a_text_ends_the_run_with_its_name(victim: int) -> None:
    name = ("draft", "middle", "target")[victim]
    with started("draft", "middle", "target") as decoder:
        pids = decoder.pipeline.pids
        stream = decoder.stream(PROMPT, ENDLESS)
        next(stream)
        os.kill(pids[victim], signal.SIGKILL)
        start_s = time.monotonic()
        with pytest.raises(StageError, match=rf"^stage {victim} \({name}\) was killed") as caught:
            list(stream)
        assert time.monotonic() - start_s < 10.0
        assert any(f"stage {victim} INFO" in line for line in caught.value.log_tail)
        assert all(is_gone(pid) for pid in pids)
        with pytest.raises(StageError, match="was killed"):
            decoder.generate(PROMPT)


@pytest.mark.parametrize(
    ("place", "behaviour", "message"),
    [
        (0, "raise_in_forward", "failed: RuntimeError: device-side assert"),
        (1, "raise_in_forward", "failed: RuntimeError: device-side assert"),
        (1, "run_out_of_memory_in_forward", "failed: MemoryError"),
    ],
)
def test_an_error_in_a_forward_is_reported_with_its_traceback(
    place: int, behaviour: str, message: str
) -> None:
    names = [behaviour, "target"] if place == 0 else ["draft", behaviour]
    with AsyncChainSpeculativeDecoder(emulated(*names), command=FAKE_WORKER) as decoder:
        with pytest.raises(StageError) as caught:
            decoder.generate(PROMPT, ENDLESS)
        assert str(caught.value) == f"stage {place} ({behaviour}) {message}"
        tail = "\n".join(caught.value.log_tail)
        assert "Traceback (most recent call last)" in tail and "in forward" in tail


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        ("run_out_of_memory_while_loading", "failed: MemoryError"),
        ("exit_while_loading", "ended with exit status 3 while loading"),
    ],
)
def test_a_stage_that_ends_while_it_loads_is_named(behaviour: str, message: str) -> None:
    with pytest.raises(StageError, match=rf"stage 0 \({behaviour}\) {message}$"):
        AsyncChainSpeculativeDecoder(emulated(behaviour, "target"), command=FAKE_WORKER)


def test_a_stage_that_computes_for_ever_is_named_in_the_end() -> None:
    hierarchy = emulated("draft", "target")
    with AsyncChainSpeculativeDecoder(hierarchy, stall_timeout_s=1.0) as decoder:
        stream = decoder.stream(PROMPT, ENDLESS)
        next(stream)
        os.kill(decoder.pipeline.pids[1], signal.SIGSTOP)
        with pytest.raises(StageError, match=r"^stage 1 \(target\) did not answer for 1 s$"):
            list(stream)
        os.kill(decoder.pipeline.pids[1], signal.SIGCONT)
        assert_serves(decoder)


def test_a_stage_that_lost_a_request_is_noticed_long_before_one_that_computes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pipespec.decoding.async_chain.WAIT_S", 0.15)
    hierarchy = emulated("draft", "lose_every_request")
    with (
        AsyncChainSpeculativeDecoder(hierarchy, command=FAKE_WORKER) as decoder,
        pytest.raises(StageError, match=r"stage 1 \(lose_every_request\) has nothing to compute"),
    ):
        decoder.generate(PROMPT)


# -- what others send ---------------------------------------------------------------------------


def test_malformed_frames_on_every_link_are_counted_and_change_nothing(
    temporary_dir: Path,
) -> None:
    with started() as decoder, zmq.Context() as context:
        (run_dir,) = temporary_dir.iterdir()
        links = [path for path in run_dir.iterdir() if path.is_socket()]
        assert len(links) == 3
        for path in links:
            with context.socket(zmq.DEALER) as stranger:
                stranger.setsockopt(zmq.LINGER, 5000)
                stranger.connect(f"ipc://{path}")
                for data in (b"", b"\xff" * 100, b"\x93abc"):
                    stranger.send(data)
        count = decoder.pipeline
        wait_until(lambda: count.receive(0.1) == [] and count.num_malformed_frames == 9)
        assert_serves(decoder)


def test_tcp_stays_on_this_machine_and_hears_only_its_own_processes(temporary_dir: Path) -> None:
    with started(transport="tcp") as decoder, zmq.Context() as context:
        processes = [psutil.Process(), *map(psutil.Process, decoder.pipeline.pids)]
        sockets = [link for process in processes for link in process.net_connections("tcp")]
        listening = [link.laddr for link in sockets if link.status == psutil.CONN_LISTEN]
        assert len(listening) == 3
        assert {address.ip for address in listening} == {"127.0.0.1"}
        lie = encode(Frame(0, 1, 1, 1, Fault("RuntimeError", "believe me", "")))
        with context.socket(zmq.DEALER) as stranger:
            stranger.setsockopt(zmq.LINGER, 0)
            for address in listening:
                stranger.connect(f"tcp://{address.ip}:{address.port}")
            for _ in range(30):
                stranger.send(lie)
            assert_serves(decoder, 60)
        assert decoder.pipeline.num_malformed_frames == 0
        (run_dir,) = temporary_dir.iterdir()
        assert read_spec(run_dir).keys is not None


# -- ending from outside ------------------------------------------------------------------------


def children_of(pid: int) -> list[int]:
    return [child.pid for child in psutil.Process(pid).children(recursive=True)]


def command(folder: Path) -> tuple[str, ...]:
    """A command that would write for minutes."""
    config = write_emulated(folder, 3)
    return (
        *("-m", "pipespec.run_example", "--models-config-path", config),
        *("--strategy", "async-chain", "--prompt", PROMPT, "--max-new-tokens", "100000"),
    )


@pytest.mark.parametrize("moment", ["when the first worker starts", "while it writes"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_command_ended_by_a_signal_leaves_nothing(
    number: signal.Signals, moment: str, tmp_path: Path, temporary_dir: Path
) -> None:
    with python(*command(tmp_path)) as process:
        assert process.stdout is not None
        if moment == "while it writes":
            assert len(process.stdout.read(100)) == 100
        else:
            wait_until(lambda: bool(list(temporary_dir.glob("*/stage-0.log"))))
        workers = children_of(process.pid)
        os.killpg(process.pid, number)  # as a terminal does
        _, errors = process.communicate(timeout=DEADLINE_S)
        assert process.returncode == 128 + number, errors
        assert "Traceback" not in errors
        assert all(is_gone(pid) for pid in workers)
        assert not list(temporary_dir.iterdir())


def test_workers_end_by_themselves_when_their_launcher_is_killed(
    tmp_path: Path, temporary_dir: Path
) -> None:
    with python(*command(tmp_path)) as process:
        assert process.stdout is not None and process.stdout.read(100)
        workers = children_of(process.pid)
        assert len(workers) == 3
        process.send_signal(signal.SIGKILL)
        wait_until(lambda: all(is_gone(pid) for pid in workers), "orphans")
        wait_until(lambda: not list(temporary_dir.iterdir()), "files are left")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_program_without_signal_handlers_leaves_nothing_either(
    number: signal.Signals, tmp_path: Path, temporary_dir: Path
) -> None:
    """It is gone at once, and its stages got the same signal."""
    code = (
        "import sys, pipespec; decoder = pipespec.load(sys.argv[1]);"
        "print(*decoder.pipeline.pids, flush=True); decoder.generate('x' * 100)"
    )
    with python("-c", code, write_emulated(tmp_path, target_ms=1000.0)) as process:
        assert process.stdout is not None
        workers = [int(pid) for pid in process.stdout.readline().split()]
        os.killpg(process.pid, number)
        assert process.wait(DEADLINE_S) == -number
        wait_until(lambda: all(is_gone(pid) for pid in workers), "orphans")
        wait_until(lambda: not list(temporary_dir.iterdir()), "files are left")


def test_a_worker_whose_launcher_died_before_it_connected_ends_and_cleans_up(
    temporary_dir: Path,
) -> None:
    with started():
        (run_dir,) = temporary_dir.iterdir()
        spec = read_spec(run_dir)
    with subprocess.Popen(["true"]) as gone:
        pass
    run_dir.mkdir()
    write_spec(run_dir, replace(spec, launcher_pid=gone.pid))
    with python("-m", "pipespec.worker", "--stage", "0", "--run-dir", str(run_dir)) as worker:
        assert worker.wait(DEADLINE_S) == 1
    assert not run_dir.exists()


def test_a_worker_that_read_another_specification_is_refused(
    temporary_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here the file was changed after the launcher wrote it."""

    def write_something_else(run_dir: Path, spec: object) -> None:
        write_spec(run_dir, spec)  # type: ignore[arg-type]
        values = json.loads((run_dir / "spec.json").read_text())
        (run_dir / "spec.json").write_text(json.dumps({**values, "vocab_size": 99}))

    monkeypatch.setattr("pipespec.launcher.write_spec", write_something_else)
    with pytest.raises(StageError, match="understands another configuration"):
        started()
