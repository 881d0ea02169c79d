"""Measures a hierarchy part by part into a `Profile`: times, texts, draws, what stages cost others.

Models are measured in processes of their own, where their stages would run; then the strategies
run for a moment, which is all that is measured of emulated models: their tables say the rest. What
a profile holds already is not measured again, and it is handed out after each part, to be kept.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from statistics import median
from typing import Any, Final

from pipespec.config import GenerationParams, SamplingParams
from pipespec.decoding import Hierarchy
from pipespec.messages import Submit
from pipespec.planning.measured import plan_models, texts_of
from pipespec.planning.meter import LONGEST
from pipespec.planning.meters import MeterProcess, Meters
from pipespec.planning.profile import Profile
from pipespec.planning.running import Runs
from pipespec.planning.search import MOST_OUTCOMES
from pipespec.planning.system import is_emulated
from pipespec.runners.base import Row, TailToken, TreeRow
from pipespec.worker_spec import StageSpec

LENGTHS: Final = (1, 2, 3, 4, 6, 8, 12, 16, 24, LONGEST)
BRANCHING_LENGTHS: Final = (1, 2, 3, 4, 6, 8, 12, 16, 24)
NUM_RANKED: Final = 1 + MOST_OUTCOMES
_TAIL_GAP: Final = 64  # cache rows between a text and its branches
_TABLE_S: Final = 0.6  # for each table of step times
_TOGETHER_S: Final = 0.25
_ROUNDS: Final = 3  # of two models alone and beside each other
_VERIFIED: Final = 5  # tokens in a forward of a model that verifies, where one must do for all
_NEAR: Final = 1.15  # context lengths that differ by less have the same step times

OnPart = Callable[[str], None]
Keep = Callable[[Profile], None]


@dataclass(frozen=True, slots=True)
class Job:
    """What is to be measured. prompts: token ids."""

    hierarchy: Hierarchy
    prompts: tuple[tuple[int, ...], ...]
    generation: GenerationParams
    transport: str
    ready_timeout_s: float

    def part_names(self) -> list[str]:
        """All that a complete profile has, in the order in which it is measured."""
        count = len(self.hierarchy.models)
        drafts = [
            chosen for size in range(1, count) for chosen in combinations(range(count - 1), size)
        ]
        running = [
            *("greedy", "in-chain", "hop"),
            *("/".join(map(str, ("async", *chosen, count - 1))) for chosen in drafts),
        ]
        if is_emulated(self.hierarchy.models):
            return running
        return [*self._parts_of_models(), *running]

    def _parts_of_models(self) -> list[str]:
        count = len(self.hierarchy.models)
        return [
            *(f"model/{index}" for index in range(count)),
            *(f"chain/{index}" for index in range(count) if self.runs_elsewhere_in_chain(index)),
            *(f"text/{number}" for number in range(len(self.prompts))),
            *(f"draws/{index}" for index in range(count - 1)),
            *(f"beside/{one}/{other}" for one, other in combinations(range(count), 2)),
        ]

    def runs_elsewhere_in_chain(self, index: int) -> bool:
        """On the CPU, `chain` has all models on the target's cores; as many cores as the stage's
        own are as good as its own."""
        own, target = self.hierarchy.placements[index], self.hierarchy.placements[-1]
        if own.device != "cpu" or target.device != "cpu":
            return False
        return (len(own.cores), own.threads) != (len(target.cores), target.threads)

    def some_text(self, length: int) -> list[int]:
        """Some text of so many tokens."""
        ids = max(self.prompts, key=len)
        return [ids[n % len(ids)] for n in range(length)]

    def contexts(self) -> list[int]:
        """Text lengths at which step times are taken: the shortest prompt, the longest text, and
        between them."""
        lengths = [len(ids) for ids in self.prompts]
        low = min(lengths)
        high = min(max(lengths) + self.generation.max_new_tokens, self.hierarchy.context_length)
        found = [low]
        for length in ((low + high) // 2, high):
            if length > _NEAR * found[-1]:
                found.append(length)
        return found


def measure(job: Job, profile: Profile, keep: Keep, on_part: OnPart) -> None:
    """Adds to the profile what it lacks.

    keep: called with the profile after each part. on_part: told what was measured.

    Raises:
        UsageError: a model that cannot be loaded.
        StageError: a process failed or did not answer.
    """
    with Meters() as meters:
        work = _Measurement(job, profile.parts, meters)
        for name in job.part_names():
            if name not in profile.parts:
                start_s = time.monotonic()
                profile.parts[name] = work.part(name)
                profile.measuring_s += time.monotonic() - start_s
                keep(profile)
                on_part(name)


class _Measurement:
    """One call of `measure`; its methods return plain JSON values, the parts of a profile."""

    def __init__(self, job: Job, parts: dict[str, Any], meters: Meters) -> None:
        self._job = job
        self._parts = parts
        self._meters = meters
        self._loaded: list[tuple[MeterProcess, dict[str, Any]]] = []

    def part(self, name: str) -> Any:
        """Measures one of `Job.part_names`."""
        kind, *numbers = name.split("/")
        parts: dict[str, Callable[..., Any]] = {
            "model": self._model,
            "chain": self._chain_times,
            "text": self._text,
            "draws": self._draws,
            "beside": self._beside,
            "greedy": lambda: asdict(self._runs().greedy()),
            "in-chain": lambda: [asdict(cost) for cost in self._runs().chain()],
            "hop": lambda: self._runs().hop_s(),
            "async": self._pipeline,
        }
        return parts[kind](*map(int, numbers))

    # -- processes --------------------------------------------------------------------------

    def _models(self) -> list[tuple[MeterProcess, dict[str, Any]]]:
        """All models and their runners' facts, loaded when the first is asked for, at once, as a
        run does."""
        if not self._loaded:
            indexes = range(len(self._job.hierarchy.models))
            self._loaded = self._load([self._stage(index) for index in indexes])
        return self._loaded

    def _load(self, stages: Sequence[StageSpec]) -> list[tuple[MeterProcess, dict[str, Any]]]:
        hierarchy, processes = self._job.hierarchy, [self._meters.start(x) for x in stages]
        for process in processes:
            process.load(
                vocab_size=hierarchy.vocab_size,
                context_length=hierarchy.context_length + LONGEST,
            )
        return [(process, process.receive(self._job.ready_timeout_s)) for process in processes]

    def _stage(self, index: int) -> StageSpec:
        hierarchy = self._job.hierarchy
        folder, tokenizer_folder = hierarchy.folders[index], hierarchy.tokenizer_folders[index]
        return StageSpec(
            hierarchy.models[index],
            hierarchy.placements[index],
            None if folder is None else str(folder),
            None if tokenizer_folder is None else str(tokenizer_folder),
        )

    # -- parts ------------------------------------------------------------------------------

    def _model(self, index: int) -> dict[str, Any]:
        process, info = self._models()[index]
        return {**info, **self._times(process, info)}

    def _chain_times(self, index: int) -> dict[str, Any]:
        there = self._job.hierarchy.placements[-1]
        ((process, info),) = self._load([replace(self._stage(index), placement=there)])
        times = self._times(process, info)
        process.hang_up()
        return times

    def _times(self, process: MeterProcess, info: dict[str, Any]) -> dict[str, Any]:
        """Tables of milliseconds: of decode steps and of those with branches by context and number
        of rows, of prompts by length."""
        job, most = self._job, int(info["context_length"])
        can_branch = info["num_tail_rows"] >= _TAIL_GAP + max(BRANCHING_LENGTHS)
        decode, branching = [], []
        for at in sorted({max(1, min(at, most - LONGEST)) for at in job.contexts()}):
            ids = job.some_text(at)
            rows = {n: self._row(at, n, n) for n in LENGTHS if at + n <= most}
            decode.append((at, _table(process, ids, rows)))
            if can_branch:
                trees = {n: self._tree(at, n) for n in BRANCHING_LENGTHS}
                branching.append((at, _table(process, ids, trees)))
        lengths = sorted(min(len(ids), most) for ids in job.prompts)
        lengths = [lengths[0], lengths[len(lengths) // 2], lengths[-1]]
        prefill = _table(process, (), {n: self._row(0, n, 1) for n in lengths})
        return {"decode": decode, "branching": branching, "prefill": prefill}

    def _row(self, start: int, length: int, num_draws: int) -> Row:
        return Row(0, start, self._job.some_text(length), num_draws, SamplingParams())

    def _tree(self, start: int, length: int) -> TreeRow:
        """One token of the text and the others as its possible successors."""
        tail = [
            TailToken(token, start + 1, start + _TAIL_GAP + number, start)
            for number, token in enumerate(self._job.some_text(length - 1))
        ]
        return TreeRow(self._row(start, 1, 1), tail, num_ranked=NUM_RANKED)

    def _text(self, number: int) -> dict[str, Any]:
        """What the target writes after a prompt."""
        hierarchy, generation = self._job.hierarchy, self._job.generation
        prompt = self._job.prompts[number]
        limit = min(generation.max_new_tokens, hierarchy.context_length + 1 - len(prompt))
        submit = Submit(0, prompt, (), generation.sampling, limit, hierarchy.eos, generation.stop)
        process, _ = self._models()[-1]
        return {"prompt": prompt, "tokens": process.ask("write", submit=submit)}

    def _draws(self, index: int) -> list[Any]:
        """A draft's first choices at every position of the target's texts: whether it is right, and
        where it is not, on which rank the right token stands."""
        process, _ = self._models()[index]
        return [
            process.ask(
                "draws",
                prompt=text.prompt,
                tokens=text.tokens,
                sampling=self._job.generation.sampling,
                num_ranked=NUM_RANKED,
            )
            for text in texts_of(self._parts)
        ]

    def _beside(self, *pair: int) -> list[float]:
        """How many times as long forwards of two models take while the other one computes."""
        middle = self._job.contexts()[len(self._job.contexts()) // 2]
        processes = [self._models()[index][0] for index in pair]
        questions: list[dict[str, Any]] = []
        for index in pair:
            room = self._parts[f"model/{index}"]["context_length"] - _VERIFIED
            at, length = max(1, min(middle, room)), 1 if index == 0 else _VERIFIED
            forward, ids = self._row(at, length, length), self._job.some_text(at)
            questions.append({"ids": ids, "forward": forward, "seconds": _TOGETHER_S})
        alone: list[list[float]] = []
        beside: list[list[float]] = []
        for _ in range(_ROUNDS):
            asked = list(zip(processes, questions))
            alone.append([process.ask("mean_ms", **question) for process, question in asked])
            for process, question in asked:
                process.send("mean_ms", **question)
            beside.append([process.receive() for process in processes])
        return [
            round(max(1.0, median(slow) / median(fast)), 4)
            for slow, fast in zip(zip(*beside), zip(*alone))
        ]

    def _pipeline(self, *stages: int) -> dict[int, list[dict[str, float]]]:
        """What async-chain of these models adds, without prepared outcomes and with most."""
        runs = self._runs()
        can_branch = any(runs.models[stage].num_tail_rows for stage in stages[:-1])
        return {
            outcomes: [asdict(cost) for cost in runs.pipeline(stages, outcomes)]
            for outcomes in ((0, MOST_OUTCOMES) if can_branch else (0,))
        }

    def _runs(self) -> Runs:
        """Short runs of the strategies, now that all models were measured alone."""
        self._meters.close()  # room for the models that run
        self._loaded = []
        job = self._job
        return Runs(
            job.hierarchy,
            plan_models(self._parts, job.hierarchy.models, job.hierarchy.vocab_size),
            job.prompts,
            job.generation,
            job.transport,
            job.ready_timeout_s,
        )


def _table(
    process: MeterProcess, ids: Sequence[int], forwards: Mapping[int, Row | TreeRow]
) -> list[tuple[int, float]]:
    """Milliseconds of forwards by their number of rows, after the text `ids`."""
    asked = list(forwards.values())
    found = process.ask("medians_ms", ids=ids, forwards=asked, budget_s=_TABLE_S)
    return [(n, round(ms, 5)) for n, ms in zip(forwards, found, strict=True)]
