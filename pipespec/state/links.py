"""Who may still be listened to: incarnations and sequence numbers of the neighbours.

The launcher numbers the processes of a stage 1, 2, ...; every frame carries the sender's number,
the receiver's as the sender knows it, and a running count. What a dead process left in a socket is
thereby recognised, whatever it says.
"""

from __future__ import annotations

from enum import Enum

from pipespec.messages import LAUNCHER, Frame, Hello, Link, Message, Verdict


class Arrival(Enum):
    """What a frame's envelope says about its sender."""

    OLD = "old"  # of a dead process, or meant for one: drop and count
    KNOWN = "known"
    NEW_PEER = "new peer"  # the first frame of a process not heard before
    GREETING = "greeting"  # of a process that was known: verdicts to it go on to be numbered


class Links:
    """Wraps messages into frames for each link and judges the envelopes that arrive."""

    def __init__(self, index: int, incarnations: list[int]) -> None:
        """`incarnations[i]`: the current one of stage i, this stage's own included."""
        self._index = index
        self._incarnation = incarnations[index]
        last = len(incarnations) - 1
        self._known = {
            Link.UP: incarnations[index - 1] if index > 0 else 0,
            Link.DOWN: incarnations[index + 1] if index < last else 0,
            Link.LAUNCHER: 0,
        }
        self._sequence = dict.fromkeys(Link, 0)
        self.num_old_frames = 0

    def wrap(self, link: Link, message: Message) -> Frame:
        self._sequence[link] += 1
        known = self._known[link]
        return Frame(self._index, self._incarnation, known, self._sequence[link], message)

    def judge(self, link: Link, frame: Frame) -> Arrival:
        misaddressed = frame.receiver_incarnation != self._incarnation
        if frame.sender == LAUNCHER:
            self.num_old_frames += misaddressed
            return Arrival.OLD if misaddressed else Arrival.KNOWN
        is_stale_verdict = misaddressed and isinstance(frame.message, Verdict)
        if frame.incarnation < self._known[link] or is_stale_verdict:
            self.num_old_frames += 1
            return Arrival.OLD
        is_new = frame.incarnation > self._known[link]
        self._known[link] = frame.incarnation
        if is_new:
            return Arrival.NEW_PEER
        return Arrival.GREETING if isinstance(frame.message, Hello) else Arrival.KNOWN
