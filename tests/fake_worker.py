"""`pipespec.worker` with another `serve`, for tests of everything that can go wrong with a stage.

What it does is named by its model's path: one of `BEHAVIOURS`; any other model is served well.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace

from pipespec.errors import ModelLoadError
from pipespec.messages import Finish, Frame, Heartbeat, Link, Output, Ready, Shutdown, Stats, Submit
from pipespec.runners.base import ModelRunner, Row, RunnerInfo
from pipespec.worker import StageSession, load_stage_runner, load_stage_tokenizer, main, serve_model

DIGEST = "digest of the fake tokenizer"
NUM_GOOD_FORWARDS = 20


def get_ready(session: StageSession) -> None:
    session.say_hello(DIGEST)
    assert session.await_neighbours()
    session.report(Ready(0.25, {"environment": dict(os.environ)}))


def echo(session: StageSession) -> None:
    """Serves well: answers every request with its prompt, a `Finish` with `Stats`."""
    get_ready(session)
    answer_until_shutdown(session)


def answer_until_shutdown(session: StageSession) -> None:
    while True:
        for _, frame in session.transport.receive(1.0):
            message = frame.message
            if isinstance(message, Shutdown):
                return
            if isinstance(message, Submit):
                output = Output(message.request, len(message.prompt), message.prompt, "eos")
                while not session.report(output):
                    time.sleep(0.01)
            elif isinstance(message, Finish):
                session.report(Stats(message.request, {"stage": session.index}))
        session.report(Heartbeat("serving", {"num_malformed": session.transport.num_malformed}))


def speak_for_the_dead(session: StageSession) -> None:
    """Sends what a former process of the stage, or another stage, would have sent; then serves."""
    get_ready(session)
    output = Output(1, 0, (666,), "")
    for sender, incarnation in ((session.index, 0), (session.index + 1, 1)):
        session.transport.send(Link.LAUNCHER, Frame(sender, incarnation, 1, 0, output))
    answer_until_shutdown(session)


def raise_unknown_error(session: StageSession) -> None:
    session.enter("loading")
    raise RuntimeError("the weights\nare upside down")


def raise_load_error(session: StageSession) -> None:
    session.enter("loading")
    raise ModelLoadError("no-such-model: not found; is HF_TOKEN set?")


def exit_silently(session: StageSession) -> None:
    session.enter("loading")
    print("a last word", flush=True)
    os._exit(7)


def load_for_ever(session: StageSession) -> None:
    session.say_hello(DIGEST)
    session.enter("loading")
    time.sleep(600.0)


def ignore_every_request_to_end(session: StageSession) -> None:
    get_ready(session)
    time.sleep(600.0)


def answer_and_fail(session: StageSession) -> None:
    get_ready(session)
    while not session.transport.receive_from(Link.LAUNCHER, 1.0):
        pass
    session.report(Output(1, 0, (1, 2, 3), ""))
    raise RuntimeError("enough")


def understand_something_else(session: StageSession) -> None:
    session.spec = replace(session.spec, vocab_size=session.spec.vocab_size + 1)
    get_ready(session)


def have_another_tokenizer(session: StageSession) -> None:
    session.say_hello("digest of another tokenizer")
    session.await_neighbours()


class FailingRunner:
    """The stage's own runner, until it has done a number of forwards."""

    def __init__(self, session: StageSession, error: BaseException) -> None:
        self._runner = load_stage_runner(session)
        self._error = error
        self._num_left = NUM_GOOD_FORWARDS

    @property
    def info(self) -> RunnerInfo:
        # Neither branches nor a free processor: one way to feed.
        return replace(self._runner.info, num_tail_rows=0, frees_processor=False)

    def forward(self, rows: Sequence[Row]) -> list[list[int]]:
        self._num_left -= 1
        if self._num_left < 0:
            raise self._error
        return self._runner.forward(rows)

    def release(self, slot: int) -> None:
        self._runner.release(slot)

    def close(self) -> None:
        self._runner.close()


def raise_in_forward(session: StageSession) -> None:
    serve_model(session, lambda session: FailingRunner(session, RuntimeError("device-side assert")))


def run_out_of_memory_in_forward(session: StageSession) -> None:
    serve_model(session, lambda session: FailingRunner(session, MemoryError()))


def run_out_of_memory_while_loading(session: StageSession) -> None:
    def load(_session: StageSession) -> ModelRunner:
        raise MemoryError

    serve_model(session, load)


def exit_while_loading(session: StageSession) -> None:
    def load(_session: StageSession) -> ModelRunner:
        sys.exit(3)

    serve_model(session, load)


def lose_every_request(session: StageSession) -> None:
    """Lives, and says that it has nothing to do whatever it is given."""
    session.say_hello(load_stage_tokenizer(session.stage).digest)
    assert session.await_neighbours()
    session.report(Ready(0.25, {}))
    while not any(
        isinstance(frame.message, Shutdown) for _, frame in session.transport.receive(0.05)
    ):
        session.report(Heartbeat("serving", {}))


BEHAVIOURS = {
    function.__name__: function
    for function in (
        echo,
        speak_for_the_dead,
        raise_unknown_error,
        raise_load_error,
        exit_silently,
        load_for_ever,
        ignore_every_request_to_end,
        answer_and_fail,
        understand_something_else,
        have_another_tokenizer,
        raise_in_forward,
        run_out_of_memory_in_forward,
        run_out_of_memory_while_loading,
        exit_while_loading,
        lose_every_request,
    )
}


def serve(session: StageSession) -> None:
    BEHAVIOURS.get(session.stage.model.name, serve_model)(session)


if __name__ == "__main__":
    sys.exit(main(serve=serve))
