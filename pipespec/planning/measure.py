"""Measures a hierarchy part by part into a `Profile`: times, texts, draws, what stages cost others.

Models are measured in processes of their own, where their stages would run. What a profile holds
already is not measured again, and it is handed out after each part, to be kept.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from itertools import combinations
from statistics import median
from typing import Any, Final

from pipespec.config import GenerationParams
from pipespec.decoding import Hierarchy
from pipespec.planning.meters import MeterProcess, Meters
from pipespec.planning.overheads import measure_overheads
from pipespec.planning.profile import NUM_RANKED, MeasuredModel, Profile
from pipespec.planning.times import MeasuredTimes, Points
from pipespec.planning.trace import Branch, Draws, Ranked, Text, agreement, target_draws
from pipespec.worker_spec import StageSpec

LENGTHS: Final = (1, 2, 3, 4, 6, 8, 12, 16, 24, 33)  # up to the longest run-ahead, and one
TREE_LENGTHS: Final = (1, 2, 4, 8, 12)
BRANCH_LENGTH: Final = 6
MOST_BRANCHES: Final = 200  # of a model; the agreement stands for the others
_TABLE_S: Final = 0.6  # for each table of step times
_TOGETHER_S: Final = 0.25
_ROUNDS: Final = 3  # of two models alone and beside each other
_VERIFIED: Final = 5  # tokens in a forward of a model that verifies, where one must do for all
_NEAR: Final = 1.15  # context lengths that differ by less have the same step times

OnPart = Callable[[str], None]
Keep = Callable[[Profile], None]


@dataclass(frozen=True, slots=True)
class Job:
    """What is to be measured. prompts: index in the data set, token ids."""

    hierarchy: Hierarchy
    prompts: tuple[tuple[int, tuple[int, ...]], ...]
    generation: GenerationParams
    transport: str
    ready_timeout_s: float

    @property
    def num_models(self) -> int:
        return len(self.hierarchy.models)

    @property
    def longest_prompt(self) -> tuple[int, ...]:
        return max((ids for _, ids in self.prompts), key=len)

    def contexts(self) -> list[int]:
        """Text lengths at which step times are taken: the shortest prompt, the longest text, and
        between them."""
        lengths = [len(ids) for _, ids in self.prompts]
        low, high = min(lengths), max(lengths) + self.generation.max_new_tokens
        high = max(low, min(high, self.hierarchy.context_length))
        found = [low]
        for length in ((low + high) // 2, high):
            if length > _NEAR * found[-1]:
                found.append(length)
        return found

    def prefill_lengths(self) -> list[int]:
        """The shortest, the median and the longest prompt."""
        lengths = sorted(len(ids) for _, ids in self.prompts)
        return sorted({lengths[0], lengths[len(lengths) // 2], lengths[-1]})


def measure(job: Job, profile: Profile, keep: Keep, on_part: OnPart) -> None:
    """Adds to the profile what it lacks.

    keep: called with the profile after each part. on_part: told what was measured.

    Raises:
        UsageError: a model that cannot be loaded.
        StageError: a process failed or did not answer.
    """
    work = _Measurement(job, profile, keep, on_part)
    if work.needs_models:
        with Meters() as meters:
            work.with_models(meters)
    if profile.overheads is None:
        with work.part():
            work.measure_overheads()


def num_parts(job: Job, profile: Profile) -> int:
    """How often `on_part` will be called."""
    num_models, num_texts = job.num_models, len(job.prompts)
    missing_models = num_models - len(profile.models)
    missing_draws = sum(index not in profile.draws for index in range(num_models - 1))
    pairs = num_models * (num_models - 1) // 2 - len(profile.slow_downs) // 2
    missing = missing_models + (num_texts - len(profile.texts)) + missing_draws + pairs
    return missing + _num_overhead_parts(profile)


def _num_overhead_parts(profile: Profile) -> int:
    return 4 if profile.overheads is None else 0


class _Measurement:
    """One call of `measure`."""

    def __init__(self, job: Job, profile: Profile, keep: Keep, on_part: OnPart) -> None:
        self._job = job
        self._profile = profile
        self._keep = keep
        self._on_part = on_part
        self._sampling = list(astuple(job.generation.sampling))

    @property
    def needs_models(self) -> bool:
        """Whether more than the overheads is missing."""
        return num_parts(self._job, self._profile) > _num_overhead_parts(self._profile)

    @contextlib.contextmanager
    def part(self) -> Iterator[None]:
        """Something that is kept once it is done."""
        start_s = time.monotonic()
        yield
        self._profile.measuring_s += time.monotonic() - start_s
        self._keep(self._profile)

    def with_models(self, meters: Meters) -> None:
        loaded = [meters.start(self._stage(index)) for index in range(self._job.num_models)]
        infos = self._load(loaded)  # all at once, as a run does
        for index, (process, info) in enumerate(zip(loaded, infos)):
            if index not in self._profile.models:
                with self.part():
                    self._measure_model(meters, index, process, info)
        for number in range(len(self._profile.texts), len(self._job.prompts)):
            with self.part():
                self._write_text(loaded[-1], number)
        # Larger ones first: their branches are what smaller ones are asked about.
        for index in reversed(range(self._job.num_models - 1)):
            if index not in self._profile.draws:
                with self.part():
                    self._measure_draws(loaded[index], index)
        for one, other in combinations(range(self._job.num_models), 2):
            if (one, other) not in self._profile.slow_downs:
                with self.part():
                    self._measure_together(loaded, one, other)

    def measure_overheads(self) -> None:
        job, profile = self._job, self._profile
        middle = job.contexts()[len(job.contexts()) // 2]
        target = target_draws(profile.texts)
        profile.overheads = measure_overheads(
            job.hierarchy,
            [
                1e3 * profile.models[index].times.forward_s(1, middle)
                for index in range(job.num_models)
            ],
            [agreement(profile.draws[index], target) for index in range(job.num_models - 1)],
            job.prompts[0][1],
            transport=job.transport,
            ready_timeout_s=job.ready_timeout_s,
            on_part=self._on_part,
        )

    # -- parts ------------------------------------------------------------------------------

    def _load(self, processes: Sequence[MeterProcess]) -> list[dict[str, Any]]:
        for process in processes:
            process.load(
                vocab_size=self._job.hierarchy.vocab_size,
                context_length=self._job.hierarchy.context_length + max(LENGTHS),
                num_ranked=NUM_RANKED,
                longest=max(LENGTHS),
            )
        return [process.receive(self._job.ready_timeout_s) for process in processes]

    def _stage(self, index: int) -> StageSpec:
        hierarchy = self._job.hierarchy
        folder, tokenizer_folder = hierarchy.folders[index], hierarchy.tokenizer_folders[index]
        return StageSpec(
            hierarchy.models[index],
            hierarchy.placements[index],
            None if folder is None else str(folder),
            None if tokenizer_folder is None else str(tokenizer_folder),
        )

    def _measure_model(
        self, meters: Meters, index: int, process: MeterProcess, info: dict[str, Any]
    ) -> None:
        is_target = index == self._job.num_models - 1
        times = self._times(process, info, with_trees=not is_target)
        chain_times = None
        if self._runs_elsewhere_in_chain(index):
            there = self._job.hierarchy.placements[-1]
            other = meters.start(replace(self._stage(index), placement=there))
            try:
                (other_info,) = self._load([other])
                chain_times = self._times(other, other_info, with_trees=False)
            finally:
                other.close()
        self._profile.models[index] = MeasuredModel(
            name=self._job.hierarchy.models[index].name,
            runner=info["runner"],
            device=info["device"],
            num_parameters=info["num_parameters"],
            context_length=info["context_length"],
            num_tail_rows=info["num_tail_rows"],
            load_s=info["load_s"],
            times=times,
            chain_times=chain_times,
        )
        self._on_part(f"step times of {self._job.hierarchy.models[index].name}")

    def _runs_elsewhere_in_chain(self, index: int) -> bool:
        """On the CPU, `chain` has all models on the target's cores; as many cores as the stage's
        own are as good as its own."""
        own, target = self._job.hierarchy.placements[index], self._job.hierarchy.placements[-1]
        if own.device != "cpu" or target.device != "cpu":
            return False
        return (len(own.cores), own.threads) != (len(target.cores), target.threads)

    def _times(
        self, process: MeterProcess, info: dict[str, Any], *, with_trees: bool
    ) -> MeasuredTimes:
        most = int(info["context_length"])
        contexts = sorted({min(at, most - max(LENGTHS)) for at in self._job.contexts()})
        contexts = [at for at in contexts if at > 0] or [1]

        def table(what: str, lengths: Sequence[int]) -> tuple[tuple[int, Points], ...]:
            rows = []
            for at in contexts:
                fitting = [n for n in lengths if at + n <= most]
                ids = self._text_of(at)
                points = process.ask(what, ids=ids, lengths=fitting, budget_s=_TABLE_S)
                rows.append((at, _points(points)))
            return tuple(rows)

        lengths = [n for n in self._job.prefill_lengths() if n <= most]
        prefill = process.ask(
            "prefill_ms", ids=self._text_of(max(lengths, default=1)), lengths=lengths or [1],
            budget_s=_TABLE_S,
        )  # fmt: skip
        trees = table("tree_ms", TREE_LENGTHS) if with_trees and info["num_tail_rows"] else ()
        return MeasuredTimes(
            decode=table("decode_ms", LENGTHS),
            prefill=_points(prefill),
            trees=() if any(not points for _, points in trees) else trees,
        )

    def _text_of(self, length: int) -> list[int]:
        """Some text of so many tokens."""
        ids = self._job.longest_prompt
        return [ids[n % len(ids)] for n in range(length)]

    def _write_text(self, target: MeterProcess, number: int) -> None:
        job, (index, prompt) = self._job, self._job.prompts[number]
        room = job.hierarchy.context_length + 1 - len(prompt)
        limit = min(job.generation.max_new_tokens, room)
        tokens = target.ask(
            "write",
            prompt=prompt,
            sampling=self._sampling,
            limits=[limit, job.hierarchy.eos, job.generation.stop],
        )
        self._profile.texts.append(Text(index, prompt, tuple(tokens)))
        self._on_part(f"the target's text {number + 1} of {len(job.prompts)}")

    def _measure_draws(self, process: MeterProcess, index: int) -> None:
        profile, texts = self._profile, self._profile.texts
        on_texts = tuple(
            _ranked(process.ask("draws", prompt=x.prompt, tokens=x.tokens, sampling=self._sampling))
            for x in texts
        )
        above = self._follow(process, profile.branches_above(index))
        own: tuple[tuple[Ranked, ...], ...] = ()
        if index > 0:
            profile.branches[index], own = self._leave(process, on_texts)
        profile.draws[index] = Draws(on_texts, (*above, *own))
        self._on_part(f"what {self._job.hierarchy.models[index].name} draws")

    def _leave(
        self, process: MeterProcess, on_texts: tuple[tuple[Ranked, ...], ...]
    ) -> tuple[list[Branch], tuple[tuple[Ranked, ...], ...]]:
        """What a middle model writes where it differs from the target, at evenly spaced ones of
        those places, and its choices there."""
        places = [
            (number, offset)
            for number, (text, ranked) in enumerate(zip(self._profile.texts, on_texts))
            for offset, (token, own) in enumerate(zip(text.tokens, ranked))
            if own[0] != token
        ]
        count = min(len(places), MOST_BRANCHES)
        chosen = [places[n * len(places) // count] for n in range(count)]
        branches, draws = [], []
        for number, text in enumerate(self._profile.texts):
            offsets = [offset for at, offset in chosen if at == number]
            if not offsets:
                continue
            found = process.ask(
                "branches",
                prompt=text.prompt,
                tokens=text.tokens,
                offsets=offsets,
                length=BRANCH_LENGTH,
                sampling=self._sampling,
            )
            for offset, (tokens, ranked) in zip(sorted(offsets, reverse=True), found):
                branches.append(Branch(number, offset, tuple(tokens)))
                draws.append(_ranked(ranked))
        return branches, tuple(draws)

    def _follow(
        self, process: MeterProcess, branches: Sequence[Branch]
    ) -> tuple[tuple[Ranked, ...], ...]:
        """Choices along the branches of larger models, in their order."""
        found: list[tuple[Ranked, ...]] = [()] * len(branches)
        for number, text in enumerate(self._profile.texts):
            wanted = [at for at, branch in enumerate(branches) if branch.text == number]
            if wanted:
                answer = process.ask(
                    "follow",
                    prompt=text.prompt,
                    tokens=text.tokens,
                    branches=[[branches[at].offset, branches[at].tokens] for at in wanted],
                    sampling=self._sampling,
                )
                for at, ranked in zip(wanted, answer):
                    found[at] = _ranked(ranked)
        return tuple(found)

    def _measure_together(self, loaded: Sequence[MeterProcess], one: int, other: int) -> None:
        """How much longer forwards of two models take while the other one computes too."""
        pair = (one, other)
        middle = self._job.contexts()[len(self._job.contexts()) // 2]
        questions: dict[int, dict[str, Any]] = {}
        for index in pair:
            room = self._profile.models[index].context_length - _VERIFIED
            questions[index] = {
                "ids": self._text_of(max(1, min(middle, room))),
                "length": 1 if index == 0 else _VERIFIED,
                "seconds": _TOGETHER_S,
            }
        alone: dict[int, list[float]] = {one: [], other: []}
        beside: dict[int, list[float]] = {one: [], other: []}
        for _ in range(_ROUNDS):
            for index in pair:
                alone[index].append(loaded[index].ask("steps_ms", **questions[index]))
            for index in pair:
                loaded[index].send("steps_ms", **questions[index])
            for index in pair:
                beside[index].append(loaded[index].receive())
        for index, neighbour in (pair, pair[::-1]):
            slow_down = max(1.0, median(beside[index]) / median(alone[index]))
            self._profile.slow_downs[index, neighbour] = round(slow_down, 4)
        names = [self._job.hierarchy.models[index].name for index in pair]
        self._on_part(f"{names[0]} beside {names[1]}")


def _points(pairs: Sequence[Sequence[float]]) -> Points:
    return tuple((int(count), round(float(ms), 5)) for count, ms in pairs)


def _ranked(items: Sequence[Sequence[int]]) -> tuple[Ranked, ...]:
    return tuple(tuple(item) for item in items)
