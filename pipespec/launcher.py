"""Starts one worker process per stage, watches over them, and leaves nothing behind.

A `Pipeline` owns the processes, their run directory (specification, logs, sockets) and one control
link per stage. Whatever ends it, an error, Ctrl-C, SIGTERM or `close()`, the processes are reaped
and the directory is gone; if the launcher itself is killed, the workers see it and clean up.

A stage that is alive but silent is alive: a long forward is not a failure, and only the layer
above knows what a request may take. What tokens mean is not known here.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import logging
import os
import shutil
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Final, Self

from pipespec import errors
from pipespec.checkpoint import locate_tokenizer
from pipespec.config import ModelConfig, Schedule
from pipespec.errors import PipeSpecError, StageError, UsageError
from pipespec.messages import (
    LAUNCHER,
    Abort,
    Connect,
    Fault,
    Finish,
    Frame,
    Heartbeat,
    Hello,
    Message,
    Ready,
    Shutdown,
    Submit,
)
from pipespec.placement import StagePlacement
from pipespec.stage_process import StageProcess, StageStatus
from pipespec.transport import Keys, ZmqTransport
from pipespec.worker_spec import RunSpec, StageSpec, endpoint_in, make_run_dir, write_spec

log = logging.getLogger(__name__)

WORKER: Final = (sys.executable, "-m", "pipespec.worker")
TRANSPORTS: Final = ("ipc", "tcp")
_LIVENESS_S: Final = 0.1  # how often the processes are looked at while waiting for messages
_FAULT_S: Final = 0.3  # how long an ended process's last words may take to arrive
_SHUTDOWN_S: Final = 2.0  # for a stage to end by itself
_TERMINATE_S: Final = 2.0  # for it to end after SIGTERM
_TAIL_LINES: Final = 20

OnProgress = Callable[[tuple[StageStatus, ...]], None]


class Pipeline:
    """All stages of a hierarchy as processes: start it, submit, receive, close it.

    A context manager; entering it starts it. One thread uses it.

    Args:
        models, placements, folders: one for each stage, first draft first. A folder holds the
            model's files; None is for a model that has none.
        vocab_size: number of token ids that any stage may draw.
        context_length: positions that a request may use; None leaves it to the models.
        tokenizer_folders: where each stage's tokenizer is; None: where its config says, a
            relative path being below the working directory.
        tokenizer_digest: of the tokenizer that all stages must have; "" is not compared.
        transport: "ipc", or "tcp" over the loopback interface.
        ready_timeout_s: for all models to load.
        on_progress: called several times a second until all stages are ready.
        keep_run_dir: after a failure, leave the logs where they are (a warning says where).
        command: what starts a worker; `--stage I --run-dir DIR` is appended.
    """

    def __init__(
        self,
        models: Sequence[ModelConfig],
        placements: Sequence[StagePlacement],
        schedule: Schedule,
        *,
        folders: Sequence[Path | None],
        vocab_size: int,
        context_length: int | None,
        tokenizer_folders: Sequence[Path | None] | None = None,
        tokenizer_digest: str = "",
        num_slots: int = 1,
        transport: str = "ipc",
        ready_timeout_s: float = 600.0,
        on_progress: OnProgress | None = None,
        keep_run_dir: bool = False,
        command: Sequence[str] = WORKER,
    ) -> None:
        if transport not in TRANSPORTS:
            raise UsageError(f"--transport is {transport}; it must be one of ipc, tcp")
        assert len(models) == len(placements) == len(folders) >= 1
        self.num_stale_frames = 0
        tokenizers = tokenizer_folders or list(map(tokenizer_folder_of, models, folders))
        self._spec = RunSpec(  # all but the endpoints and keys of this run
            launcher_pid=os.getpid(),
            transport=transport,
            keys=None,
            schedule=schedule,
            vocab_size=vocab_size,
            context_length=context_length,
            tokenizer_digest=tokenizer_digest,
            num_slots=num_slots,
            stages=tuple(
                StageSpec(model, placement, _text(folder), _text(tokenizer_folder))
                for model, placement, folder, tokenizer_folder in zip(
                    models, placements, folders, tokenizers, strict=True
                )
            ),
        )
        self._ready_timeout_s = ready_timeout_s
        self._on_progress = on_progress
        self._keep_run_dir = keep_run_dir
        self._command = tuple(command)

        self._stages: tuple[StageProcess, ...] = ()
        self._run_dir: Path | None = None
        self._transport: ZmqTransport[int] | None = None
        self._started_at = 0.0
        self._sequence = itertools.count()
        self._outgoing: deque[tuple[int, Message]] = deque()
        self._failure: PipeSpecError | None = None

    # -- life -------------------------------------------------------------------------------

    def start(self) -> Self:
        """Starts all stages and waits until each is ready. On any error everything is closed.

        Raises:
            UsageError: a stage's model cannot be loaded; the stage's own line.
            StageError: a stage failed or was not ready in time.
        """
        assert self._transport is None, "a pipeline starts once"
        atexit.register(self.close)
        try:
            self._open()
            for stage in self._stages:
                stage.spawn(self._command, os.environ)
            self._await_ready()
        except BaseException:
            self.close()
            raise
        return self

    def close(self) -> None:
        """Ends all stages and removes everything. Idempotent; takes up to a few seconds."""
        if os.getpid() != self._spec.launcher_pid:  # a forked child's copy
            return
        try:
            self._stop_gently()
        finally:  # also when a second Ctrl-C cuts the waiting short
            for stage in self._stages:
                stage.signal(signal.SIGKILL)
            for stage in self._stages:
                stage.wait(timeout_s=10.0)
            if self._transport is not None:
                self._transport.close()
            if self._run_dir is not None:
                self._remove_run_dir(self._run_dir)
                self._run_dir = None
            atexit.unregister(self.close)

    def __enter__(self) -> Self:
        return self if self._transport is not None else self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # -- requests ---------------------------------------------------------------------------

    def submit(self, message: Submit) -> None:
        """Hands a request to the target, which passes it up. Never blocks.

        Raises:
            StageError: a stage failed or died, or the pipeline is closed.
        """
        self._send_to_target(message)

    def finish(self, request: int) -> None:
        """Lets all stages forget a completed request and report their `Stats`."""
        self._send_to_target(Finish(request))

    def abort(self, request: int) -> None:
        """Lets all stages forget a request that is not wanted any more."""
        self._send_to_target(Abort(request))

    def receive(self, timeout_s: float) -> list[tuple[int, Message]]:
        """What the stages sent (`Output`, `Stats`), with the stage's index, in their order.

        Waits at most `timeout_s` for a first message. Every call looks whether all stages live;
        what a stage sent before it died is returned first, the next call raises.

        Raises:
            StageError: a stage failed or died; all others have been stopped.
        """
        if self.is_running:
            self._flush()
            messages = self._poll(timeout_s)
            if messages or self._failure is None:
                return messages
        raise self._ended()

    # -- facts ------------------------------------------------------------------------------

    @property
    def pids(self) -> tuple[int, ...]:
        return tuple(stage.pid for stage in self._stages)

    @property
    def infos(self) -> tuple[dict[str, Any], ...]:
        """What each stage said of its runner when it was ready, and how long loading took."""
        return tuple({**stage.info, "load_s": stage.load_s} for stage in self._stages)

    @property
    def statuses(self) -> tuple[StageStatus, ...]:
        elapsed_s = time.monotonic() - self._started_at
        return tuple(
            StageStatus(stage.index, stage.spec.model.name, stage.pid, stage.phase, elapsed_s)
            for stage in self._stages
        )

    @property
    def is_running(self) -> bool:
        """Whether requests can be submitted: started, not closed, and no stage failed."""
        return self._run_dir is not None and self._failure is None

    def log_tail(self, stage: int, num_lines: int = _TAIL_LINES) -> tuple[str, ...]:
        """The last lines of a stage's log, oldest first."""
        return self._stages[stage].log_tail(num_lines)

    # -- starting ---------------------------------------------------------------------------

    def _open(self) -> None:
        kind = self._spec.transport
        keys = Keys.generate() if kind == "tcp" else None
        run_dir = self._run_dir = make_run_dir()
        transport = self._transport = ZmqTransport[int](linger_s=0.0, keys=keys)
        stages = tuple(
            replace(stage, endpoint=transport.bind(index, endpoint_in(run_dir, kind, str(index))))
            for index, stage in enumerate(self._spec.stages)
        )
        self._spec = replace(self._spec, keys=keys, stages=stages)
        write_spec(run_dir, self._spec)
        self._started_at = time.monotonic()
        self._stages = tuple(
            StageProcess(index, stage, run_dir / f"stage-{index}.log")
            for index, stage in enumerate(stages)
        )

    def _await_ready(self) -> None:
        deadline = time.monotonic() + self._ready_timeout_s
        while True:
            unasked = self._poll(timeout_s=0.2)
            self.num_stale_frames += len(unasked)
            if self._on_progress is not None:
                self._on_progress(self.statuses)
            if self._failure is not None:
                raise self._ended()
            late = [stage for stage in self._stages if not stage.is_ready]
            if not late:
                return
            if time.monotonic() > deadline:
                who = ", ".join(f"{stage} is still {stage.phase}" for stage in late)
                raise StageError(
                    f"{who} after {self._ready_timeout_s:g} s; see --ready-timeout",
                    late[0].log_tail(_TAIL_LINES),
                )

    def _greet(self, stage: StageProcess, hello: Hello) -> None:
        if hello.config_digest != self._spec.digest:
            self._fail(stage, "understands another configuration; is its PipeSpec another version?")
        elif self._spec.tokenizer_digest not in ("", hello.tokenizer_digest):
            self._fail(stage, "has another tokenizer than the target; see its folder's files")
        stage.endpoint = hello.endpoint
        for upper, lower in itertools.pairwise(self._stages):
            if stage in (upper, lower) and None not in (upper.endpoint, lower.endpoint):
                assert lower.endpoint is not None
                self._send(upper.index, Connect(lower.endpoint))
        if stage is self._stages[-1]:
            self._send(stage.index, Connect(""))  # nothing below, but it shall not wait

    # -- messages ---------------------------------------------------------------------------

    def _poll(self, timeout_s: float) -> list[tuple[int, Message]]:
        """Waits for messages and failures: whichever comes first, at most `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while True:
            left_s = deadline - time.monotonic()
            messages = self._take(min(max(left_s, 0.0), _LIVENESS_S))
            ended = next((stage for stage in self._stages if stage.has_ended), None)
            if ended is not None and self._failure is None:
                messages += self._last_words(ended)
            if messages or self._failure is not None or left_s <= _LIVENESS_S:
                return messages

    def _take(self, timeout_s: float) -> list[tuple[int, Message]]:
        """Takes all frames there are; acts on those for the launcher, returns the others."""
        assert self._transport is not None
        messages: list[tuple[int, Message]] = []
        for index, frame in self._transport.receive(timeout_s):
            stage = self._stages[index]
            if frame.sender != index or frame.incarnation != stage.spec.incarnation:
                self.num_stale_frames += 1
                continue
            match frame.message:
                case Hello() as hello:
                    self._greet(stage, hello)
                case Heartbeat(phase, counters):
                    stage.phase, stage.counters = phase, counters
                case Ready(load_s, info):
                    stage.phase, stage.load_s, stage.info = "ready", load_s, info
                case Fault() as fault:
                    stage.fault = fault
                    self._fail(stage, stage.describe_end())
                case message:
                    messages.append((index, message))
        return messages

    def _last_words(self, ended: StageProcess) -> list[tuple[int, Message]]:
        """What an ended process still had to say; notes why it ended."""
        messages: list[tuple[int, Message]] = []
        deadline = time.monotonic() + _FAULT_S
        while ended.fault is None and time.monotonic() < deadline:
            messages += self._take(_FAULT_S / 10)
        self._fail(ended, ended.describe_end())
        return messages

    def _fail(self, stage: StageProcess, clause: str) -> None:
        """Notes the first failure; the caller raises it when it has nothing else to deliver."""
        if self._failure is not None:
            return
        kind = getattr(errors, stage.fault.kind, None) if stage.fault is not None else None
        if isinstance(kind, type) and issubclass(kind, UsageError):
            assert stage.fault is not None
            self._failure = kind(stage.fault.message)
        else:
            trace = [] if stage.fault is None else stage.fault.traceback.splitlines()
            tail = stage.log_tail(max(_TAIL_LINES, len(trace)))
            self._failure = StageError(f"{stage} {clause}", tail)

    def _ended(self) -> PipeSpecError:
        """Closes everything; returns what to raise."""
        self.close()
        return self._failure or StageError("the pipeline is closed: start another")

    def _send_to_target(self, message: Message) -> None:
        if not self.is_running:
            raise self._ended()
        self._outgoing.append((len(self._stages) - 1, message))
        self._flush()

    def _flush(self) -> None:
        while self._outgoing and self._send(*self._outgoing[0]):
            self._outgoing.popleft()

    def _send(self, index: int, message: Message) -> bool:
        assert self._transport is not None
        incarnation = self._stages[index].spec.incarnation
        frame = Frame(LAUNCHER, 1, incarnation, next(self._sequence), message)
        return self._transport.send(index, frame)

    # -- ending -----------------------------------------------------------------------------

    def _stop_gently(self) -> None:
        alive = [stage for stage in self._stages if stage.process and not stage.has_ended]
        for stage in alive:
            # One that loads does not listen yet.
            if not (stage.is_ready and self._send(stage.index, Shutdown())):
                stage.signal(signal.SIGTERM)
        alive = _still_alive(alive, _SHUTDOWN_S)
        for stage in alive:
            stage.signal(signal.SIGTERM)
        _still_alive(alive, _TERMINATE_S)

    def _remove_run_dir(self, run_dir: Path) -> None:
        if self._keep_run_dir and self._failure is not None:
            log.warning("the logs of the failed run are in %s", run_dir)
        else:
            shutil.rmtree(run_dir, ignore_errors=True)


@contextlib.contextmanager
def install_signal_handlers() -> Iterator[None]:
    """For commands: within it, SIGTERM and SIGHUP end the program as `sys.exit` would, so that
    every `with` and `finally` runs. Later ones are ignored: cleaning up is under way."""
    assert threading.current_thread() is threading.main_thread()

    def leave(number: int, _frame: FrameType | None) -> None:
        for other in previous:
            signal.signal(other, signal.SIG_IGN)
        raise SystemExit(128 + number)

    previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        for number in previous:
            signal.signal(number, leave)
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def tokenizer_folder_of(model: ModelConfig, folder: Path | None) -> Path | None:
    """Where a model's tokenizer is: where its config says, else with the model."""
    return folder if model.tokenizer is None else locate_tokenizer(model.tokenizer)


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _still_alive(stages: Sequence[StageProcess], timeout_s: float) -> list[StageProcess]:
    """Those that have not ended after at most `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    return [stage for stage in stages if not stage.wait(deadline - time.monotonic())]
