"""What the report keeps of result files, in bounded memory: of every sample the numbers, of the
first ones of each run also the texts and who wrote which token.

Numbers are made by `pipespec.metrics` from what is kept, exactly as from the whole file.
"""

from __future__ import annotations

import hashlib
import re
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pipespec.errors import DataError, NothingLeftError
from pipespec.metrics import Comparison, Summary, energy_estimate_j, speed_up, summarise
from pipespec.metrics.definitions import energy_per_token, ratio, speed_up_ratio
from pipespec.reporting.verifications import (
    Curve,
    Verifications,
    curve,
    is_estimated,
    verifications,
)
from pipespec.results import read_run
from pipespec.results.labels import comparison_key, model_names, run_order
from pipespec.results.streaming import read_metadata

Result = Mapping[str, Any]
Metadata = Mapping[str, Any]

MAX_TEXT: Final = 20_000  # characters of a text on the page
MAX_POINTS: Final = 150  # of a curve
# Of `metrics`, what `summarise` reads and a list over steps does not hold.
_NUMBERS: Final = (
    *("total_time", "tokens_generated", "time_to_first_token_s", "forward_times_s", "energy_j"),
    *("num_accepted", "num_offered", "num_rolled_back", "num_past_end", "num_drafted"),
    *("num_outcome_hits", "num_corrections", "first_divergence", "divergence_margin"),
)
# Runs whose texts may be compared agree in these.
_TEXT_KEYS: Final = ("sampling", "max_new_tokens", "stop", "generation_prompt")


@dataclass(frozen=True, slots=True)
class Detail:
    """A sample as the page shows it. Texts are cut at `MAX_TEXT`; token_lengths: characters of
    each token, None where the file does not hold them. is_estimated: the times of `curve` are.
    utilization: (seconds, percent of each device)."""

    prompt: str
    text: str
    num_characters: int
    finish_reason: str | None
    token_lengths: list[int] | None
    written: Verifications | None
    curve: Curve
    is_estimated: bool
    utilization: list[tuple[float, list[float]]]


@dataclass(frozen=True, slots=True)
class Sample:
    """result: what `metrics` needs of an item of `results`, with digests in place of its texts and
    the means over time in place of its `gpustats`."""

    result: dict[str, Any]
    detail: Detail | None


@dataclass(frozen=True, slots=True)
class Run:
    """A result file."""

    path: Path
    metadata: dict[str, Any]
    samples: tuple[Sample, ...]

    @property
    def results(self) -> list[dict[str, Any]]:
        return [sample.result for sample in self.samples]

    @property
    def summary(self) -> Summary:
        return summarise(self.results)


@dataclass(frozen=True, slots=True)
class Row:
    """A run among those with its data set and target. published_speed_up: over all samples of
    greedy and all of the run, whichever they are; utilization: percent, the mean over devices and
    samples. greedy: its baseline, itself for greedy; None without one."""

    run: Run
    summary: Summary
    greedy: Run | None
    comparison: Comparison | None
    published_speed_up: float | None
    energy_per_token_j: float | None
    utilization: float | None


@dataclass(frozen=True, slots=True)
class Group:
    """The runs of one data set and target, in `run_order`."""

    dataset: str
    target: str
    rows: tuple[Row, ...]

    def best(self) -> list[Row]:
        """The fastest run of each strategy and models, in the order of `rows`."""
        fastest: dict[tuple[str, ...], Row] = {}
        for row in self.rows:
            key = (row.run.metadata["strategy"], *model_names(row.run.metadata))
            if key not in fastest or _speed(row) > _speed(fastest[key]):
                fastest[key] = row
        return list(fastest.values())


def read_report_runs(
    files: Sequence[Path],
    max_samples: int,
    on_skip: Callable[[str], None],
    on_file: Callable[[str], None],
) -> list[Run]:
    """The runs of these files, in `run_order`; files that cannot be used are passed over.

    Args:
        max_samples: of each run whose texts are kept.
        on_skip: is told in one line which file is passed over, and why.
        on_file: is told the name of each file when it is done.

    Raises:
        NothingLeftError: none of them could be used.
    """
    runs: list[Run] = []
    for path in files:
        try:
            metadata = read_metadata(path)
            run = read_run(path, _Keeper(metadata, max_samples))
            runs.append(Run(path, metadata, run.samples))
        except DataError as error:
            on_skip(f"passed over: {error}")
        on_file(path.name)
    if not runs:
        raise NothingLeftError(
            f"none of {len(files)} files could be used; pass a folder of result files"
        )
    return sorted(runs, key=lambda run: run_order(run.metadata))


def grouped(runs: Sequence[Run]) -> list[Group]:
    """The runs by data set and target."""
    by_key: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        by_key.setdefault(comparison_key(run.metadata), []).append(run)
    return [
        Group(dataset, target, tuple(_row(run, members) for run in members))
        for (dataset, target), members in sorted(by_key.items())
    ]


def gpus_of(metadata: Metadata) -> tuple[int, ...]:
    """The numbers of the CUDA devices that the run's models had."""
    models = metadata["model_configs"]
    models = models[-1:] if metadata["strategy"] == "greedy" else models
    names: list[str] = []
    for model in models:
        devices = model.get("devices")
        names += [devices] if isinstance(devices, str) else devices or []
    found = (re.fullmatch(r"cuda(?::(\d+))?", str(name)) for name in names)
    return tuple(sorted({int(match[1] or 0) for match in found if match}))


