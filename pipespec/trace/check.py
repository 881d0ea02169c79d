"""Whether a file is a trace that can be believed: every problem in one line.

What is checked: the phases are those that we write; every row is named, its events are in the order
of time, its slices have a length that is not negative and nest; every message has one start and one
later end, in slices of two rows; counts are counts, and no more was accepted than offered.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Final

from pipespec.errors import DataError

Row = tuple[int, int]
Item = dict[str, Any]

PHASES: Final = frozenset("XisfCM")
_NAMES: Final = ("process_name", "process_sort_index", "thread_name")
_COUNTS: Final = ("fed", "emitted", "offered", "accepted", "prepared", "forwards", "tokens")


def read_trace(path: Path) -> dict[str, Any]:
    """The file as an object with "traceEvents".

    Raises:
        DataError: it is not JSON, or no such object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:
        raise DataError(f"{path} is not JSON or was cut off ({error})") from error
    if not isinstance(content, dict) or not isinstance(content.get("traceEvents"), list):
        raise DataError(f'{path} is not a trace: it lacks "traceEvents"')
    return content


def check_trace(path: Path) -> list[str]:
    """The problems of a file, in words; none if it is a good trace.

    Raises:
        DataError: see `read_trace`.
    """
    return find_problems(read_trace(path)["traceEvents"])


def find_problems(events: Sequence[Any]) -> list[str]:
    """As `check_trace`, of the events."""
    problems: list[str] = []
    rows: dict[Row, list[tuple[int, Item]]] = defaultdict(list)
    names: dict[tuple[str, int, int], str] = {}
    flows: dict[Any, list[tuple[int, Item]]] = defaultdict(list)
    for index, event in enumerate(events):
        found = list(_problems_of(event))
        problems += [f"event {index}: {problem}" for problem in found]
        if found:
            continue
        if event["ph"] == "M":
            problems += _note_name(index, event, names)
            continue
        rows[event["pid"], event["tid"]].append((index, event))
        if event["ph"] in "sf":
            flows[event["id"]].append((index, event))
    for row, items in rows.items():
        problems += _problems_of_row(row, items, names)
    slices = {row: _Slices(items) for row, items in rows.items()}
    for identity, ends in flows.items():
        problems += _problems_of_flow(identity, [item for _, item in ends], slices)
    return problems


def _problems_of(event: Any) -> Iterator[str]:
    """What is wrong with an event by itself."""
    if not isinstance(event, dict):
        yield "is not an object"
        return
    phase = event.get("ph")
    if not isinstance(phase, str) or phase not in PHASES:
        yield f"has the unknown phase {phase!r}"
        return
    if not isinstance(event.get("name"), str) or not event["name"]:
        yield "has no name"
    if type(event.get("pid")) is not int:
        yield "has no process number"
    if phase == "M":
        return
    if type(event.get("tid")) is not int:
        yield "has no thread number"
    if not _is_time(event.get("ts")):
        yield f"has the time {event.get('ts')!r}; it must be microseconds, 0 or more"
    if phase == "X" and not _is_time(event.get("dur")):
        yield f"has the duration {event.get('dur')!r}; it must be microseconds, 0 or more"
    if phase in "sf" and not isinstance(event.get("id"), str | int):
        yield "is an end of a message without an id"
    if phase == "f" and event.get("bp") != "e":
        yield 'is an end of a message that is not bound to its slice ("bp": "e")'
    if phase == "i" and event.get("s") not in ("g", "p", "t"):
        yield "is an instant without a scope"
    yield from _problems_of_args(phase, event.get("args", {}))


def _problems_of_args(phase: str, args: Any) -> Iterator[str]:
    if not isinstance(args, dict):
        yield "has args that are no object"
        return
    if phase == "C" and not (args and all(_is_number(value) for value in args.values())):
        yield "counts something that is no number"
    for name in _COUNTS:
        if name in args and (type(args[name]) is not int or args[name] < 0):
            yield f"has {name} {args[name]!r}; it must be a count"
            return
    if args.get("accepted", 0) > args.get("offered", math.inf):
        yield f"accepted {args['accepted']} of {args['offered']} candidates"


