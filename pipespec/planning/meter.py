"""One model in a process of its own, to be measured: `python -m pipespec.planning.meter DIR`.

Started by `meters`, never by hand: pinned, and with its thread counts set, as the model's stage
would be in a run. It reads one JSON object a line from standard input and answers each with one.
It knows no other model and no text's meaning.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Final

from pipespec.config import ModelConfig, SamplingParams
from pipespec.messages import Submit
from pipespec.placement import StagePlacement
from pipespec.planning.trace import Ranked
from pipespec.runners.base import BranchingRunner, ModelRunner, Row, TailToken, TreeRow
from pipespec.state import FinishChecker
from pipespec.worker import fault_of, load_stage_tokenizer, pin, warm_up, watch_launcher
from pipespec.worker_spec import StageSpec

log = logging.getLogger("pipespec.planning.meter")

CHUNK: Final = 32  # tokens of a text in one forward
_MIN_ROUNDS: Final = 5
_IN_A_ROW: Final = 4  # steps of the same length: a model in use repeats itself
_TAIL_GAP: Final = 64  # cache rows between a text and its branches


class Meter:
    """A loaded model and what can be asked of it. num_ranked: choices to note at each position; 1
    where the runner cannot rank."""

    def __init__(self, runner: ModelRunner, num_ranked: int) -> None:
        self.runner = runner
        can_rank = isinstance(runner, BranchingRunner) and runner.info.num_tail_rows > 0
        self._num_ranked = num_ranked if can_rank else 1

    # -- time -------------------------------------------------------------------------------

    def decode_ms(
        self, ids: Sequence[int], lengths: Sequence[int], budget_s: float
    ) -> list[tuple[int, float]]:
        """Median milliseconds of a forward over each number of tokens, after the text `ids`."""
        rows = [Row(0, len(ids), _repeat(ids, n), n, SamplingParams()) for n in lengths]
        self._fill(ids)
        return self._medians(
            [(n, partial(self.runner.forward, [row])) for n, row in zip(lengths, rows)],
            budget_s,
        )

    def tree_ms(
        self, ids: Sequence[int], lengths: Sequence[int], budget_s: float
    ) -> list[tuple[int, float]]:
        """The same with all tokens but one in branches, and `num_ranked` choices for each draw.
        Empty for a runner that has no branches."""
        if self._num_ranked == 1:
            return []
        trees = [self._tree(ids, n) for n in lengths]
        self._fill(ids)
        return self._medians(
            [(n, partial(self._forward_tree, tree)) for n, tree in zip(lengths, trees)],
            budget_s,
        )

    def prefill_ms(
        self, ids: Sequence[int], lengths: Sequence[int], budget_s: float
    ) -> list[tuple[int, float]]:
        """Median milliseconds of the forward of a whole prompt, for each length."""
        rows = [Row(0, 0, _repeat(ids, n), 1, SamplingParams()) for n in lengths]
        return self._medians(
            [(n, partial(self.runner.forward, [row])) for n, row in zip(lengths, rows)],
            budget_s,
        )

    def steps_ms(self, ids: Sequence[int], length: int, seconds: float) -> float:
        """Mean milliseconds of forwards over `length` tokens, one after the other for a while."""
        row = Row(0, len(ids), _repeat(ids, length), length, SamplingParams())
        self._fill(ids)
        start_s = time.perf_counter()
        count = 0
        while time.perf_counter() - start_s < seconds:
            self.runner.forward([row])
            count += 1
        mean_s = (time.perf_counter() - start_s) / count
        self.runner.release(0)
        return 1e3 * mean_s

    # -- tokens -----------------------------------------------------------------------------

    def write(self, submit: Submit, decode: Callable[[Sequence[int]], str]) -> list[int]:
        """What the model writes after a prompt, as `greedy` does."""
        check, tokens = FinishChecker(submit, decode), list[int]()
        position, ids = 0, submit.prompt
        while True:
            token = self.runner.forward([Row(0, position, ids, 1, submit.sampling)])[0][0]
            tokens.append(token)
            if check(token):
                self.runner.release(0)
                return tokens
            position, ids = position + len(ids), (token,)

    def draws(
        self, prompt: Sequence[int], tokens: Sequence[int], sampling: SamplingParams
    ) -> list[Ranked]:
        """What the model would have drawn in the place of each of `tokens`, as far as its context
        goes."""
        ids = [*prompt, *tokens][: self.runner.info.context_length]
        found = self._draws(0, ids[: len(prompt)], 1, sampling) if len(ids) >= len(prompt) else []
        start = len(prompt)
        while found and start < len(ids) and len(found) < len(tokens):
            piece = ids[start : min(start + CHUNK, len(ids))]
            found += self._draws(start, piece, len(piece), sampling)
            start += len(piece)
        self.runner.release(0)
        return found[: len(tokens)]

    def branches(
        self,
        prompt: Sequence[int],
        tokens: Sequence[int],
        offsets: Sequence[int],
        length: int,
        sampling: SamplingParams,
    ) -> Iterator[tuple[list[int], list[Ranked]]]:
        """What the model writes by itself from each of these places of a text on, `length` tokens
        (fewer at the end of its context): the tokens, and its choices at each and after them."""
        ids = [*prompt, *tokens]
        for start in range(0, len(ids), CHUNK):
            self._draws(start, ids[start : start + CHUNK], 1, sampling)
        # From the end, so that what the cache holds before a branch is still the text.
        for offset in sorted(offsets, reverse=True):
            at = len(prompt) + offset
            ranked = self._draws(at - 1, ids[at - 1 : at], 1, sampling)
            written: list[int] = []
            while len(written) < length and at + len(written) < self.runner.info.context_length:
                written.append(ranked[-1][0])
                ranked += self._draws(at + len(written) - 1, written[-1:], 1, sampling)
            yield written, ranked
        self.runner.release(0)

    def follow(
        self,
        prompt: Sequence[int],
        tokens: Sequence[int],
        branches: Sequence[tuple[int, Sequence[int]]],
        sampling: SamplingParams,
    ) -> list[list[Ranked]]:
        """The model's own choices along another's branches (offset into the text, tokens), at each
        of their tokens and after them; in the order given."""
        ids = [*prompt, *tokens]
        most = self.runner.info.context_length
        for start in range(0, min(len(ids), most), CHUNK):
            self._draws(start, ids[start : min(start + CHUNK, most)], 1, sampling)
        found: list[list[Ranked]] = [[] for _ in branches]
        order = sorted(range(len(branches)), key=lambda n: branches[n][0], reverse=True)
        for number in order:
            offset, branch = branches[number]
            at = len(prompt) + offset
            fed = [ids[at - 1], *branch][: most - at + 1]
            if fed:
                found[number] = self._draws(at - 1, fed, len(fed), sampling)
        self.runner.release(0)
        return found

    # -- parts ------------------------------------------------------------------------------

    def _draws(
        self, start: int, ids: Sequence[int], num_draws: int, sampling: SamplingParams
    ) -> list[Ranked]:
        row = Row(0, start, ids, num_draws, sampling)
        if self._num_ranked > 1:
            return self._forward_tree(TreeRow(row, (), num_ranked=self._num_ranked))
        return [(token,) for token in self.runner.forward([row])[0]]

    def _forward_tree(self, tree: TreeRow) -> list[Ranked]:
        assert isinstance(self.runner, BranchingRunner)
        return self.runner.forward_tree(tree)

    def _tree(self, ids: Sequence[int], length: int) -> TreeRow:
        """One token of the text and the others as its possible successors."""
        at = len(ids)
        first_row = min(at + _TAIL_GAP, self.runner.info.context_length)
        token, *others = _repeat(ids, length)
        tail = [TailToken(x, at + 1, first_row + n, at) for n, x in enumerate(others)]
        row = Row(0, at, [token], 1, SamplingParams())
        return TreeRow(row, tail, num_ranked=self._num_ranked)

    def _fill(self, ids: Sequence[int]) -> None:
        self.runner.forward([Row(0, 0, ids, 1, SamplingParams())])

    def _medians(
        self, forwards: Sequence[tuple[int, Callable[[], object]]], budget_s: float
    ) -> list[tuple[int, float]]:
        """Takes turns, so that a slow moment of the machine does not fall on one length."""
        times_ms: dict[int, list[float]] = {n: [] for n, _ in forwards}
        started_s, rounds = time.perf_counter(), 0
        while rounds < _MIN_ROUNDS or time.perf_counter() - started_s < budget_s:
            for n, forward in forwards:
                for repeat in range(_IN_A_ROW):
                    start_s = time.perf_counter()
                    forward()
                    if repeat:  # the first one finds the other lengths' leftovers
                        times_ms[n].append(1e3 * (time.perf_counter() - start_s))
            rounds += 1
        self.runner.release(0)
        return [(n, median(times)) for n, times in times_ms.items()]


def _repeat(ids: Sequence[int], count: int) -> list[int]:
    """`count` tokens, those of `ids` over and over."""
    return [ids[n % len(ids)] for n in range(count)]


class Session:
    """Answers the parent's questions."""

    def __init__(self) -> None:
        self._meter: Meter | None = None
        self._decode: Callable[[Sequence[int]], str] = lambda _ids: ""

    def answer(self, question: Mapping[str, Any]) -> Any:
        """The answer to one question, as plain JSON values."""
        values = dict(question)
        what = values.pop("what")
        if what == "load":
            return self._load(**values)
        assert self._meter is not None, "nothing is loaded"
        if "sampling" in values:
            values["sampling"] = SamplingParams(*values["sampling"])
        if what == "write":
            submit = Submit(0, tuple(values["prompt"]), (), values["sampling"], *values["limits"])
            return self._meter.write(submit, self._decode)
        if what == "branches":
            return list(self._meter.branches(**values))
        assert what in ("decode_ms", "tree_ms", "prefill_ms", "steps_ms", "draws", "follow"), what
        return getattr(self._meter, what)(**values)

    def _load(
        self, stage: Mapping[str, Any], vocab_size: int, context_length: int, num_ranked: int,
        longest: int,
    ) -> dict[str, Any]:  # fmt: skip
        from pipespec.runners.factory import load_runner

        start_s = time.perf_counter()
        spec = read_stage(stage)
        self._decode = load_stage_tokenizer(spec).decode
        folder = None if spec.folder is None else Path(spec.folder)
        runner = load_runner(spec.model, spec.placement, folder, vocab_size, context_length)
        if runner.info.weight_bytes:
            warm_up(runner, min(longest, runner.info.context_length))
        self._meter = Meter(runner, num_ranked)
        return {**asdict(runner.info), "load_s": time.perf_counter() - start_s}

    def close(self) -> None:
        if self._meter is not None:
            self._meter.runner.close()


