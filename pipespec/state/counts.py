"""What one stage counts for one request: the raw material of every metric.

Plain appends in the hot loop. What the numbers mean, and everything computed from them, is
defined in `metrics`; the names here are the names there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipespec.state.step import Step


@dataclass(slots=True)
class Counts:
    """Counters of one request at one stage; times in seconds, one list item a decode step.

    step_starts_s is on the machine's monotonic clock, which all processes of a host share.
    """

    num_steps: int = 0
    step_starts_s: list[float] = field(default_factory=list)
    step_times_s: list[float] = field(default_factory=list)
    query_lengths: list[int] = field(default_factory=list)
    offered: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    emitted: list[int] = field(default_factory=list)
    prefill_s: float = 0.0
    num_prefill_tokens: int = 0
    num_drafted: int = 0
    num_stale_drafts: int = 0
    num_rolled_back: int = 0
    num_rollbacks: int = 0
    num_past_end: int = 0  # own tokens beyond the last verdict when the request finished
    num_discarded_steps: int = 0
    num_dropped_verdicts: int = 0
    num_overflows: int = 0
    num_corrections: int = 0  # own tokens that a verdict replaced by another
    num_outcome_hits: int = 0  # of these, foreseen
    wait_s: float = 0.0
    forward_s: float = 0.0

    def log_step(
        self, steps: Sequence[Step], accepted: int, emitted: int, start_s: float, end_s: float
    ) -> None:
        """The forwards of one step: of the candidates offered, `accepted` matched, and the stage's
        own sequence grew by `emitted` (0 if a verdict had overtaken the step)."""
        self.forward_s += end_s - start_s
        self.num_drafted += emitted
        first, count = steps[0], len(steps)
        if first.is_prefill:
            self.prefill_s += end_s - start_s
            self.num_prefill_tokens += len(first.ids)
            return
        seconds = (end_s - start_s) / count
        self.num_steps += count
        self.step_starts_s += [start_s + index * seconds for index in range(count)]
        self.step_times_s += [seconds] * count
        self.query_lengths += [step.query_length for step in steps]
        if count > 1:  # a first draft's, who is offered nothing and draws one token in each
            self.offered += [0] * count
            self.accepted += [0] * count
            self.emitted += [int(index < emitted) for index in range(count)]
        else:
            self.offered.append(first.num_candidates + len(first.twigs))
            self.accepted.append(accepted)
            self.emitted.append(emitted)

    def to_values(self) -> dict[str, Any]:
        """The wire form: the field names and plain values."""
        return {name: getattr(self, name) for name in self.__slots__}