class _Keeper:
    """What is kept of each sample of one file: the details of the first ones only."""

    def __init__(self, metadata: Metadata, num_details: int) -> None:
        self._has_branches = bool(metadata.get("tree"))
        self._num_left = num_details

    def __call__(self, result: Result) -> Sample:
        detail = _detail(result, self._has_branches) if self._num_left > 0 else None
        self._num_left -= 1
        return Sample(_numbers(result), detail)


def _numbers(result: Result) -> dict[str, Any]:
    metrics = result["metrics"]
    kept = {key: metrics[key] for key in _NUMBERS if key in metrics}
    kept["num_target_forwards"] = summarise([result]).num_target_forwards
    if "accepted_tokens" in metrics:
        kept["accepted_tokens"] = [array("I", counts) for counts in metrics["accepted_tokens"]]
    return {
        "sample_index": result["sample_index"],
        "metrics": kept,
        "output_text": _digest(result["output_text"]),
        "input_text": _digest(result["input_text"]),
        "gpustats": _means(result.get("gpustats") or []),
    }


def _detail(result: Result, has_branches: bool) -> Detail:
    metrics, text = result["metrics"], result["output_text"]
    utilization = [
        (stats["timestamp"], stats["gpu_utilizations"])
        for stats in result.get("gpustats") or []
        if "timestamp" in stats and stats.get("gpu_utilizations")
    ]
    return Detail(
        prompt=result["input_text"][:MAX_TEXT],
        text=text[:MAX_TEXT],
        num_characters=len(text),
        finish_reason=result.get("finish_reason"),
        token_lengths=result.get("token_lengths"),
        written=verifications(metrics, has_branches=has_branches),
        curve=_thinned(curve(metrics)),
        is_estimated=is_estimated(metrics),
        utilization=_thinned(utilization),
    )


def _means(gpustats: Sequence[Mapping[str, Any]]) -> list[dict[str, list[float | None]]]:
    """One item with the mean over time of each device's power and utilization; None for a device
    that was never read."""
    means = {}
    for key in ("gpu_powers", "gpu_utilizations"):
        rows = [stats.get(key) or () for stats in gpustats]
        columns = [
            [row[device] for row in rows if device < len(row) and row[device] is not None]
            for device in range(max(map(len, rows), default=0))
        ]
        if columns:
            means[key] = [ratio(sum(column), len(column)) for column in columns]
    return [means] if means else []


def _row(run: Run, members: Sequence[Run]) -> Row:
    summary, greedy = run.summary, _baseline(run, members)
    greedy_summary = None if greedy is None else greedy.summary
    times = (greedy_summary and greedy_summary.time_per_token_s, summary.time_per_token_s)
    return Row(
        run=run,
        summary=summary,
        greedy=greedy,
        comparison=None if greedy is None else speed_up(run.results, greedy.results),
        published_speed_up=None if None in times else speed_up_ratio(*times),  # type: ignore[arg-type]
        energy_per_token_j=_energy_per_token_j(run, summary),
        utilization=_utilization(run),
    )


def _baseline(run: Run, members: Sequence[Run]) -> Run | None:
    """The greedy run whose texts should be the run's; itself for greedy."""
    if run.metadata["strategy"] == "greedy":
        return run
    for member in members:
        is_alike = all(run.metadata.get(key) == member.metadata.get(key) for key in _TEXT_KEYS)
        if member.metadata["strategy"] == "greedy" and is_alike:
            return member
    return None


def _energy_per_token_j(run: Run, summary: Summary) -> float | None:
    """By counter; else from the power samples of the run's own GPUs."""
    if summary.energy_per_token_j is not None:
        return summary.energy_per_token_j
    gpus = gpus_of(run.metadata)
    if not gpus or any(_device_means(result, "gpu_powers", gpus) is None for result in run.results):
        return None
    energy_j = energy_estimate_j(run.results, gpus)
    return None if energy_j is None else energy_per_token(energy_j, summary.num_tokens)


def _utilization(run: Run) -> float | None:
    """Mean percent over the run's GPUs (all devices that were sampled, if it had none) and its
    time."""
    gpus, total, seconds = gpus_of(run.metadata), 0.0, 0.0
    for result in run.results:
        means = _device_means(result, "gpu_utilizations", gpus)
        if means:
            time_s = result["metrics"]["total_time"]
            total += time_s * sum(means) / len(means)
            seconds += time_s
    return ratio(total, seconds)


def _device_means(result: Result, key: str, gpus: Sequence[int]) -> list[float] | None:
    """Of these GPUs, or of all devices for none; None unless all are known."""
    means = result["gpustats"][0].get(key, []) if result["gpustats"] else []
    if gpus and len(means) <= gpus[-1]:
        return None
    chosen = [means[gpu] for gpu in gpus] if gpus else means
    return None if None in chosen else chosen


def _speed(row: Row) -> float:
    return row.summary.tokens_per_s or 0.0


def _thinned(points: list[Any]) -> list[Any]:
    """Evenly spaced items, at most `MAX_POINTS` and the last."""
    step = -(-len(points) // MAX_POINTS)
    return points if step <= 1 else [*points[:-1:step], points[-1]]


def _digest(text: str) -> str:
    """Stands for a text where only its equality counts."""
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).hexdigest()
