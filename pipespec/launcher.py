"""Starts one worker process per stage, watches over them, and leaves nothing behind.

A `Pipeline` owns the processes, their run directory (specification, logs, sockets) and the control
links. Whatever ends it, an error, Ctrl-C, SIGTERM or `close()`, the processes are reaped and the
directory is gone; if the launcher itself is killed, the workers see it and clean up.

A stage that is alive but silent is alive: a long forward is not a failure, and only the layer
above knows what a request may take. What tokens mean is not known here.
"""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Self

from pipespec.config import ModelConfig, Schedule
from pipespec.control import TAIL_LINES, ControlLinks
from pipespec.errors import PipeSpecError, StageError, UsageError
from pipespec.interrupts import hold_interrupts
from pipespec.messages import Abort, Finish, Message, Shutdown, Submit
from pipespec.placement import StagePlacement
from pipespec.stage_process import StageProcess, StageStatus
from pipespec.trace import StageTrace
from pipespec.trace.events import read_events
from pipespec.transport import Keys, ZmqTransport
from pipespec.worker_spec import (
    RunSpec,
    StageSpec,
    endpoint_in,
    make_run_dir,
    trace_path,
    write_spec,
)

log = logging.getLogger(__name__)

WORKER: Final = (sys.executable, "-m", "pipespec.worker")
TRANSPORTS: Final = ("ipc", "tcp")
_PROGRESS_S: Final = 0.05  # between two looks at stages that load
_SHUTDOWN_S: Final = 3.0  # for stages to end by themselves

OnProgress = Callable[[tuple[StageStatus, ...]], None]


