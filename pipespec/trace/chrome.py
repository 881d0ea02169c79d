"""From events to a file in the trace event format of Chrome.

Every strategy has a group of processes: one row for its samples, then one for each stage, named
after its model. Times are microseconds from the first event, to the nanosecond. An arrow leads from
the sending of a Draft or Verdict to where its receiver acted on it.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from pipespec.errors import UsageError
from pipespec.trace.events import (
    APPLY,
    DECIDE,
    FORWARDS,
    ROLLBACK,
    WAIT,
    Event,
    StageTrace,
    StrategyTrace,
)

GROUP_SIZE: Final = 1000  # process numbers of a strategy: 0 its samples, 1 its first draft, ...
LOOP_THREAD: Final = 1  # a stage does one thing at a time
SAMPLES: Final = "samples"

Item = dict[str, Any]
Group = tuple[StrategyTrace, Sequence[Event]]  # with its samples


def write_trace(path: Path, groups: Sequence[Group]) -> None:
    """Writes the whole file or, on an error, leaves what was there.

    Raises:
        UsageError: it cannot be written.
    """
    try:
        descriptor, partial = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.writelines(_lines(groups))
            os.chmod(partial, 0o644)
            os.replace(partial, path)
        except BaseException:
            os.unlink(partial)
            raise
    except OSError as error:
        raise UsageError(f"--trace: cannot write {path} ({error.strerror or error})") from error


def _lines(groups: Sequence[Group]) -> Iterator[str]:
    """The file in pieces: an event a line."""
    origin_s = min((event.start_s for event in _all_events(groups)), default=0.0)
    yield '{"traceEvents": [\n'
    separator = ""
    for item in _items(groups, origin_s):
        yield separator + json.dumps(item, separators=(",", ":"))
        separator = ",\n"
    stages = [stage for group, _ in groups for stage in group.stages]
    other = {
        "clock": "CLOCK_MONOTONIC",
        "origin_s": origin_s,
        "num_dropped_events": sum(stage.num_dropped for stage in stages),
    }
    yield '\n], "displayTimeUnit": "ms", "otherData": ' + json.dumps(other) + "}\n"


def _all_events(groups: Iterable[Group]) -> Iterator[Event]:
    for group, samples in groups:
        yield from samples
        for stage in group.stages:
            yield from stage.events


def _items(groups: Sequence[Group], origin_s: float) -> Iterator[Item]:
    for number, (group, samples) in enumerate(groups):
        name = _group_name([before.strategy for before, _ in groups[:number]], group.strategy)
        process = number * GROUP_SIZE
        yield from _names(process, f"{name}: {SAMPLES}", SAMPLES)
        yield from _row(process, samples, {}, origin_s)
        ends = _paired_flows(group.stages)
        prefix = f"{number}:"
        flows = {flow: prefix + flow for flow in ends}
        for index, stage in enumerate(group.stages):
            process = number * GROUP_SIZE + 1 + index
            yield from _names(process, f"{name}, stage {index}: {stage.name}", "loop")
            yield from _row(process, stage.events, flows, origin_s)


def _group_name(before: Sequence[str], strategy: str) -> str:
    """A strategy whose models were loaded again, with fewer of them, is told apart."""
    count = before.count(strategy) + 1
    return strategy if count == 1 else f"{strategy} ({count})"


def _names(process: int, name: str, thread: str) -> Iterator[Item]:
    head = {"ph": "M", "pid": process}
    yield {**head, "name": "process_name", "args": {"name": name}}
    yield {**head, "name": "process_sort_index", "args": {"sort_index": process}}
    yield {**head, "name": "thread_name", "tid": LOOP_THREAD, "args": {"name": thread}}


def _paired_flows(stages: Iterable[StageTrace]) -> set[str]:
    """Messages that were both sent and received while events were noted: a Draft may be on its way
    when its text ends."""
    count = Counter(event.flow for stage in stages for event in stage.events if event.flow)
    return {flow for flow, num_ends in count.items() if num_ends == 2}


def _row(
    process: int, events: Sequence[Event], flows: dict[str, str], origin_s: float
) -> Iterator[Item]:
    """The events of one row in the order of time, those that enclose others first."""
    items: list[tuple[int, int, int, Item]] = []
    for index, event in enumerate(events):
        start_ns = round(1e9 * (event.start_s - origin_s))
        end_ns = round(1e9 * (event.end_s - origin_s))
        for item in _of_event(process, event, start_ns, end_ns, flows):
            at_ns = end_ns if item["ph"] == "C" else start_ns
            items.append((at_ns, -end_ns if item["ph"] == "X" else 0, index, item))
    items.sort(key=lambda found: found[:3])
    yield from (item for *_, item in items)


def _of_event(
    process: int, event: Event, start_ns: int, end_ns: int, flows: dict[str, str]
) -> Iterator[Item]:
    head = {"pid": process, "tid": LOOP_THREAD, "ts": start_ns / 1000}
    if event.name == ROLLBACK:
        yield {"ph": "i", "name": ROLLBACK, "s": "t", **head, "args": event.args}
        return
    kind = _category(event.name)
    duration = {"dur": (end_ns - start_ns) / 1000}
    yield {"ph": "X", "name": event.name, "cat": kind, **head, **duration, "args": event.args}
    if flow := flows.get(event.flow):
        sent, _, message = event.name.partition(" ")
        end = {"ph": "s"} if sent == "send" else {"ph": "f", "bp": "e"}
        yield {**end, "name": message, "cat": "message", "id": flow, **head}
    if "ahead" in event.args:
        counted = {"tokens": event.args["ahead"]}
        counter = {"ph": "C", "name": "ahead of the last verdict", **head}
        yield {**counter, "ts": end_ns / 1000, "args": counted}


def _category(name: str) -> str:
    if name in FORWARDS:
        return "forward"
    if name in (WAIT, DECIDE, APPLY):
        return name
    return "message" if name.startswith(("send ", "receive ")) else SAMPLES
