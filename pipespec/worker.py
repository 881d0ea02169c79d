"""One stage as a process: `python -m pipespec.worker --stage I --run-dir DIR`.

Started by `launcher`, never by hand. It opens its links, pins itself, loads its model, warms it up
and hands over to the stage loop. It ends with the loop, with the error that it reports to the
launcher in a `Fault`, and by itself when the launcher is gone. Ctrl-C, SIGTERM and SIGHUP often
reach all processes of a run at once; here they are ignored, because the launcher acts on them, or
dies of them. What a token, a candidate or a verdict means is not known here.
"""

from __future__ import annotations

import argparse
import faulthandler
import itertools
import logging
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipespec.errors import PipeSpecError, StageError
from pipespec.messages import (
    MAX_TEXT,
    Connect,
    Fault,
    Frame,
    Heartbeat,
    Hello,
    Link,
    Message,
    Ready,
    Shutdown,
)
from pipespec.parent_watch import WATCH_INTERVAL_S, end_with_parent
from pipespec.runners.base import ModelRunner
from pipespec.runners.ranges import with_ranges
from pipespec.runners.warm_up import warm_up
from pipespec.trace import Tracer
from pipespec.transport import ZmqTransport
from pipespec.worker_spec import RunSpec, StageSpec, endpoint_in, read_spec, trace_path

if TYPE_CHECKING:
    from pipespec.tokenizer import TextTokenizer

log = logging.getLogger("pipespec.worker")


class StageSession:
    """One worker's conversation with its launcher, around the stage loop's own."""

    def __init__(self, index: int, run_dir: Path, spec: RunSpec, transport: ZmqTransport[Link]):
        self.index = index
        self.spec = spec
        self.transport = transport
        self._run_dir = run_dir
        self._sequence = itertools.count()
        self._endpoint = ""
        self.phase = "starting"

    def open_tracer(self) -> Tracer | None:
        """What the stage notes its events with, if it shall."""
        return Tracer(trace_path(self._run_dir, self.index)) if self.spec.trace else None

    @property
    def stage(self) -> StageSpec:
        return self.spec.stages[self.index]

    @property
    def is_target(self) -> bool:
        return self.index == len(self.spec.stages) - 1

    def open_links(self) -> None:
        """Opens the links that need no one else: to the launcher, and for the stage above."""
        self.transport.connect(Link.LAUNCHER, self.stage.endpoint)
        if self.index > 0:
            name = f"{self.index - 1}-{self.index}.{self.stage.incarnation}"
            endpoint = endpoint_in(self._run_dir, self.spec.transport, name)
            self._endpoint = self.transport.bind(Link.UP, endpoint)

    def report(self, message: Message) -> bool:
        """Tells the launcher; False if the link is full."""
        incarnation = self.stage.incarnation
        frame = Frame(self.index, incarnation, 1, next(self._sequence), message)
        return self.transport.send(Link.LAUNCHER, frame)

    def enter(self, phase: str) -> None:
        """Notes what the stage does now."""
        self.phase = phase
        log.info("%s", phase)
        self.report(Heartbeat(phase=phase, counters={}))

    def say_hello(self, tokenizer_digest: str) -> None:
        """Introduces the stage and what it understood."""
        endpoint, digest = self._endpoint, self.spec.digest
        self.report(Hello(self.index, os.getpid(), digest, tokenizer_digest, endpoint))

    def await_neighbours(self) -> bool:
        """Opens the link to the next stage, once the launcher has said where that listens, and
        waits until the stage above has opened its own: the first request shall find all links.

        Returns:
            False if the launcher said to shut down instead.

        Raises:
            StageError: nothing came for longer than the launcher waits for all stages.
        """
        deadline = time.monotonic() + self.spec.ready_timeout_s
        is_connected, is_heard = False, self.index == 0
        while not (is_connected and is_heard):
            if time.monotonic() > deadline:
                missing = "the stage above" if is_connected else "the launcher"
                waited_s = self.spec.ready_timeout_s
                raise StageError(
                    f"stage {self.index} heard nothing of {missing} for {waited_s:g} s"
                )
            if not is_heard:
                is_heard = bool(self.transport.receive_from(Link.UP, timeout_s=0.05))
            # Once connected it only looks for a Shutdown: what else is missing comes from above.
            wait_s = 0.0 if is_connected else 0.5 if is_heard else 0.05
            for frame in self.transport.receive_from(Link.LAUNCHER, wait_s):
                if isinstance(frame.message, Shutdown):
                    return False
                if isinstance(frame.message, Connect):
                    self._greet_next(frame.message.endpoint)
                    is_connected = True
        return True

    def leave_neighbours(self) -> None:
        """Closes the links to other stages. A request needs nothing of them any more, and one that
        was killed would be waited for."""
        for link in (Link.UP, Link.DOWN):
            self.transport.drop(link)

    def _greet_next(self, endpoint: str) -> None:
        if self.is_target:
            return
        self.transport.connect(Link.DOWN, endpoint)
        below = self.spec.stages[self.index + 1].incarnation
        hello = Hello(self.index, os.getpid(), "", "", "")
        frame = Frame(self.index, self.stage.incarnation, below, next(self._sequence), hello)
        self.transport.send(Link.DOWN, frame)