def _note_name(index: int, event: Item, names: dict[tuple[str, int, int], str]) -> Iterator[str]:
    kind, thread = event["name"], event.get("tid", 0)
    if kind not in _NAMES:
        yield f"event {index}: is the unknown metadata {kind}"
    elif kind != "process_sort_index":
        args = event.get("args")
        name = args.get("name") if isinstance(args, dict) else None
        key = (kind, event["pid"], thread if kind == "thread_name" else 0)
        if not isinstance(name, str) or not name:
            yield f"event {index}: {kind} without a name"
        elif key in names:
            yield f"event {index}: a second {kind} of process {event['pid']}"
        elif kind == "process_name" and name in names.values():
            yield f"event {index}: a second process called {name}"
        else:
            names[key] = name


def _problems_of_row(
    row: Row, items: Sequence[tuple[int, Item]], names: Mapping[tuple[str, int, int], str]
) -> Iterator[str]:
    process, thread = row
    if ("process_name", process, 0) not in names:
        yield f"process {process} has events and no name"
    if ("thread_name", process, thread) not in names:
        yield f"thread {thread} of process {process} has events and no name"
    last_ns = 0
    open_ends: list[tuple[int, int]] = []
    for index, event in items:
        start_ns = _ns(event["ts"])
        if start_ns < last_ns:
            yield f"event {index}: comes {last_ns - start_ns} ns before the one before it"
        last_ns = max(last_ns, start_ns)
        if event["ph"] != "X":
            continue
        end_ns = start_ns + _ns(event["dur"])
        while open_ends and open_ends[-1][0] <= start_ns:
            open_ends.pop()
        if open_ends and open_ends[-1][0] < end_ns:
            outlives = f"event {index}: slice {event['name']} ends after event {open_ends[-1][1]}"
            yield f"{outlives}, in which it begins"
        open_ends.append((end_ns, index))


def _problems_of_flow(
    identity: Any, ends: Sequence[Item], slices: Mapping[Row, _Slices]
) -> Iterator[str]:
    what = f"message {identity}"
    starts = [end for end in ends if end["ph"] == "s"]
    finishes = [end for end in ends if end["ph"] == "f"]
    if len(starts) != 1 or len(finishes) != 1:
        yield f"{what} has {len(starts)} starts and {len(finishes)} ends; it must have one of each"
        return
    (start,), (finish,) = starts, finishes
    if _ns(finish["ts"]) < _ns(start["ts"]):
        yield f"{what} arrives {_ns(start['ts']) - _ns(finish['ts'])} ns before it is sent"
    if start["pid"] == finish["pid"]:
        yield f"{what} is sent and received by the same process {start['pid']}"
    if start["name"] != finish["name"]:
        yield f"{what} is sent as {start['name']} and received as {finish['name']}"
    for end, kind in ((start, "start"), (finish, "end")):
        if not slices[end["pid"], end["tid"]].cover(_ns(end["ts"])):
            yield f"{what} has its {kind} in no slice"


class _Slices:
    """The slices of a row."""

    def __init__(self, items: Sequence[tuple[int, Item]]) -> None:
        found = sorted(
            (_ns(event["ts"]), _ns(event["ts"]) + _ns(event["dur"]))
            for _, event in items
            if event["ph"] == "X"
        )
        self._starts = [start_ns for start_ns, _ in found]
        self._ends = list(accumulate((end_ns for _, end_ns in found), max))

    def cover(self, at_ns: int) -> bool:
        """Whether the moment lies in one of them."""
        num_begun = bisect_right(self._starts, at_ns)
        return num_begun > 0 and self._ends[num_begun - 1] >= at_ns


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_time(value: Any) -> bool:
    return _is_number(value) and value >= 0


def _ns(microseconds: float) -> int:
    return round(1000 * microseconds)
