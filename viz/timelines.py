"""What every model did when, from a trace or from a result file: what `pipeline_timeline` draws.

A trace says everything. A result file has the start and the length of each forward, and how many
candidates a verification was offered and accepted; which forwards of a draft were lost by that is
estimated. The original's files have lengths only, and are laid out as far as these determine it.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, Final

from pipespec.errors import DataError
from pipespec.results.labels import Metadata, model_names
from pipespec.trace.chrome import GROUP_SIZE, SAMPLES
from pipespec.trace.events import FORWARDS, ROLLBACK, WAIT

NO_STARTS: Final = "no start times: forwards end to end"
BY_ROUNDS: Final = "no start times: laid out by rounds"


@dataclass(slots=True)
class Slice:
    """Something that took time; seconds on the timeline's clock. rejected: of the tokens of a
    forward, the share that did not become text. num_emitted: tokens that its stage went on by."""

    start_s: float
    end_s: float
    kind: str
    num_emitted: int = 0
    rejected: float = 0.0


@dataclass(slots=True)
class Lane:
    """One model."""

    name: str
    slices: list[Slice]

    def within(self, window_s: tuple[float, float]) -> list[Slice]:
        """Those that can be seen between two moments."""
        return [
            found
            for found in self.slices
            if found.end_s > window_s[0] and found.start_s < window_s[1]
        ]

    @property
    def forwards(self) -> list[Slice]:
        """Those after the prefill."""
        return [found for found in self.slices if found.kind not in ("prefill", WAIT)]


@dataclass(frozen=True, slots=True)
class Arrow:
    """A message between two lanes."""

    from_lane: int
    to_lane: int
    sent_s: float
    received_s: float


@dataclass(frozen=True, slots=True)
class Timeline:
    """One sample of one run, first draft first; times since the request. note: what to know about
    it."""

    title: str
    lanes: tuple[Lane, ...]
    verdicts: tuple[Arrow, ...] = field(default=(), repr=False)
    note: str = ""

    def since_prefill(self) -> Timeline:
        """The same with times that begin where the target's prefill ends.

        Raises:
            DataError: the target has no step after it.
        """
        steps = self.lanes[-1].forwards
        if not steps:
            raise DataError(f"has no step of the target after its prefill, in {self.title}")
        prefills = [found.end_s for found in self.lanes[-1].slices if found.kind == "prefill"]
        origin_s = max(prefills, default=steps[0].start_s)

        def shifted(found: Slice) -> Slice:
            return replace(found, start_s=found.start_s - origin_s, end_s=found.end_s - origin_s)

        lanes = (Lane(lane.name, [shifted(found) for found in lane.slices]) for lane in self.lanes)
        verdicts = (
            replace(arrow, sent_s=arrow.sent_s - origin_s, received_s=arrow.received_s - origin_s)
            for arrow in self.verdicts
        )
        return replace(self, lanes=tuple(lanes), verdicts=tuple(verdicts))

    def end_of_steps(self, count: int) -> float:
        """When so many steps of the target are done."""
        return self.lanes[-1].forwards[:count][-1].end_s


# -- traces -----------------------------------------------------------------------------------


def is_trace(path: Path) -> bool:
    """Whether the file looks like one; a result file has its "metadata" in front."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return '"traceEvents"' in file.read(200)
    except OSError:
        return False


def read_timelines(content: Mapping[str, Any], sample: int) -> list[Timeline]:
    """The sample of every strategy of a trace.

    Raises:
        DataError: no strategy has written it.
    """
    events = content["traceEvents"]
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    by_process: dict[int, list[Mapping[str, Any]]] = defaultdict(list)
    for event in events:
        if event["ph"] in "Xisf":
            by_process[event["pid"]].append(event)
    found: list[Timeline] = []
    for first in sorted(process for process in names if process % GROUP_SIZE == 0):
        wanted = [e for e in by_process[first] if e["name"] == f"sample {sample}"]
        stages = sorted(p for p in names if first < p < first + GROUP_SIZE)
        if not wanted or not stages:
            continue
        start_us, end_us = wanted[0]["ts"], wanted[0]["ts"] + wanted[0]["dur"]
        inside = [
            [event for event in by_process[p] if start_us <= event["ts"] <= end_us] for p in stages
        ]
        lanes = tuple(
            Lane(names[p].partition(": ")[2], _slices(lane, start_us, is_target=p == stages[-1]))
            for p, lane in zip(stages, inside)
        )
        found.append(
            Timeline(names[first].removesuffix(f": {SAMPLES}"), lanes, _verdicts(inside, start_us))
        )
    if not found:
        raise DataError(f"it has no sample {sample}; name another with --sample")
    return found


def _slices(
    events: Sequence[Mapping[str, Any]], origin_us: float, *, is_target: bool
) -> list[Slice]:
    """A lane. The tokens of a draft that a rollback removes are marked where they were written."""
    slices: list[Slice] = []
    writers: dict[int, Slice] = {}  # of the token at a position
    for event in events:
        args = event.get("args", {})
        if event["ph"] == "i" and event["name"] == ROLLBACK:
            for position in range(args["position"], args["position"] + args["tokens"]):
                if (writer := writers.pop(position, None)) is not None:
                    writer.rejected += 1 / writer.num_emitted
        elif event["ph"] == "X" and event["name"] in (*FORWARDS, WAIT):
            start_s = (event["ts"] - origin_us) / 1e6
            kind, num_emitted = event["name"], args.get("emitted", 0)
            found = Slice(start_s, start_s + event["dur"] / 1e6, kind, num_emitted)
            slices.append(found)
            is_lost = (args.get("overtaken") or args.get("after_end")) and not num_emitted
            if is_lost and kind != "prepare":
                found.rejected = 1.0
            elif is_target:
                found.rejected = rejected_share(args.get("offered", 0), args.get("accepted", 0))
            else:
                first = args.get("position", 0)
                writers.update(dict.fromkeys(range(first, first + num_emitted), found))
    return slices


