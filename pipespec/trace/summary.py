"""What a trace says in numbers: where the time of each stage went, and how long messages took."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, Final

from pipespec.trace.chrome import GROUP_SIZE, SAMPLES
from pipespec.trace.events import APPLY, DECIDE, FORWARDS, ROLLBACK, WAIT

Item = Mapping[str, Any]
Span = tuple[float, float]  # microseconds, from and to

RECEIVE: Final = "receive"
SEND: Final = "send"
LOOP: Final = "loop"
OTHERS: Final = "others"
KINDS: Final = (*FORWARDS, WAIT, DECIDE, APPLY, SEND, RECEIVE, OTHERS, LOOP)


@dataclass(frozen=True, slots=True)
class StageSummary:
    """One stage while samples were written.

    seconds: by kind, those of `KINDS`; "others" is what the other models did in the same process,
    "loop" what is left: sockets looked at, frames decoded, whatever else ran on the core.
    num_*: sums of what its events say.
    """

    name: str
    total_s: float
    seconds: Mapping[str, float]
    num_forwards: int
    num_offered: int
    num_accepted: int
    num_emitted: int
    num_prepared: int
    num_rollbacks: int
    num_rolled_back: int

    def share(self, kind: str) -> float:
        """Of the stage's time."""
        return self.seconds[kind] / self.total_s if self.total_s else 0.0


@dataclass(frozen=True, slots=True)
class StrategySummary:
    """transit_ms: from the sending of a message to where its receiver acts on it: median and 99th
    percentile by kind of message."""

    strategy: str
    num_samples: int
    stages: tuple[StageSummary, ...]
    transit_ms: Mapping[str, tuple[float, float]]


def summarise(content: Mapping[str, Any]) -> list[StrategySummary]:
    """Of a trace that `read_trace` read: one a strategy. Of time between samples, and of a warm-up,
    nothing is counted, unless there is nothing else."""
    events = content["traceEvents"]
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    by_process: dict[int, list[Item]] = defaultdict(list)
    for event in events:
        if event["ph"] != "M":
            by_process[event["pid"]].append(event)
    found = []
    for group in sorted({process // GROUP_SIZE for process in names}):
        first = group * GROUP_SIZE
        stages = {p: name for p, name in sorted(names.items()) if first < p < first + GROUP_SIZE}
        strategy = names.get(first, "?").removesuffix(f": {SAMPLES}")
        spans = sample_spans(by_process[first]) or _whole(by_process, stages)
        found.append(
            StrategySummary(
                strategy,
                len(spans),
                _turns(strategy, [_stage(n, by_process[p], spans) for p, n in stages.items()]),
                _transits([event for p in stages for event in by_process[p]], spans),
            )
        )
    return found


def sample_spans(events: Iterable[Item]) -> list[Span]:
    """When samples were written, from the events of their row; without a warm-up."""
    return [
        (event["ts"], event["ts"] + event["dur"])
        for event in events
        if event["ph"] == "X" and event["name"].startswith("sample ")
    ]


def _whole(by_process: Mapping[int, Sequence[Item]], stages: Iterable[int]) -> list[Span]:
    ends = [
        (event["ts"], event["ts"] + event.get("dur", 0.0))
        for process in stages
        for event in by_process[process]
    ]
    return [(min(ends)[0], max(end for _, end in ends))] if ends else []


def _stage(name: str, events: Sequence[Item], spans: Sequence[Span]) -> StageSummary:
    micros: dict[str, float] = dict.fromkeys(KINDS, 0.0)
    totals: Counter[str] = Counter()
    begins = [event["ts"] for event in events]  # in order, and slices of a loop follow each other
    for start, end in spans:
        micros[LOOP] += end - start
        first = max(0, bisect_left(begins, start) - 1)
        for event in events[first : bisect_right(begins, end)]:
            inside = min(event["ts"] + event.get("dur", 0.0), end) - max(event["ts"], start)
            if inside < 0 or event["ph"] not in "Xi":
                continue
            kind = event["name"].partition(" ")[0]
            if event["ph"] == "X":
                micros[kind] += inside
                micros[LOOP] -= inside
            totals.update(_totals(kind, event["args"]))
    return StageSummary(
        name.partition(": ")[2] or name,
        sum(end - start for start, end in spans) / 1e6,
        {kind: time / 1e6 for kind, time in micros.items()},
        num_forwards=totals["forwards"],
        num_offered=totals["offered"],
        num_accepted=totals["accepted"],
        num_emitted=totals["emitted"],
        num_prepared=totals["prepared"],
        num_rollbacks=totals["rollbacks"],
        num_rolled_back=totals["rolled_back"],
    )


def _turns(strategy: str, stages: Sequence[StageSummary]) -> tuple[StageSummary, ...]:
    """The models of a chain share a process and take turns."""
    if not strategy.startswith("chain"):
        return tuple(stages)
    busy_s = [stage.total_s - stage.seconds[LOOP] for stage in stages]
    others_s = [sum(busy_s) - own_s for own_s in busy_s]
    return tuple(
        replace(
            stage,
            seconds={**stage.seconds, OTHERS: other_s, LOOP: stage.seconds[LOOP] - other_s},
        )
        for stage, other_s in zip(stages, others_s)
    )


def _totals(kind: str, args: Mapping[str, Any]) -> dict[str, int]:
    if kind == ROLLBACK:
        return {"rollbacks": 1, "rolled_back": args["tokens"]}
    if kind not in FORWARDS or args.get("after_end"):  # the text was done, as in `metrics`
        return {}
    counts = {key: args.get(key, 0) for key in ("offered", "accepted", "emitted", "prepared")}
    if not counts["emitted"]:  # overtaken: what it was offered was not judged, as in `metrics`
        counts["offered"] = 0
    return {**counts, "forwards": args.get("forwards", 1)}


def _transits(events: Iterable[Item], spans: Sequence[Span]) -> dict[str, tuple[float, float]]:
    ends: dict[Any, dict[str, Item]] = defaultdict(dict)
    spans = sorted(spans)
    for event in events:
        before = bisect_right(spans, (event["ts"], math.inf))
        is_inside = before > 0 and event["ts"] <= spans[before - 1][1]
        if event["ph"] in "sf" and is_inside:
            ends[event["id"]][event["ph"]] = event
    times: dict[str, list[float]] = defaultdict(list)
    for pair in ends.values():
        if len(pair) == 2:
            times[pair["s"]["name"]].append((pair["f"]["ts"] - pair["s"]["ts"]) / 1000)
    return {
        name: (median(found), sorted(found)[int(0.99 * len(found))])
        for name, found in sorted(times.items())
    }


def table(summary: StrategySummary) -> list[str]:
    """A summary as lines of text."""
    kinds = [k for k in KINDS if any(stage.seconds[k] > 0 for stage in summary.stages)]
    head = ["% of the time", *kinds, "forwards", "accepted", "rolled back"]
    rows = [head] + [
        [
            stage.name,
            *(f"{100 * stage.share(kind):.1f}" for kind in kinds),
            f"{stage.num_forwards:,}",
            f"{stage.num_accepted:,}/{stage.num_offered:,}" if stage.num_offered else "-",
            f"{stage.num_rolled_back:,} in {stage.num_rollbacks:,}" if stage.num_rollbacks else "-",
        ]
        for stage in summary.stages
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths))
        )
        for row in rows
    ]
    return lines + [
        f"{name}: acted on {middle:.3f} ms after it was sent (median), 99 % within {late:.3f} ms"
        for name, (middle, late) in summary.transit_ms.items()
    ]
