"""What goes into a simulation and what comes out: stages, faults, report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pipespec.emulation import TokenOracle
from pipespec.messages import Frame, Link
from pipespec.policy import Policy
from pipespec.state.step import Role


@dataclass(frozen=True, slots=True)
class SimStage:
    """A simulated stage: its bounds, how long a forward over q tokens takes, and what it draws.

    between_s: what its loop spends after each step before it can start the next one.
    reads_meanwhile: what arrives during a forward is applied at once, not after it."""

    role: Callable[[], Role]
    policy: Callable[[], Policy]
    step_s: Callable[[int], float]
    oracle: TokenOracle
    between_s: float = 0.0
    reads_meanwhile: bool = False


@dataclass(frozen=True, slots=True)
class Faults:
    """What goes wrong. Stalls, loss, duplication and reordering are probabilities a frame; a stall
    holds back what follows on the link too, so that it may outlive a restart of either end."""

    num_crashes: int = 0
    stalls: float = 0.0
    loss: float = 0.0
    duplication: float = 0.0
    reordering: float = 0.0
    unequal_target: bool = False  # a restarted target draws otherwise, as after a driver update

    @property
    def any(self) -> bool:
        return self != Faults()


@dataclass(frozen=True, slots=True)
class Delivery:
    """A frame on its way. ghost: the whole sequence of a Draft's sender, for the checks. cause: of
    a Verdict, what made its sender send it ("rollback", "bonus" or "")."""

    link: Link
    frame: Frame
    ghost: tuple[int, ...] = ()
    cause: str = ""


@dataclass(slots=True)
class Report:
    """What happened. outputs: token ids by request. counts: events by name. stats: the counters
    of each stage, by request. end_s: virtual time of the last output token."""

    outputs: dict[int, list[int]] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    stats: dict[tuple[int, int], dict[str, Any]] = field(default_factory=dict)
    end_s: float = 0.0