def _verdicts(stages: Sequence[Sequence[Mapping[str, Any]]], origin_us: float) -> tuple[Arrow, ...]:
    ends: dict[Any, dict[str, tuple[int, float]]] = defaultdict(dict)
    for lane, events in enumerate(stages):
        for event in events:
            if event["ph"] in "sf" and event["name"] == "Verdict":
                ends[event["id"]][event["ph"]] = lane, (event["ts"] - origin_us) / 1e6
    return tuple(
        Arrow(pair["s"][0], pair["f"][0], pair["s"][1], pair["f"][1])
        for pair in ends.values()
        if len(pair) == 2
    )


def rejected_share(num_offered: int, num_accepted: int) -> float:
    """Of the rows of a verification, the candidates that were not accepted. One row more than
    candidates is computed: its draw is the stage's own token."""
    return (num_offered - num_accepted) / (num_offered + 1)


# -- result files -----------------------------------------------------------------------------


def timeline_of(title: str, metadata: Metadata, metrics: Mapping[str, Any]) -> Timeline:
    """A sample of a result file.

    Raises:
        KeyError, ValueError, TypeError, IndexError: it lacks what is needed.
    """
    times = metrics.get("model_times") or [metrics["token_times"]]
    names = model_names(metadata)
    if len(names) != len(times):
        raise ValueError(f"has {len(names)} models and times of {len(times)}")
    starts, note = metrics.get("model_starts"), ""
    if starts is None:
        starts, note = _lay_out(metadata["strategy"], metrics["total_time"], times)
    emitted = [[1] * len(times[0]), *metrics.get("accepted_tokens", ())]
    kinds = ["draft" if len(times) > 1 else "decode", *["verify"] * (len(times) - 1)]
    lanes = []
    for name, kind, begins, seconds, counts in zip(names, kinds, starts, times, emitted):
        ends = [begin + length for begin, length in zip(begins, seconds)]
        ends = [min(end, later) for end, later in zip(ends, [*begins[1:], float("inf")])]
        # The original's logs may end one count early.
        padded = [*counts, *[1] * (len(ends) - len(counts))]
        slices = [Slice(b, e, kind, count) for b, e, count in zip(begins, ends, padded)]
        lanes.append(Lane(name, slices))
    offered = metrics.get("offered_tokens", ())
    for pair, counts in enumerate(offered):
        _mark_rejected(lanes[: pair + 2], counts, is_target=pair + 2 == len(lanes))
    for lane, prefill_s in zip(lanes, metrics.get("prefill_times_s", ())):
        end_s = min(prefill_s, lane.slices[0].start_s if lane.slices else prefill_s)
        lane.slices.insert(0, Slice(0.0, end_s, "prefill"))
    return Timeline(title, tuple(lanes), (), note)


def _lay_out(
    strategy: str, total_s: float, times: Sequence[Sequence[float]]
) -> tuple[list[list[float]], str]:
    """Starts of forwards of which only the lengths are known. In a chain one model runs at a time:
    its drafts are spread evenly over the target's steps, which is right within one forward. Other
    models are taken to have been busy from the start."""
    if strategy == "chain" and all(times):
        starts, now_s = [[0.0] * len(lane) for lane in times], total_s - sum(map(sum, times))
        num_rounds = len(times[-1])
        for number in range(num_rounds):
            for lane, seconds in enumerate(times):
                begin = number * len(seconds) // num_rounds
                end = (number + 1) * len(seconds) // num_rounds
                for step in range(begin, end):
                    starts[lane][step] = now_s
                    now_s += seconds[step]
        return starts, BY_ROUNDS
    first_s = total_s - max(map(sum, times))
    return [list(accumulate(lane, initial=first_s))[: len(lane)] for lane in times], "" if len(
        times
    ) == 1 else NO_STARTS


def _mark_rejected(lanes: Sequence[Lane], offered: Sequence[int], *, is_target: bool) -> None:
    """The last of `lanes` was offered candidates by the one above. Where it rejected some, what the
    lanes above began until its verdict, and the forwards that wrote these candidates, were in
    vain; the latter are taken to be the last ones before the verification."""
    *drafts, verifier = lanes
    starts = [[found.start_s for found in lane.slices] for lane in drafts]
    ends = [[found.end_s for found in lane.slices] for lane in drafts]
    for step, num_offered in zip(verifier.slices, offered):
        num_rejected = num_offered - max(0, step.num_emitted - 1)
        if is_target and step.num_emitted:
            step.rejected = rejected_share(num_offered, max(0, step.num_emitted - 1))
        elif not step.num_emitted and num_offered:  # a verdict overtook it
            step.rejected = 1.0
        if num_rejected <= 0 or not step.num_emitted:
            continue
        for index, lane in enumerate(drafts):
            first = bisect_right(ends[index], step.start_s)
            for lost in lane.slices[first : bisect_left(starts[index], step.end_s)]:
                lost.rejected = 1.0
        for writer in reversed(drafts[-1].slices[: bisect_right(ends[-1], step.start_s)]):
            if num_rejected <= 0:
                break
            if writer.num_emitted:
                lost_share = min(num_rejected, writer.num_emitted) / writer.num_emitted
                writer.rejected = max(writer.rejected, lost_share)
            num_rejected -= writer.num_emitted
