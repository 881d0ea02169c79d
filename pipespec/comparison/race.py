"""The race itself: rounds in which all contestants take turns, in an order shuffled for each round.

One works at a time; the processes of all others are stopped. Every turn is over all prompts, one
after the other, and is on the disk when the next one starts. Between two prompts of a turn this
process reads one line and writes one; it computes nothing while a contestant does.
"""

from __future__ import annotations

import contextlib
import json
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, Self

from pipespec.commands.inputs import Prompt
from pipespec.comparison.contestants import Contestant, Variant
from pipespec.comparison.interference import (
    CoreWatch,
    await_calm,
    ended_children_cpu_s,
    group_cpu_s,
)
from pipespec.comparison.process import ContestantFailed, Group
from pipespec.comparison.record import PromptResult, Record, Turn, save
from pipespec.comparison.specification import environment_of, specification
from pipespec.comparison.user_command import run_command, write_prompts
from pipespec.config import SamplingParams
from pipespec.decoding import Hierarchy

CHILD: Final = (sys.executable, "-m", "pipespec.comparison.child")
WARM_UP_TOKENS: Final = 64
MAX_TRIES: Final = 8
CALM_TIMEOUT_S: Final = 60.0
_END_S: Final = 5.0  # for a contestant to end by itself

OnProgress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class RaceSettings:
    """order_seed: of the order in each round. timeout_s: for a contestant to load, or to answer one
    prompt. one_at_a_time: load for each turn, and unload after it. base: what relative paths in the
    models config are relative to. limits: new tokens of each prompt, by its index.
    most_foreign_cores: that others may keep busy, else a turn is repeated; None repeats none.
    environment: variables that contestants inherit."""

    rounds: int
    order_seed: int
    timeout_s: float
    one_at_a_time: bool
    base: Path
    sampling: SamplingParams
    limits: Mapping[int, int]
    most_foreign_cores: float | None
    environment: Mapping[str, str]


class Racer:
    """One of ours, or of transformers, in its process."""

    def __init__(self, contestant: Contestant, log_path: Path, timeout_s: float) -> None:
        self.contestant = contestant
        self.group = Group(log_path)
        self._timeout_s = timeout_s

    def load(self, spec: Mapping[str, Any], environment: Mapping[str, str]) -> dict[str, Any]:
        """Starts the process and waits until its models are loaded; what it says of itself.

        Raises:
            ContestantFailed: it cannot.
        """
        self.group.start(CHILD, environment)
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

    A context manager: on its way out every process is ended, whatever happened. run_dir: for logs
    and the prompts of commands; whoever made it removes it.
    """

    def __init__(
        self,
        contestants: Sequence[Contestant],
        hierarchy: Hierarchy,
        prompts: Sequence[Prompt],
        settings: RaceSettings,
        record: Record,
        path: Path,
        run_dir: Path,
        on_progress: OnProgress,
    ) -> None:
        self._contestants = contestants
        self._hierarchy = hierarchy
        self._prompts = prompts
        self._settings = settings
        self._record = record
        self._path = path
        self._run_dir = run_dir
        self._on_progress = on_progress
        self._racers: dict[str, Racer] = {}
        # Of anyone: work on a core beside the contestant's takes of its caches and memory too.
        is_pinned = all(contestant.cores for contestant in contestants)
        used = {core for contestant in contestants for core in contestant.cores}
        self._cores = tuple(sorted(used)) if is_pinned else hierarchy.machine.cores

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

    def run(self) -> None:
        """All rounds. A contestant that fails is left out from then on.

        Raises:
            PipeSpecError: the file cannot be written.
        """
        self._write_prompts()
        if not self._settings.one_at_a_time:
            self._load_all()
        orders: list[list[str]] = self._record.metadata.setdefault("orders", [])
        for number in range(1, self._settings.rounds + 1):
            order = self._order(number)
            orders.append([contestant.key for contestant in order])
            for place, contestant in enumerate(order, 1):
                where = f"round {number} of {self._settings.rounds}, {place} of {len(order)}"
                self._on_progress(f"{where}: {contestant.key}")
                with self._leaving_out(contestant, f"in round {number}"):
                    self._turns(number, contestant)

    def _order(self, number: int) -> list[Contestant]:
        """Whoever still races, in the order of a round."""
        left = [c for c in self._contestants if not self._record.entrant(c.key).left_out]
        random.Random(f"{self._settings.order_seed}/{number}").shuffle(left)
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
        racer = Racer(contestant, self._run_dir / f"{key}.log", settings.timeout_s)
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
            self._calm_turn(lambda: self._command_turn(number, contestant))
            return
        variants = list(contestant.variants)
        random.Random(f"{self._settings.order_seed}/{number}/{contestant.key}").shuffle(variants)
        with self._on_track(contestant) as racer:
            for variant in variants:
                self._calm_turn(partial(self._turn, number, racer, variant))

    def _calm_turn(self, take_turn: Callable[[], Turn]) -> None:
        """A turn; where others are not to disturb it, another one until they do not, but not for
        ever. That of which they took the least counts, whatever its result."""
        limit = self._settings.most_foreign_cores
        turns: list[Turn] = []
        for _ in range(1 if limit is None else MAX_TRIES):
            if limit is not None:
                await_calm(self._cores, limit, CALM_TIMEOUT_S)
            turns.append(take_turn())
            if limit is None or (turns[-1].foreign_cores or 0.0) <= limit:
                break
        best = min(turns, key=lambda turn: turn.foreign_cores or 0.0)
        for turn in turns:
            self._keep(replace(turn, is_disturbed=turn is not best))

    def _turn(self, number: int, racer: Racer, variant: Variant) -> Turn:
        contestant = racer.contestant
        watch = CoreWatch(self._cores, lambda: group_cpu_s(racer.group.pid))
        results = [self._result(racer, prompt, variant) for prompt in self._prompts]
        foreign = watch.foreign_cores()
        return Turn(number, contestant.key, variant.label, tuple(results), foreign)

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
        )

    def _command_turn(self, number: int, contestant: Contestant) -> Turn:
        watch = CoreWatch(self._cores, ended_children_cpu_s)
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
        return Turn(number, contestant.key, "", tuple(results), watch.foreign_cores())

    def _write_prompts(self) -> None:
        limits = self._settings.limits
        prompts = [(p.index, p.text, p.ids, limits[p.index]) for p in self._prompts]
        write_prompts(self._prompts_path, prompts, self._settings.sampling)

    @property
    def _prompts_path(self) -> Path:
        return self._run_dir / "prompts.jsonl"

    def _environment(self, contestant: Contestant) -> dict[str, str]:
        return environment_of(contestant, self._hierarchy, self._settings.environment)


def _wait_for(group: Group, deadline_s: float) -> None:
    """Waits for a group that is about to end by itself; one that was never started has ended."""
    if group.is_started:
        group.wait(max(0.0, deadline_s - time.monotonic()))
