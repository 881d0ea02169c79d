"""Which runs stand in one table, which greedy run they are compared with, and which are shown.

Runs of a group have the data set, the target and all else that decides the text in common.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipespec.errors import DataError
from pipespec.metrics import Comparison, SampleTotals, Summary, speed_up, summarise
from pipespec.results import RunExtract
from pipespec.results.labels import (
    comparison_key,
    dataset_name,
    lookahead_text,
    model_names,
    run_order,
    short_names,
    stage_devices,
)

Run = RunExtract[SampleTotals]


@dataclass(frozen=True, slots=True)
class Compared:
    """A run beside greedy's of the same group. baseline: None if there is none; greedy's is
    itself. comparison: None without a baseline."""

    run: Run
    summary: Summary
    baseline: Summary | None
    comparison: Comparison | None


@dataclass(frozen=True, slots=True)
class Group:
    """The runs of a table, in its order."""

    dataset: str
    target: str
    text_settings: str
    runs: tuple[Compared, ...]

    @property
    def title(self) -> str:
        """What all of them have in common."""
        return ", ".join(filter(None, (self.dataset, f"target {self.target}", self.text_settings)))

    @property
    def about(self) -> dict[str, str]:
        """The same by name, for programs."""
        return {
            "dataset": self.dataset,
            "target": self.target,
            "text_settings": self.text_settings,
        }

    @property
    def short_names(self) -> dict[str, str]:
        """Of its models."""
        return short_names(item.run.metadata for item in self.runs)

    @property
    def folders(self) -> tuple[Path, ...]:
        """Where the runs come from."""
        return tuple(dict.fromkeys(item.run.path.parent for item in self.runs))


def group_runs(runs: Iterable[Run]) -> list[Group]:
    """Every run in its group, groups by name."""
    by_key: dict[tuple[str, str, str], list[Run]] = {}
    for run in runs:
        by_key.setdefault(comparison_key(run.metadata), []).append(run)
    return [_group(key, by_key[key]) for key in sorted(by_key)]


def only_dataset(runs: Sequence[Run], name: str | None) -> list[Run]:
    """The runs on a data set; all of them without a name.

    Raises:
        DataError: there are none.
    """
    found = [run for run in runs if name is None or dataset_name(run.metadata) == name]
    if not found:
        known = sorted({dataset_name(run.metadata) for run in runs})
        raise DataError(f"--dataset is {name}; the files are of {', '.join(known)}")
    return found


def best_lookaheads(runs: Sequence[Compared]) -> tuple[Compared, ...]:
    """Of runs that differ in nothing but their lookahead, the one with the least time per token,
    and every run whose lookahead was chosen by the policy. Runs in different folders differ."""
    best: dict[tuple[object, ...], Compared] = {}
    for item in runs:
        metadata = item.run.metadata
        mode = "auto" if lookahead_text(metadata) == "auto" else "fixed"
        key = (item.run.path.parent, metadata["strategy"], model_names(metadata), mode)
        if key not in best or _seconds(item) < _seconds(best[key]):
            best[key] = item
    chosen = {item.run.path for item in best.values()}
    return tuple(item for item in runs if item.run.path in chosen)


def devices_of(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """Indexes of the devices that held the models of a run, in the lists of `gpustats`; none where
    one of them is not known."""
    stages = stage_devices(metadata)
    return tuple(sorted({index for stage in stages for index in stage})) if all(stages) else ()


def _group(key: tuple[str, str, str], runs: Sequence[Run]) -> Group:
    ordered = sorted(runs, key=lambda run: (*run_order(run.metadata), str(run.path)))
    greedy = [run for run in ordered if run.metadata["strategy"] == "greedy"]
    return Group(*key, tuple(_compared(run, greedy) for run in ordered))


def _compared(run: Run, greedy: Sequence[Run]) -> Compared:
    """The greedy run of the same folder is the one to compare with, if it has one."""
    summary = summarise(run.samples)
    if run.metadata["strategy"] == "greedy":
        return Compared(run, summary, summary, speed_up(run.samples, run.samples))
    near = [other for other in greedy if other.path.parent == run.path.parent]
    chosen = next(iter([*near, *greedy]), None)
    if chosen is None:
        return Compared(run, summary, None, None)
    return Compared(run, summary, summarise(chosen.samples), speed_up(run.samples, chosen.samples))


def _seconds(item: Compared) -> float:
    """Of a token, for sorting."""
    seconds = item.summary.time_per_token_s
    return float("inf") if seconds is None else seconds
