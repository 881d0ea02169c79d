"""One model in a process of its own, to be measured: `python -m pipespec.planning.meter FD DIR`.

Started by `meters`, never by hand, where and with the threads that the model's stage would have in
a run. Answers one question after the other. It knows no other model and no text's meaning.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any, Final

from pipespec.config import SamplingParams
from pipespec.messages import Submit
from pipespec.planning.trace import Ranked
from pipespec.runners.base import BranchingRunner, ModelRunner, Row, TreeRow
from pipespec.runners.warm_up import warm_up
from pipespec.state import FinishChecker
from pipespec.worker import fault_of, load_stage_tokenizer, pin, watch_launcher
from pipespec.worker_spec import StageSpec

log = logging.getLogger("pipespec.planning.meter")

CHUNK: Final = 32  # tokens of a text in one forward
LONGEST: Final = 33  # tokens in a forward that is measured: the longest run-ahead, and one
_MIN_ROUNDS: Final = 5
_IN_A_ROW: Final = 4  # forwards of the same kind: a model in use repeats itself


class Meter:
    """A loaded model and what can be asked of it."""

    def __init__(
        self, runner: ModelRunner, decode: Callable[[Sequence[int]], str] = lambda _ids: ""
    ) -> None:
        self.runner = runner
        self._decode = decode

    def medians_ms(
        self, ids: Sequence[int], forwards: Sequence[Row | TreeRow], budget_s: float
    ) -> list[float]:
        """Median milliseconds of each forward after the text `ids`. They take turns, so that a slow
        moment of the machine does not fall on one of them."""
        self._fill(ids)
        times_ms: list[list[float]] = [[] for _ in forwards]
        started_s, rounds = time.perf_counter(), 0
        while rounds < _MIN_ROUNDS or time.perf_counter() - started_s < budget_s:
            for forward, taken_ms in zip(forwards, times_ms):
                self._forward(forward)  # finds the others' leftovers, and does not count
                for _ in range(1, _IN_A_ROW):
                    start_s = time.perf_counter()
                    self._forward(forward)
                    taken_ms.append(1e3 * (time.perf_counter() - start_s))
            rounds += 1
        self.runner.release(0)
        return [median(taken_ms) for taken_ms in times_ms]

    def mean_ms(self, ids: Sequence[int], forward: Row, seconds: float) -> float:
        """Mean milliseconds of a forward after the text `ids`, one after the other for a while."""
        self._fill(ids)
        count, start_s = 0, time.perf_counter()
        while time.perf_counter() - start_s < seconds:
            self._forward(forward)
            count += 1
        mean_s = (time.perf_counter() - start_s) / count
        self.runner.release(0)
        return 1e3 * mean_s

    def write(self, submit: Submit) -> list[int]:
        """What the model writes after a prompt, as `greedy` does."""
        check, tokens = FinishChecker(submit, self._decode), list[int]()
        position, ids = 0, submit.prompt
        while True:
            token = self.runner.forward([Row(0, position, ids, 1, submit.sampling)])[0][0]
            tokens.append(token)
            if check(token):
                self.runner.release(0)
                return tokens
            position, ids = position + len(ids), (token,)

    def draws(
        self,
        prompt: Sequence[int],
        tokens: Sequence[int],
        sampling: SamplingParams,
        num_ranked: int,
    ) -> list[Ranked]:
        """What the model would have drawn in the place of each of `tokens`, as far as its context
        goes: its `num_ranked` first choices, or the first alone if its runner cannot rank."""
        ids = [*prompt, *tokens[:-1]][: self.runner.info.context_length]
        can_rank = self.runner.info.num_tail_rows > 0
        found: list[Ranked] = []
        ends = [*range(len(prompt), len(ids), CHUNK), len(ids)]
        for start, end in zip([0, *ends], ends):
            piece = ids[start:end]
            if end < len(prompt) or not piece:
                continue
            row = Row(0, start, piece, 1 if start == 0 else len(piece), sampling)
            tree = TreeRow(row, (), num_ranked=num_ranked)
            found += self._forward(tree) if can_rank else self._forward(row)
        self.runner.release(0)
        return found

    def _fill(self, ids: Sequence[int]) -> None:
        if ids:
            self._forward(Row(0, 0, ids, 1, SamplingParams()))

    def _forward(self, forward: Row | TreeRow) -> list[Ranked]:
        if isinstance(forward, Row):
            return [(token,) for token in self.runner.forward([forward])[0]]
        assert isinstance(self.runner, BranchingRunner)
        return self.runner.forward_tree(forward)


def load(stage: StageSpec, vocab_size: int, context_length: int) -> tuple[Meter, dict[str, Any]]:
    """The stage's model, warm, and its runner's facts; load_s: what that took."""
    from pipespec.runners.factory import load_runner

    start_s = time.perf_counter()
    decode = load_stage_tokenizer(stage).decode
    folder = None if stage.folder is None else Path(stage.folder)
    runner = load_runner(stage.model, stage.placement, folder, vocab_size, context_length)
    if runner.info.weight_bytes:
        warm_up(runner, LONGEST)
    info = {**asdict(runner.info), "load_s": round(time.perf_counter() - start_s, 2)}
    return Meter(runner, decode), info


def serve(connection: Connection) -> None:
    """Answers (what, values) until the other end is closed: with the answer, or with a `Fault`. The
    first is "load" with the stage, whose cores are taken before any library is loaded."""
    meter: Meter | None = None
    answer: Any
    try:
        while True:
            what, values = connection.recv()
            try:
                if what == "load":
                    pin(values["stage"].placement.cores)
                    meter, answer = load(**values)
                else:
                    answer = getattr(meter, what)(**values)
            except Exception as error:
                log.exception("failed at %s", what)
                answer = fault_of(error)
            connection.send(answer)
    except (EOFError, OSError):
        log.info("the other end is closed")
    finally:
        if meter is not None:
            meter.runner.close()


def main(arguments: Sequence[str]) -> int:
    """Serves the descriptor; `meters` says what the arguments are."""
    descriptor, run_dir = arguments
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the parent acts on them, and closes its end
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    watch_launcher(os.getppid(), Path(run_dir))
    with Connection(int(descriptor)) as connection:
        serve(connection)
    return 0


if __name__ == "__main__":
    status = main(sys.argv[1:])
    logging.shutdown()
    os._exit(status)  # everything is closed; for the interpreter to unload torch takes a second
