"""The race itself: rounds in which all contestants take turns, in an order shuffled for each round.

One works at a time; the processes of all others are stopped. Every turn is over all prompts, one
after the other, and is on the disk when the next one starts. Between two prompts of a turn this
process reads one line and writes one; it computes nothing while a contestant does.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from pipespec.commands.inputs import Inputs, Prompt
from pipespec.comparison.contestants import Contestant, Variant
from pipespec.comparison.drafting import StageSums
from pipespec.comparison.process import ContestantFailed, Group
from pipespec.comparison.record import PromptResult, Record, Turn, save
from pipespec.comparison.specification import environment_of, specification
from pipespec.comparison.user_command import run_command, write_prompts
from pipespec.config import SamplingParams
from pipespec.worker_spec import make_run_dir

CHILD: Final = (sys.executable, "-m", "pipespec.comparison.child")
WARM_UP_TOKENS: Final = 64
_END_S: Final = 5.0  # for a contestant to end by itself


@dataclass(frozen=True, slots=True)
class RaceSettings:
    """timeout_s: for a contestant to load, or to answer one prompt. one_at_a_time: load for each
    turn, and unload after it. base: what relative paths in the models config are relative to.
    sampling: its seed also shuffles. limits: new tokens of each prompt, by its index."""

    rounds: int
    timeout_s: float
    one_at_a_time: bool
    base: Path
    sampling: SamplingParams
    limits: Mapping[int, int]


class Racer:
    """One of ours, or of transformers, in its process."""

    def __init__(self, log_path: Path, timeout_s: float) -> None:
        self.group = Group(log_path)
        self._timeout_s = timeout_s

    def load(self, spec: Mapping[str, Any], environment: Mapping[str, str]) -> dict[str, Any]:
        """Starts the process and waits until its models are loaded; what it says of itself.

        Raises:
            ContestantFailed: it cannot.
        """
        self.group.start((*CHILD, str(self.group.log_path.parent)), environment)
        self._send(spec)
        info: dict[str, Any] = self._read()["ready"]
        return info

    def generate(self, prompt: Prompt, limit: int, variant: Variant) -> dict[str, Any]:
        """One text.

        Raises:
            ContestantFailed: it cannot, or it took too long.
        """
        ask = {"ids": prompt.ids, "max_new_tokens": limit, "variant": variant.settings}
        self._send(ask)
        return self._read()

    def _send(self, message: Mapping[str, Any]) -> None:
        self.group.send(json.dumps(message).encode("ascii"), self._timeout_s)

    def _read(self) -> dict[str, Any]:
        line = self.group.read(self._timeout_s)
        if line is None:
            raise ContestantFailed(self.group.describe_end())
        message: dict[str, Any] = json.loads(line)
        if "error" in message:
            raise ContestantFailed(message["error"])
        return message


class Race:
    """Lets `contestants` race over `prompts`; what they do goes to `record` and its file.

    A context manager: on its way out every process is ended, whatever happened.
    """

    def __init__(
        self,
        contestants: Sequence[Contestant],
        inputs: Inputs,
        settings: RaceSettings,
        record: Record,
        path: Path,
        on_progress: Callable[[str], None],
    ) -> None:
        self._contestants = contestants
        self._hierarchy = inputs.hierarchy
        self._prompts = inputs.prompts
        self._settings = settings
        self._record = record
        self._path = path
        self._on_progress = on_progress
        self._racers: dict[str, Racer] = {}
        self._run_dir = make_run_dir()  # for logs, and the prompts of commands

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        try:
            for racer in self._racers.values():
                racer.group.end_input()
            deadline = time.monotonic() + _END_S
            for racer in self._racers.values():
                _wait_for(racer.group, deadline)
        finally:  # also when Ctrl-C cuts the waiting short
            for racer in self._racers.values():
                racer.group.close()
            shutil.rmtree(self._run_dir, ignore_errors=True)

    def run(self) -> None:
        """All rounds. A contestant that fails is left out from then on.

        Raises:
            PipeSpecError: the file cannot be written.
        """
        settings = self._settings
        write_prompts(self._prompts_path, self._prompts, settings.limits, settings.sampling)
        if not settings.one_at_a_time:
            self._load_all()
        for number in range(1, settings.rounds + 1):
            order = self._order(number)
            for place, contestant in enumerate(order, 1):
                where = f"round {number} of {settings.rounds}, {place} of {len(order)}"
                self._on_progress(f"{where}: {contestant.key}")
                with self._leaving_out(contestant, f"in round {number}"):
                    self._turns(number, contestant)

    def _order(self, number: int) -> list[Contestant]:
        """Whoever still races, in the order of a round."""
        left = [c for c in self._contestants if not self._record.entrant(c.key).left_out]
        self._random(number).shuffle(left)
        return left

    # -- loading ----------------------------------------------------------------------------

    def _load_all(self) -> None:
        loaded = [c for c in self._contestants if c.kind != "command"]
        for place, contestant in enumerate(loaded, 1):
            self._on_progress(f"loading {place} of {len(loaded)}: {contestant.key}")
            with self._leaving_out(contestant, "while it was loaded"):
                self._load(contestant).group.pause()

    def _load(self, contestant: Contestant) -> Racer:
        """Starts and warms up a contestant: one text in each variant, whose time does not count.
        First calls compile and allocate; policies measure steps, the library's heuristic adapts."""
        settings, key = self._settings, contestant.key
        racer = Racer(self._run_dir / f"{key}.log", settings.timeout_s)
        self._racers[key] = racer
        spec = specification(
            contestant,
            self._hierarchy,
            base=settings.base,
            sampling=settings.sampling,
            timeout_s=settings.timeout_s,
        )
        info = racer.load(spec, self._environment(contestant))
        self._record.entrant(key).info = info
        first = self._prompts[0]
        limit = min(WARM_UP_TOKENS, settings.limits[first.index])
        for variant in contestant.variants:
            racer.generate(first, limit, variant)
        return racer

    @contextlib.contextmanager
    def _on_track(self, contestant: Contestant) -> Iterator[Racer]:
        """The contestant's process, at work within the block only."""
        if self._settings.one_at_a_time:
            racer = self._load(contestant)
            yield racer
            self._dismiss(contestant.key)
            return
        racer = self._racers[contestant.key]
        racer.group.resume()
        yield racer
        racer.group.pause()

    def _dismiss(self, key: str) -> None:
        """Ends a contestant's process, if it has one."""
        racer = self._racers.get(key)
        if racer is not None:
            racer.group.end_input()
            _wait_for(racer.group, time.monotonic() + _END_S)
            racer.group.close()
            del self._racers[key]

    @contextlib.contextmanager
    def _leaving_out(self, contestant: Contestant, when: str) -> Iterator[None]:
        """A failure within the block is the contestant's, and its last one."""
        try:
            yield
        except ContestantFailed as failure:
            has_run = any(turn.contestant == contestant.key for turn in self._record.turns)
            why = f"{failure} ({when})" if has_run else str(failure)
            self._record.entrant(contestant.key).left_out = why
            self._dismiss(contestant.key)
            save(self._record, self._path)

    # -- turns ------------------------------------------------------------------------------

    def _turns(self, number: int, contestant: Contestant) -> None:
        """One turn for each variant, in an order of the round's own."""
        if contestant.kind == "command":
            self._keep(self._command_turn(number, contestant))
            return
        variants = list(contestant.variants)
        self._random(number, contestant.key).shuffle(variants)
        with self._on_track(contestant) as racer:
            for variant in variants:
                results = [self._result(racer, prompt, variant) for prompt in self._prompts]
                self._keep(Turn(number, contestant.key, variant.label, tuple(results)))

    def _random(self, *what: object) -> random.Random:
        return random.Random("/".join(map(str, (self._settings.sampling.seed, *what))))

    def _keep(self, turn: Turn) -> None:
        self._record.turns.append(turn)
        save(self._record, self._path)

    def _result(self, racer: Racer, prompt: Prompt, variant: Variant) -> PromptResult:
        answer = racer.generate(prompt, self._settings.limits[prompt.index], variant)
        text = self._hierarchy.tokenizer.decode(answer["token_ids"])
        return PromptResult(
            prompt.index,
            len(answer["token_ids"]),
            answer["seconds"],
            answer["first_token_s"],
            answer["num_first_tokens"],
            self._record.store(answer["token_ids"], text),
            tuple(StageSums(**stage) for stage in answer["stages"]),
        )

    def _command_turn(self, number: int, contestant: Contestant) -> Turn:
        with Group(self._run_dir / f"{contestant.key}.log") as group:
            answers = run_command(
                group,
                contestant.settings["command"],
                self._prompts_path,
                self._settings.limits,
                environment=self._environment(contestant),
                cores=contestant.cores,
                timeout_s=self._settings.timeout_s,
            )
        results = [
            PromptResult(
                answer.index,
                answer.num_tokens,
                answer.seconds,
                answer.first_token_s,
                None if answer.first_token_s is None else 1,
                self._record.store(answer.token_ids, answer.text),
            )
            for answer in answers
        ]
        return Turn(number, contestant.key, "", tuple(results))

    @property
    def _prompts_path(self) -> Path:
        return self._run_dir / "prompts.jsonl"

    def _environment(self, contestant: Contestant) -> dict[str, str]:
        environment = environment_of(contestant, self._hierarchy, os.environ)
        if contestant.kind == "own":  # should it be killed, its sockets go with our directory
            environment["TMPDIR"] = str(self._run_dir)
        return environment


def _wait_for(group: Group, deadline_s: float) -> None:
    """Waits for a group that is about to end by itself; one that was never started has ended."""
    if group.is_started:
        group.wait(max(0.0, deadline_s - time.monotonic()))