def load_stage_runner(session: StageSession) -> ModelRunner:
    """Loads the stage's model where its placement says."""
    from pipespec.runners.factory import load_runner

    spec, stage = session.spec, session.stage
    return load_runner(
        stage.model,
        stage.placement,
        None if stage.folder is None else Path(stage.folder),
        spec.vocab_size,
        spec.context_length,
        spec.num_slots,
    )


def load_stage_tokenizer(stage: StageSpec) -> TextTokenizer:
    """The tokenizer that the stage's model came with."""
    from pipespec.tokenizer import load_tokenizer

    folder = stage.tokenizer_folder
    return load_tokenizer(None if folder is None else Path(folder))


Serve = Callable[[StageSession], None]
LoadRunner = Callable[[StageSession], ModelRunner]


def serve_model(session: StageSession, load: LoadRunner = load_stage_runner) -> None:
    """Loads the stage's model and serves requests until the launcher says to shut down.

    Raises:
        ModelLoadError: weights, tokenizer or device are missing or do not fit.
    """
    from pipespec.stage import StageLoop

    spec = session.spec
    started_at = time.monotonic()
    session.enter("loading")
    tokenizer = load_stage_tokenizer(session.stage)
    session.say_hello(tokenizer.digest)
    runner, tracer = load(session), session.open_tracer()
    try:
        session.enter("warming up")
        warm_up(runner, spec.schedule.run_ahead + 1)
        if not session.await_neighbours():
            return
        session.report(Ready(time.monotonic() - started_at, describe(runner)))
        num_stages = len(spec.stages)
        StageLoop(
            index=session.index,
            num_stages=num_stages,
            incarnations=[each.incarnation for each in spec.stages],
            schedule=spec.schedule,
            runner=with_ranges(runner, session.index, num_stages) if spec.trace else runner,
            transport=session.transport,
            decode=tokenizer.decode,
            num_slots=spec.num_slots,
            tracer=tracer,
        ).run()
    finally:
        if tracer is not None:
            tracer.flush()
        runner.close()


def describe(runner: ModelRunner) -> dict[str, Any]:
    """What the launcher reports of this process: its runner, its cores, its libraries."""
    values: dict[str, Any] = asdict(runner.info)
    values["cores"] = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    values["uses_transformers"] = "transformers" in sys.modules
    return values


def main(arguments: Sequence[str] | None = None, serve: Serve = serve_model) -> int:
    """Runs one stage; returns the exit status."""
    options = _parser().parse_args(arguments)
    _log_to_stderr(options.stage)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    try:
        spec = read_spec(options.run_dir)
    except StageError as error:
        log.error("%s", error)
        return error.exit_code
    watch_launcher(spec.launcher_pid, options.run_dir)
    with ZmqTransport[Link](keys=spec.keys) as transport:
        session = StageSession(options.stage, options.run_dir, spec, transport)
        session.open_links()  # before pinning: see transport
        try:
            pin(session.stage.placement.cores)
            serve(session)
        except Exception as error:
            log.exception("failed while %s", session.phase)
            session.report(fault_of(error))
            return 1
        finally:
            session.leave_neighbours()
    return 0


def watch_launcher(launcher_pid: int, run_dir: Path, interval_s: float = WATCH_INTERVAL_S) -> None:
    """Ends this process, whatever it computes, soon after its launcher is gone.

    The launcher can no longer remove the run directory then, so this does.
    """
    end_with_parent(launcher_pid, interval_s, lambda: shutil.rmtree(run_dir, ignore_errors=True))


def pin(cores: Sequence[int]) -> None:
    """Keeps this thread, and those it will start, on `cores`; an empty sequence leaves it free."""
    if not cores or not hasattr(os, "sched_setaffinity"):
        return
    try:
        os.sched_setaffinity(0, cores)
    except OSError as error:  # a container may forbid it; all that is lost is speed
        log.warning("cannot pin to cores %s: %s", list(cores), error)


def fault_of(error: Exception) -> Fault:
    """What the launcher is told of an error, within the limits of a message."""
    # The launcher knows our own kinds of errors, but not those that a runner derives from them.
    own = (kind for kind in type(error).__mro__ if kind.__module__ == PipeSpecError.__module__)
    name = next(own, type(error)).__name__
    trace = "".join(traceback.format_exception(error))
    return Fault(name, str(error)[:MAX_TEXT], trace[-MAX_TEXT:])


def _log_to_stderr(stage: int) -> None:
    """The launcher keeps stderr as the stage's log."""
    faulthandler.enable()
    form = f"%(asctime)s stage {stage} %(levelname)s %(message)s"
    logging.basicConfig(level=logging.INFO, format=form, stream=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pipespec.worker",
        description="One stage of a pipeline, started by its launcher.",
    )
    parser.add_argument("--stage", type=int, required=True, help="0 is the first draft")
    parser.add_argument("--run-dir", type=Path, required=True, help="holds the specification")
    return parser


if __name__ == "__main__":
    status = main()
    logging.shutdown()
    os._exit(status)  # everything is closed; for the interpreter to unload torch takes a second