def write_stage(stage: StageSpec) -> dict[str, Any]:
    """A stage as plain values, for `read_stage`."""
    return asdict(stage)


def read_stage(values: Mapping[str, Any]) -> StageSpec:
    """What `write_stage` wrote, from the other end of a pipe."""
    model, placement = dict(values["model"]), dict(values["placement"])
    model["devices"] = tuple(model["devices"])
    for key in ("visible_devices", "cores"):
        placement[key] = tuple(placement[key])
    return StageSpec(
        **{**values, "model": ModelConfig(**model), "placement": StagePlacement(**placement)}
    )


def main(arguments: Sequence[str]) -> int:
    """Answers until standard input ends. The first question is "load"; its cores are taken first,
    before any library is loaded."""
    (run_dir,) = arguments
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the parent acts on them, and closes our input
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    watch_launcher(os.getppid(), Path(run_dir))
    answers = os.dup(1)
    os.dup2(2, 1)  # what a library prints must not stand between answers
    session = Session()
    try:
        for line in sys.stdin:
            question = json.loads(line)
            if question["what"] == "load":
                pin(question["stage"]["placement"]["cores"])
            try:
                reply = {"answer": session.answer(question)}
            except Exception as error:
                log.exception("failed at %s", question["what"])
                reply = {"fault": asdict(fault_of(error))}
            _write_all(answers, json.dumps(reply).encode() + b"\n")
    finally:
        session.close()
    return 0


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


if __name__ == "__main__":
    status = main(sys.argv[1:])
    logging.shutdown()
    os._exit(status)  # everything is closed; for the interpreter to unload torch takes a second