class Pipeline:
    """All stages of a hierarchy as processes: start it, submit, receive, close it.

    A context manager; entering it starts it. One thread uses it.

    Args:
        models, placements, folders: one for each stage, first draft first. A folder holds the
            model's files; None is for a model that has none.
        vocab_size: number of token ids that any stage may draw.
        context_length: positions that a request may use; None leaves it to the models.
        tokenizer_folders: where each stage's tokenizer is; None: all with their models.
        tokenizer_digest: of the tokenizer that all stages must have; "" is not compared.
        transport: "ipc", or "tcp" over the loopback interface.
        ready_timeout_s: for all models to load.
        on_progress: called many times a second until all stages are ready.
        keep_run_dir: after a failure, leave the logs where they are (a warning says where).
        trace: all stages note what they do; `traces` has it once the pipeline is closed.
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
        trace: bool = False,
        command: Sequence[str] = WORKER,
    ) -> None:
        if transport not in TRANSPORTS:
            raise UsageError(f"--transport is {transport}; it must be one of ipc, tcp")
        assert len(models) == len(placements) == len(folders) >= 1
        self._spec = RunSpec(  # all but the endpoints and keys of this run
            launcher_pid=os.getpid(),
            transport=transport,
            keys=None,
            schedule=schedule,
            vocab_size=vocab_size,
            context_length=context_length,
            tokenizer_digest=tokenizer_digest,
            num_slots=num_slots,
            ready_timeout_s=ready_timeout_s,
            trace=trace,
            stages=tuple(
                StageSpec(model, placement, _text(folder), _text(tokenizer_folder))
                for model, placement, folder, tokenizer_folder in zip(
                    models, placements, folders, tokenizer_folders or folders, strict=True
                )
            ),
        )
        self._on_progress = on_progress
        self._keep_run_dir = keep_run_dir
        self._command = tuple(command)
        self.traces: tuple[StageTrace, ...] = ()

        self._stages: tuple[StageProcess, ...] = ()
        self._run_dir: Path | None = None
        self._transport: ZmqTransport[int] | None = None
        self._control: ControlLinks | None = None
        self._started_at = 0.0

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
        finally:  # also when a second Ctrl-C cuts the waiting short; a third one waits
            with hold_interrupts():
                self._clean_up()
        atexit.unregister(self.close)

    def __enter__(self) -> Self:
        return self if self._transport is not None else self.start()

    def __exit__(self, *_exception: object) -> None:
        self.close()

    # -- requests ---------------------------------------------------------------------------

    def submit(self, message: Submit) -> None:
        """Hands a request to the target, which passes it up. Never blocks.

        Raises:
            StageError: a stage failed or died, or the pipeline is closed.
        """
        self._post_to_target(message)

    def finish(self, request: int) -> None:
        """Lets all stages forget a completed request and report their `Stats`."""
        self._post_to_target(Finish(request))

    def abort(self, request: int) -> None:
        """Lets all stages forget a request that is not wanted any more."""
        self._post_to_target(Abort(request))

    def receive(self, timeout_s: float) -> list[tuple[int, Message]]:
        """What the stages sent (`Output`, `Stats`), with the stage's index, in their order.

        Waits at most `timeout_s` for a first message. Every call looks whether all stages live;
        what a stage sent before it died is returned first, the next call raises.

        Raises:
            StageError: a stage failed or died; all others have been stopped.
        """
        control = self._running()
        messages = control.poll(timeout_s)
        if messages or control.failure is None:
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

    @property
    def num_stale_frames(self) -> int:
        """Frames of dead processes, or in the name of another stage; they were dropped."""
        return 0 if self._control is None else self._control.num_stale_frames

    @property
    def num_malformed_frames(self) -> int:
        """Frames not of the protocol that arrived at any end, as far as the stages reported."""
        here = 0 if self._transport is None else self._transport.num_malformed
        return here + sum(int(stage.counters.get("num_malformed", 0)) for stage in self._stages)

    @property
    def num_idle_reports(self) -> tuple[int, ...]:
        """How often each stage has said that it has nothing to compute; it does so about once a
        second, and says nothing during a forward."""
        return tuple(stage.num_idle_reports for stage in self._stages)

    def log_tail(self, stage: int, num_lines: int = TAIL_LINES) -> tuple[str, ...]:
        """The last lines of a stage's log, oldest first."""
        return self._stages[stage].log_tail(num_lines)

    # -- starting ---------------------------------------------------------------------------

    def _open(self) -> None:
        kind = self._spec.transport
        keys = Keys.generate() if kind == "tcp" else None
        with hold_interrupts():
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
        self._control = ControlLinks(
            self._stages,
            transport,
            config_digest=self._spec.digest,
            tokenizer_digest=self._spec.tokenizer_digest,
        )

    def _await_ready(self) -> None:
        assert self._control is not None
        deadline = time.monotonic() + self._spec.ready_timeout_s
        while True:
            unasked = self._control.poll(_PROGRESS_S)
            self._control.num_stale_frames += len(unasked)
            if self._on_progress is not None:
                self._on_progress(self.statuses)
            if self._control.failure is not None:
                raise self._ended()
            late = [stage for stage in self._stages if not stage.is_ready]
            if not late:
                return
            if time.monotonic() > deadline:
                who = ", ".join(f"{stage} is still {stage.phase}" for stage in late)
                raise StageError(
                    f"{who} after {self._spec.ready_timeout_s:g} s; see --ready-timeout",
                    late[0].log_tail(TAIL_LINES),
                )

    # -- serving ----------------------------------------------------------------------------

    def _post_to_target(self, message: Message) -> None:
        self._running().post(len(self._stages) - 1, message)

    def _running(self) -> ControlLinks:
        if not self.is_running:
            raise self._ended()
        assert self._control is not None
        return self._control

    @property
    def _failure(self) -> PipeSpecError | None:
        return None if self._control is None else self._control.failure

    def _ended(self) -> PipeSpecError:
        """Closes everything; returns what to raise."""
        self.close()
        return self._failure or StageError("the pipeline is closed: start another")

    # -- ending -----------------------------------------------------------------------------

    def _stop_gently(self) -> None:
        """Lets the stages that serve end by themselves; those that load have nothing to lose."""
        serving = [stage for stage in self._stages if stage.is_ready and not stage.has_ended]
        for stage in serving:
            assert self._control is not None
            self._control.send(stage.index, Shutdown())
        deadline = time.monotonic() + _SHUTDOWN_S
        for stage in serving:
            stage.wait(deadline - time.monotonic())

    def _clean_up(self) -> None:
        for stage in self._stages:
            stage.signal(signal.SIGKILL)
        for stage in self._stages:
            stage.wait(timeout_s=10.0)
        if self._transport is not None:
            self._transport.close()
        run_dir, self._run_dir = self._run_dir, None
        if run_dir is not None and self._spec.trace:
            self.traces = tuple(
                read_events(trace_path(run_dir, stage.index), stage.spec.model.name)
                for stage in self._stages
            )
        if run_dir is not None and self._keep_run_dir and self._failure is not None:
            log.warning("the logs of the failed run are in %s", run_dir)
        elif run_dir is not None:
            shutil.rmtree(run_dir, ignore_errors=True)


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)
