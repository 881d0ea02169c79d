"""What one stage counted for one request, as it arrives in a `Stats` message.

The values crossed a process boundary, so they are checked here, once; everything computed from
them may rely on it. This module does not know how they were counted (`state.counts` does) nor what
follows from them (`definitions` does).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Final

from pipespec.errors import ProtocolError

Check = Callable[[Any], Any]


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_seconds(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value >= 0


def _count(value: Any) -> int:
    if not _is_count(value):
        raise ValueError("a count, 0 or more")
    return int(value)


def _seconds(value: Any) -> float:
    if not _is_seconds(value):
        raise ValueError("seconds, 0 or more")
    return float(value)


def _count_list(value: Any) -> tuple[int, ...]:
    if type(value) not in (list, tuple) or not all(map(_is_count, value)):
        raise ValueError("a list of counts, each 0 or more")
    return tuple(value)


def _seconds_list(value: Any) -> tuple[float, ...]:
    if type(value) not in (list, tuple) or not all(map(_is_seconds, value)):
        raise ValueError("a list of seconds, each 0 or more")
    return tuple(map(float, value))


def _wire(check: Check, **options: Any) -> Any:
    """A dataclass field that travels, with the check that its value must pass."""
    return field(metadata={"check": check}, **options)


@dataclass(frozen=True, slots=True)
class StageCounts:
    """Counters of one request at one stage. Times are seconds.

    Lists have one item a decode step, that is a forward after prefill, in order; a step that was
    overtaken by a verdict keeps its item, with nothing accepted and nothing emitted.

    num_steps: decode steps. step_starts_s: when each began, on the host's monotonic clock.
    query_lengths: tokens fed. offered: candidates scored. accepted: of those, equal to the stage's
    own draw. emitted: tokens that the stage's own sequence grew by, the bonus or correction token
    included, cut at an end of text and at max_new_tokens.

    num_drafted: tokens that this stage drew and appended, prefill's included. num_stale_drafts:
    draft tokens that arrived for a prefix this stage no longer had. num_rolled_back: own tokens
    that verdicts removed, in num_rollbacks rollbacks. num_past_end: drafted tokens that stood
    beyond the end of the output when the request finished. num_corrections: verdicts that replaced
    an own token, num_outcome_hits of which had been prepared for. num_discarded_steps: forwards
    whose draws were overtaken. forward_s: time in forwards, prefill included. extra: further
    numbers by name, passed through.
    """

    num_steps: int = _wire(_count)
    step_times_s: tuple[float, ...] = _wire(_seconds_list)
    query_lengths: tuple[int, ...] = _wire(_count_list)
    offered: tuple[int, ...] = _wire(_count_list)
    accepted: tuple[int, ...] = _wire(_count_list)
    emitted: tuple[int, ...] = _wire(_count_list)
    prefill_s: float = _wire(_seconds)
    num_prefill_tokens: int = _wire(_count)
    num_drafted: int = _wire(_count)
    num_stale_drafts: int = _wire(_count)
    num_rolled_back: int = _wire(_count)
    num_discarded_steps: int = _wire(_count)
    wait_s: float = _wire(_seconds)
    forward_s: float = _wire(_seconds)
    step_starts_s: tuple[float, ...] = _wire(_seconds_list, default=())
    num_rollbacks: int = _wire(_count, default=0)
    num_past_end: int = _wire(_count, default=0)
    num_corrections: int = _wire(_count, default=0)
    num_outcome_hits: int = _wire(_count, default=0)
    extra: Mapping[str, int | float] = field(default_factory=dict)

    @property
    def num_verifications(self) -> int:
        """Decode steps that counted. A step that was overtaken emits nothing; any other emits at
        least the correction token."""
        return sum(emitted > 0 for emitted in self.emitted)

    @property
    def num_offered(self) -> int:
        """Candidates scored by steps that counted."""
        return sum(offered for offered, emitted in zip(self.offered, self.emitted) if emitted)

    @property
    def num_accepted(self) -> int:
        return sum(self.accepted)

    @property
    def num_emitted(self) -> int:
        """Tokens emitted by decode steps; prefill's is not among them."""
        return sum(self.emitted)

    def to_values(self) -> dict[str, Any]:
        """The wire form, a flat map: names and plain values, `extra` beside the rest."""
        values = {name: getattr(self, name) for name in _CHECKS}
        for name, value in values.items():
            if isinstance(value, tuple):
                values[name] = list(value)
        return {**self.extra, **values}

    @staticmethod
    def from_values(values: Mapping[str, Any]) -> StageCounts:
        """What `to_values` wrote, checked.

        Raises:
            ProtocolError: naming the counter that is missing, of a wrong type or contradictory.
        """
        checked: dict[str, Any] = {}
        extra: dict[str, int | float] = {}
        for name, value in values.items():
            if name in _CHECKS:
                checked[name] = _checked(name, _CHECKS[name], value)
            else:
                extra[name] = _checked(name, _extra, value)
        missing = [name for name in _REQUIRED if name not in checked]
        if missing:
            raise ProtocolError(f"Stats lacks {', '.join(missing)}")
        counts = StageCounts(**checked, extra=extra)
        counts._check_consistency()
        return counts

    def _check_consistency(self) -> None:
        for name in _STEP_LISTS:
            if len(getattr(self, name)) != self.num_steps:
                length = len(getattr(self, name))
                raise ProtocolError(f"Stats.{name} has {length} items for {self.num_steps} steps")
        if self.step_starts_s and len(self.step_starts_s) != self.num_steps:
            raise ProtocolError("Stats.step_starts_s has not one item a step")
        for offered, accepted, emitted in zip(self.offered, self.accepted, self.emitted):
            if not accepted <= min(offered, emitted) or emitted > accepted + 1:
                raise ProtocolError(
                    f"Stats of a step contradict: {offered} candidates offered, {accepted} "
                    f"accepted, {emitted} tokens emitted"
                )


def _extra(value: Any) -> int | float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError("a finite number")
    return value  # type: ignore[no-any-return]


def _checked(name: str, check: Check, value: Any) -> Any:
    try:
        return check(value)
    except ValueError as error:
        raise ProtocolError(f"Stats.{name} must be {error}") from error


_CHECKS: Final[dict[str, Check]] = {
    item.name: item.metadata["check"] for item in fields(StageCounts) if "check" in item.metadata
}
_REQUIRED: Final = tuple(
    item.name for item in fields(StageCounts) if item.name in _CHECKS and item.default is MISSING
)
_STEP_LISTS: Final = ("step_times_s", "query_lengths", "offered", "accepted", "emitted")
