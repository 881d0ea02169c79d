"""What the report keeps of result files, in bounded memory: of every sample the numbers, of the
first ones of each run also the texts and who wrote which token.

Numbers, groups and baselines are those of `pipespec.statistics`; here stands what only a page can
show.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from pipespec.metrics.definitions import ratio
from pipespec.reporting.verifications import (
    Curve,
    Verifications,
    curve,
    is_estimated,
    verifications,
)
from pipespec.results import RunExtract
from pipespec.results.labels import model_names, stage_devices
from pipespec.statistics.accepted import AcceptedSample, accepted_sample
from pipespec.statistics.groups import Compared, Group, best_lookaheads, devices_of, group_runs

T = TypeVar("T")
Result = Mapping[str, Any]
Metadata = Mapping[str, Any]

MAX_TEXT: Final = 20_000  # characters of a text on the page
MAX_POINTS: Final = 150  # of a curve


@dataclass(frozen=True, slots=True)
class Detail:
    """A sample as the page shows it. Texts are cut at `MAX_TEXT`; token_lengths: characters of
    each token, None where the file does not hold them. is_estimated: the times of `curve` are.
    utilization: (seconds, percent of each device)."""

    prompt: str
    text: str
    num_characters: int
    finish_reason: str | None
    divergence: int | None
    margin: float | None
    token_lengths: list[int] | None
    written: Verifications | None
    curve: Curve
    is_estimated: bool
    utilization: list[tuple[float, list[float | None]]]


@dataclass(frozen=True, slots=True)
class Sample:
    """detail: None for samples that the page shows the numbers of only."""

    accepted: AcceptedSample
    detail: Detail | None


@dataclass(frozen=True, slots=True)
class Run:
    """A result file, compared with greedy's, and its samples."""

    compared: Compared
    samples: tuple[Sample, ...]

    @property
    def path(self) -> Path:
        return self.compared.run.path

    @property
    def metadata(self) -> dict[str, Any]:
        return self.compared.run.metadata

    @property
    def is_greedy(self) -> bool:
        return bool(self.metadata["strategy"] == "greedy")

    @property
    def tokens_per_s(self) -> float:
        return self.compared.summary.tokens_per_s or 0.0

    @property
    def emitted(self) -> Counter[int]:
        """How many verifications by the target brought how many tokens."""
        total: Counter[int] = Counter()
        for sample in self.samples:
            total.update(sample.accepted.emitted[-1] if sample.accepted.emitted else {})
        return total

    @property
    def utilization(self) -> float | None:
        """Percent: the mean over the run's devices and its time; None if it is not known."""
        devices, weighted, seconds = devices_of(self.metadata), 0.0, 0.0
        for sample in self.samples:
            totals = sample.accepted.totals
            means = dict(enumerate(totals.gpu_utilizations))
            known = [mean for place in devices if (mean := means.get(place)) is not None]
            if known:
                weighted += totals.total_time_s * sum(known) / len(known)
                seconds += totals.total_time_s
        return ratio(weighted, seconds)


@dataclass(frozen=True, slots=True)
class RunGroup:
    """Runs that can be compared, and what they have in common. shown: those that pictures show,
    the fastest lookahead of each hierarchy."""

    group: Group
    runs: tuple[Run, ...]
    shown: tuple[Run, ...]

    def greedy_of(self, run: Run) -> Run | None:
        """What a run is compared with."""
        baseline = run.compared.baseline
        found = (other for other in self.runs if other.is_greedy)
        return next((other for other in found if other.compared.summary == baseline), None)


class Keeper:
    """What is kept of each sample: the details of the first `num_details` of each file only."""

    def __init__(self, num_details: int) -> None:
        self._num_details = num_details
        self._num_left = 0

    def on_file(self, _path: Path) -> None:
        """The next file begins."""
        self._num_left = self._num_details

    def __call__(self, result: Result) -> Sample:
        """Of an item of `results`.

        Raises:
            KeyError, TypeError, ValueError, IndexError: it is not what a result file has.
        """
        detail = _detail(result) if self._num_left > 0 else None
        self._num_left -= 1
        return Sample(accepted_sample(result), detail)


def group_samples(runs: Sequence[RunExtract[Sample]]) -> list[RunGroup]:
    """The runs by what they can be compared in."""
    samples = {run.path: run.samples for run in runs}
    totals = [
        RunExtract(run.path, run.metadata, tuple(item.accepted.totals for item in run.samples))
        for run in runs
    ]
    groups = []
    for group in group_runs(totals):
        members = {item.run.path: Run(item, samples[item.run.path]) for item in group.runs}
        shown = tuple(members[item.run.path] for item in best_lookaheads(group.runs))
        groups.append(RunGroup(group, tuple(members.values()), shown))
    return groups


def device_names(metadata: Metadata, num_devices: int) -> list[str]:
    """What the devices in the lists of `gpustats` are called: kind, and the models on it. The
    original's are GPUs."""
    monitor = metadata.get("monitor")
    known = monitor.get("devices") if isinstance(monitor, Mapping) else None
    kinds = known if isinstance(known, list) else []
    stages = list(zip(model_names(metadata), stage_devices(metadata)))
    names = []
    for place in range(num_devices):
        device = kinds[place] if place < len(kinds) else None
        kind = str(device.get("kind")) if isinstance(device, Mapping) else "gpu"
        models = [name for name, devices in stages if place in devices]
        of = ", ".join(models) or ("no model" if kind == "gpu" else "all")
        names.append(f"{f'GPU {place}' if kind == 'gpu' else kind}: {of}")
    return names


def _detail(result: Result) -> Detail:
    metrics, text = result["metrics"], result["output_text"]
    return Detail(
        prompt=result["input_text"][:MAX_TEXT],
        text=text[:MAX_TEXT],
        num_characters=len(text),
        finish_reason=result.get("finish_reason"),
        divergence=metrics.get("first_divergence"),
        margin=metrics.get("divergence_margin"),
        token_lengths=_token_lengths(result),
        written=verifications(metrics),
        curve=_thinned([(round(at_s, 3), count) for at_s, count in curve(metrics)]),
        is_estimated=is_estimated(metrics),
        utilization=_thinned(_utilization(result["gpustats"])),
    )


def _token_lengths(result: Result) -> list[int] | None:
    """None unless they divide the text."""
    lengths = result.get("token_lengths")
    if not isinstance(lengths, list) or not all(type(n) is int and n >= 0 for n in lengths):
        return None
    return lengths if sum(lengths) == len(result["output_text"]) else None


def _utilization(gpustats: Sequence[Any]) -> list[tuple[float, list[float | None]]]:
    """Of the readings that have one."""
    found = []
    for stats in gpustats:
        if isinstance(stats, Mapping):
            at_s, values = stats.get("timestamp"), stats.get("gpu_utilizations")
            if isinstance(at_s, int | float) and isinstance(values, list) and values:
                found.append((round(at_s, 2), values))
    return found


def _thinned(points: list[T]) -> list[T]:
    """Evenly spaced items, at most `MAX_POINTS` and the last."""
    step = -(-len(points) // MAX_POINTS)
    return points if step <= 1 else [*points[:-1:step], points[-1]]
