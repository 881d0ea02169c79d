"""Real processes: they start, answer, fail with a name, and never outlive their launcher."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from fake_launcher import fake_pipeline
from processes import DEADLINE_S, is_gone, nothing_left_in, python, wait_until

from pipespec.config import ModelConfig, SamplingParams, Schedule
from pipespec.errors import ModelLoadError, StageError, UsageError
from pipespec.interrupts import hold_interrupts, install_signal_handlers
from pipespec.launcher import Pipeline, StageStatus
from pipespec.messages import Connect, Frame, Hello, Link, Message, Output, Stats, Submit
from pipespec.placement import StagePlacement
from pipespec.stage_process import stage_environment
from pipespec.transport import Keys
from pipespec.worker import StageSession
from pipespec.worker_spec import RunSpec, StageSpec, make_run_dir, read_spec, write_spec


@pytest.fixture(autouse=True)
def temporary_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with nothing_left_in(tmp_path_factory.mktemp("t")) as directory:
        yield directory


def submit(request: int) -> Submit:
    return Submit(request, (1, 2, 3), (), SamplingParams(), 4, (0,), ())


def receive(pipeline: Pipeline, count: int) -> list[tuple[int, Message]]:
    messages: list[tuple[int, Message]] = []
    deadline = time.monotonic() + DEADLINE_S
    while len(messages) < count and time.monotonic() < deadline:
        messages += pipeline.receive(1.0)
    assert len(messages) == count
    return messages


# -- serving ------------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", ["ipc", "tcp"])
def test_requests_reach_the_target_and_answers_come_back(transport: str) -> None:
    with fake_pipeline("echo", "echo", "echo", transport=transport) as pipeline:
        assert pipeline.is_running
        for request in range(5):
            pipeline.submit(submit(request))
        answers = [(2, Output(request, 3, (1, 2, 3), "eos")) for request in range(5)]
        assert receive(pipeline, 5) == answers
        pipeline.finish(0)
        assert receive(pipeline, 1) == [(2, Stats(0, {"stage": 2}))]
        assert pipeline.receive(0.0) == []
    assert not pipeline.is_running


def test_more_requests_than_a_link_holds_are_all_answered() -> None:
    with fake_pipeline("echo") as pipeline:
        for request in range(5000):
            pipeline.submit(submit(request))
        requests = [message.request for _, message in receive(pipeline, 5000)]  # type: ignore[union-attr]
        assert requests == list(range(5000))


def test_progress_is_reported_until_all_are_ready() -> None:
    seen: list[tuple[StageStatus, ...]] = []
    with fake_pipeline("echo", "echo", on_progress=seen.append) as pipeline:
        last = seen[-1]
        assert [status.phase for status in last] == ["ready", "ready"]
        assert [status.index for status in last] == [0, 1]
        assert tuple(status.pid for status in last) == pipeline.pids
        assert pipeline.infos[0]["load_s"] == 0.25


class Scripted:
    """A transport on which one frame comes after the other, and that counts waits for nothing."""

    def __init__(self, frames: list[tuple[Link, Frame]]) -> None:
        self._frames = frames
        self.waited_s = 0.0

    def receive_from(self, link: Link, timeout_s: float) -> list[Frame]:
        if self._frames and self._frames[0][0] is link:
            return [self._frames.pop(0)[1]]
        self.waited_s += timeout_s
        return []


@pytest.mark.parametrize("first", [Link.LAUNCHER, Link.UP])
def test_a_stage_that_has_heard_its_neighbours_starts_at_once(first: Link) -> None:
    frames = [
        (Link.LAUNCHER, Frame(1023, 1, 1, 0, Connect(""))),
        (Link.UP, Frame(0, 1, 1, 0, Hello(0, 1, "", "", ""))),
    ]
    transport = Scripted(sorted(frames, key=lambda item: item[0] is not first))
    stages = (StageSpec(ModelConfig("m", ("cpu",)), StagePlacement("cpu"), None, None),) * 2
    spec = RunSpec(0, "ipc", None, Schedule(), 100, None, "", 1, 60.0, stages)
    assert StageSession(1, Path(), spec, transport).await_neighbours()  # type: ignore[arg-type]
    assert transport.waited_s < 0.1


def test_a_worker_is_told_apart_in_ps_and_limited_before_it_starts() -> None:
    with fake_pipeline("echo", "echo") as pipeline:
        for index, pid in enumerate(pipeline.pids):
            command = psutil.Process(pid).cmdline()
            assert command[command.index("--stage") + 1] == str(index)
            environment = pipeline.infos[index]["environment"]
            assert (
                environment["OMP_NUM_THREADS"] == environment["MKL_NUM_THREADS"] == f"{index + 1}"
            )
            assert environment["CUDA_VISIBLE_DEVICES"] == ""
            assert environment["TOKENIZERS_PARALLELISM"] == "false"


def test_frames_of_a_dead_process_or_of_another_stage_are_dropped_and_counted() -> None:
    with fake_pipeline("speak_for_the_dead") as pipeline:
        pipeline.submit(submit(1))
        assert receive(pipeline, 1) == [(0, Output(1, 3, (1, 2, 3), "eos"))]
        assert pipeline.num_stale_frames == 2


def test_closing_twice_and_before_the_start_is_harmless(temporary_dir: Path) -> None:
    fake_pipeline("echo").close()
    pipeline = fake_pipeline("echo", "echo").start()
    pids = pipeline.pids
    assert len(list(temporary_dir.iterdir())) == 1
    pipeline.close()
    pipeline.close()
    assert all(is_gone(pid) for pid in pids)
    with pytest.raises(StageError, match="closed"):
        pipeline.receive(0.0)


def test_the_run_directory_is_closed_to_others(temporary_dir: Path) -> None:
    with fake_pipeline("echo", "echo", transport="tcp"):
        (run_dir,) = temporary_dir.iterdir()
        assert run_dir.stat().st_mode & 0o777 == 0o700
        assert {path.name for path in run_dir.iterdir() if path.is_file()} == {
            "spec.json",
            "stage-0.log",
            "stage-1.log",
        }
        assert (run_dir / "spec.json").stat().st_mode & 0o777 == 0o600


# -- failing ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("behaviour", "message", "last_line"),
    [
        ("raise_unknown_error", "failed: RuntimeError: the weights are upside down", "upside down"),
        ("exit_silently", "ended with exit status 7", "a last word"),
        ("understand_something_else", "another configuration", ""),
        ("have_another_tokenizer", "another tokenizer", ""),
    ],
)
def test_a_stage_that_fails_to_start_is_named(behaviour: str, message: str, last_line: str) -> None:
    with pytest.raises(StageError, match=rf"^stage 1 \({behaviour}\) .*{message}") as caught:
        fake_pipeline("echo", behaviour, "load_for_ever").start()
    assert "\n" not in str(caught.value)
    assert last_line in "\n".join(caught.value.log_tail[-1:])


def test_the_log_tail_of_a_failure_holds_its_traceback() -> None:
    with pytest.raises(StageError) as caught:
        fake_pipeline("raise_unknown_error").start()
    tail = "\n".join(caught.value.log_tail)
    assert "Traceback (most recent call last)" in tail
    assert "in raise_unknown_error" in tail


def test_a_load_error_of_a_stage_reaches_the_user_as_its_own_line() -> None:
    with pytest.raises(ModelLoadError, match=r"^no-such-model: not found; is HF_TOKEN set\?$"):
        fake_pipeline("echo", "raise_load_error").start()


@pytest.mark.alone
def test_a_stage_that_is_not_ready_in_time_is_named_with_its_phase() -> None:
    with pytest.raises(StageError, match=r"stage 1 \(load_for_ever\) is still .*--ready-timeout"):
        fake_pipeline("echo", "load_for_ever", ready_timeout_s=1.0).start()


def test_what_a_stage_sent_before_it_failed_is_delivered_first() -> None:
    with fake_pipeline("answer_and_fail") as pipeline:
        pipeline.submit(submit(1))
        assert receive(pipeline, 1) == [(0, Output(1, 0, (1, 2, 3), ""))]
        with pytest.raises(StageError, match=r"answer_and_fail\) failed: RuntimeError: enough"):
            receive(pipeline, 1)


def test_the_logs_of_a_failure_are_kept_on_request(
    temporary_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(StageError):
        fake_pipeline("raise_unknown_error", keep_run_dir=True).start()
    (run_dir,) = temporary_dir.iterdir()
    assert "upside down" in (run_dir / "stage-0.log").read_text()
    assert str(run_dir) in caplog.text
    shutil.rmtree(run_dir)


def test_a_stage_that_ignores_every_request_to_end_is_killed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pipespec.launcher._SHUTDOWN_S", 0.3)
    pipeline = fake_pipeline("ignore_every_request_to_end", "echo").start()
    pids = pipeline.pids
    pipeline.close()
    assert all(is_gone(pid) for pid in pids)


def test_an_unknown_transport_is_refused_before_anything_starts() -> None:
    with pytest.raises(UsageError, match="--transport"):
        fake_pipeline("echo", transport="carrier pigeon")


# -- ending from outside ------------------------------------------------------------------------


@contextmanager
def launcher_process(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """`fake_launcher.py`, and what it printed when its stages were there."""
    with python(str(Path(__file__).with_name("fake_launcher.py")), *arguments) as process:
        assert process.stdout is not None
        yield process, json.loads(process.stdout.readline())


def test_workers_that_load_end_and_clean_up_when_their_launcher_is_killed(
    temporary_dir: Path,
) -> None:
    with launcher_process("loading", "load_for_ever", "load_for_ever") as (process, facts):
        assert len(list(temporary_dir.iterdir())) == 1
        process.send_signal(signal.SIGKILL)
        wait_until(lambda: all(is_gone(pid) for pid in facts["pids"]), "orphans")
        wait_until(lambda: not list(temporary_dir.iterdir()), "files are left")


def test_a_program_that_forgets_to_close_leaves_nothing(temporary_dir: Path) -> None:
    code = "from fake_launcher import *; print(fake_pipeline('echo', 'echo').start().pids)"
    with python("-c", code) as process:
        output, errors = process.communicate(timeout=DEADLINE_S)
        assert process.returncode == 0, errors
        assert all(is_gone(pid) for pid in json.loads(output.replace("(", "[").replace(")", "]")))
        assert not list(temporary_dir.iterdir())


def test_ctrl_c_while_stages_load_reaches_the_whole_group_and_leaves_nothing(
    temporary_dir: Path,
) -> None:
    with launcher_process("loading", "load_for_ever", "load_for_ever") as (process, facts):
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=DEADLINE_S)
        assert process.returncode == -signal.SIGINT  # how Python ends on KeyboardInterrupt
        assert errors.rstrip().endswith("KeyboardInterrupt")
        assert all(is_gone(pid) for pid in facts["pids"])
        assert not list(temporary_dir.iterdir())


def test_a_second_ctrl_c_does_not_wait_for_a_stubborn_stage(temporary_dir: Path) -> None:
    with launcher_process("ignore_every_request_to_end") as (process, facts):
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=DEADLINE_S)
        assert all(is_gone(pid) for pid in facts["pids"])
        assert not list(temporary_dir.iterdir())


def test_signal_handlers_are_given_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught, install_signal_handlers():
        signal.raise_signal(signal.SIGTERM)
    assert caught.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_interrupt_waits_for_what_must_be_done_whole() -> None:
    done = []

    def start_and_write_down() -> None:
        with hold_interrupts():
            signal.raise_signal(signal.SIGINT)
            done.append("the process is written down")

    with pytest.raises(KeyboardInterrupt):
        start_and_write_down()
    assert done
    with pytest.raises(KeyboardInterrupt):  # and strikes at once afterwards
        signal.raise_signal(signal.SIGINT)


def test_an_interrupt_is_not_lost_when_what_it_waited_for_fails() -> None:
    def fail_to_start() -> None:
        with hold_interrupts():
            signal.raise_signal(signal.SIGINT)
            raise OSError("no such program")

    with pytest.raises(KeyboardInterrupt) as caught:
        fail_to_start()
    assert isinstance(caught.value.__context__, OSError)


# -- the run directory --------------------------------------------------------------------------


def test_a_specification_survives_the_file_in_every_field() -> None:
    model = ModelConfig(
        path="a/b",
        devices=("cuda:0", "cuda:1"),
        quantize="4bit",
        runner="emulated",
        threads=2,
        max_memory_gib=3.5,
        tokenizer="c",
        emulated={"latency_ms": {"1": [0.5, 0.6]}},
    )
    placement = StagePlacement("auto", ("0", "GPU-1"), (1, 3), 2, {"0": 3.5, "cpu": 10.0})
    run_dir = make_run_dir()
    spec = RunSpec(
        launcher_pid=1,
        transport="tcp",
        keys=Keys("public", "secret"),
        schedule=Schedule(lookahead=4),
        vocab_size=100,
        context_length=None,
        tokenizer_digest="digest",
        num_slots=3,
        ready_timeout_s=60.0,
        stages=(StageSpec(model, placement, "/folder", None, "tcp://127.0.0.1:1", 2),),
    )
    write_spec(run_dir, spec)
    restored = read_spec(run_dir)
    assert restored == spec
    assert restored.digest == spec.digest
    (run_dir / "spec.json").write_text('{"stages": []}')
    with pytest.raises(StageError, match="not a worker's specification"):
        read_spec(run_dir)
    (run_dir / "spec.json").unlink()
    with pytest.raises(StageError, match=r"spec\.json"):
        read_spec(run_dir)
    run_dir.rmdir()


def test_a_long_temporary_path_does_not_break_the_sockets(
    monkeypatch: pytest.MonkeyPatch, temporary_dir: Path
) -> None:
    deep = temporary_dir / ("d" * 90)
    deep.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    with fake_pipeline("echo", "echo") as pipeline:
        assert pipeline.is_running
    deep.rmdir()


def test_gpus_are_hidden_from_those_who_do_not_own_them() -> None:
    inherited = {"CUDA_VISIBLE_DEVICES": "0,1,2,3", "PYTHONPATH": "/somewhere"}
    on_gpus = stage_environment(StagePlacement("auto", ("2", "3")), inherited)
    assert on_gpus["CUDA_VISIBLE_DEVICES"] == "2,3"
    on_cpu = stage_environment(StagePlacement("cpu"), inherited)
    assert on_cpu["CUDA_VISIBLE_DEVICES"] == ""
    assert on_cpu.get("PYTHONPATH", "/somewhere").endswith("/somewhere")


def test_the_worker_explains_itself_without_torch() -> None:
    code = (
        "import sys; from pipespec.worker import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as end: sys.exit(end.code or 9 * ('torch' in sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    assert "--run-dir" in run.stdout


def test_a_worker_without_its_specification_says_so(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pipespec.worker", "--stage", "0", "--run-dir", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert run.returncode == 1
    assert "spec.json" in run.stderr
    assert "Traceback" not in run.stderr
