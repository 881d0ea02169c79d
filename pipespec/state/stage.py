"""All requests at one stage: which frames to believe, which request may step, what to send.

One object per stage, driven by whoever has the messages and the time: the process loop, the
synchronous `chain`, or the simulator. It returns frames to send and never sends, reads no clock
(`now_s` is handed in) and does not know what computes the draws.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

from pipespec.estimates import expected_tokens
from pipespec.messages import (
    Abort,
    Draft,
    Finish,
    Frame,
    Hello,
    Link,
    Message,
    Stats,
    Submit,
    Verdict,
)  # fmt: skip
from pipespec.policy import (
    MAX_URGENT,
    Offer,
    Policy,
    Situation,
    StepResult,
)
from pipespec.state.beside import offers_beside
from pipespec.state.counts import Counts
from pipespec.state.finish import Decode, FinishChecker
from pipespec.state.links import Arrival, Links
from pipespec.state.outcomes import Ranked
from pipespec.state.request import FinishCheck, Outgoing, RequestState
from pipespec.state.step import Role, Step
from pipespec.state.tell import tell_kept

NUM_REMEMBERED = 1024  # finished requests whose late drafts are answered by Finish
REFRESH_S = 5.0  # without a usable Draft from above for so long: send everything again


class Decision(NamedTuple):
    """What to do now: run `step`, or wait for messages, at most until `wake_at_s` if not None."""

    step: Step | None
    wake_at_s: float | None = None


class StageState:
    """The protocol at one stage for any number of requests.

    max_active: requests that may step at a time (the runner's slots), oldest first; the order is
    the same at every stage because requests reach them all in the order of submission.
    """

    def __init__(
        self,
        role: Role,
        policy: Policy,
        incarnations: Sequence[int],
        *,
        decode: Decode | None = None,
        max_active: int = 1 << 30,
    ) -> None:
        self.role = role
        self.policy = policy
        self.links = Links(role.index, list(incarnations))
        self.requests: dict[int, RequestState] = {}
        self.num_unknown = 0
        self._decode = decode
        self._max_active = max_active
        self._last_draft_s: dict[int, float] = {}
        self._gone: OrderedDict[int, None] = OrderedDict()
        self._in_flight: RequestState | None = None
        self._unlearnt: tuple[RequestState, StepResult] | None = None
        self._turn = 0
        self._free_since_s = 0.0

    # -- events -----------------------------------------------------------------------------

    def receive(self, link: Link, frame: Frame, now_s: float) -> list[tuple[Link, Frame]]:
        """Applies one frame; returns the frames it causes."""
        arrival = self.links.judge(link, frame)
        if arrival is Arrival.OLD:
            return []
        outgoing: list[Outgoing] = []
        if arrival is Arrival.NEW_PEER:
            outgoing += self._on_new_peer(link)
        elif arrival is Arrival.GREETING and link is Link.UP:  # it may have missed what was sent
            outgoing += [item for r in self.requests.values() for item in r.full_verdict()]
        outgoing += self._on_message(frame.message, now_s)
        return self.wrap(outgoing)

    def decide(self, now_s: float) -> Decision:
        """Starts the step that the policy wants now, requests taking turns."""
        assert self._in_flight is None
        active = list(islice(self.requests.values(), self._max_active))
        wake_at_s: float | None = None
        for offset in range(len(active)):
            request = active[(self._turn + offset) % len(active)]
            if not request.can_step and not request.can_prepare:
                continue
            ready_at_s = self._ready_at(request, now_s)
            if ready_at_s is not None and ready_at_s <= now_s:
                step = self._begin_step(request)
                if step is None:
                    continue
                self._turn += offset + 1
                self._in_flight = request
                return Decision(step)
            if ready_at_s is not None:
                wake_at_s = ready_at_s if wake_at_s is None else min(wake_at_s, ready_at_s)
        return Decision(None, wake_at_s)

    def draw_on(self, draws: Sequence[Ranked]) -> Step | None:
        """The forward in flight drew this: the next one of the same step; None if that is over,
        and `end_step` is to be told of the draws."""
        request = self._in_flight
        assert request is not None
        is_wanted = self.requests.get(request.request) is request
        return request.draw_on(draws) if is_wanted else None

    def end_step(
        self, draws: Sequence[Ranked], start_s: float, end_s: float
    ) -> list[tuple[Link, Frame]]:
        """The forward that `decide` started is done. Its request may have finished meanwhile.
        `learn` is to be called before the next decision."""
        request, self._in_flight = self._in_flight, None
        assert request is not None and request.step is not None
        self._unlearnt = None
        if self.requests.get(request.request) is not request:
            return []
        step, length = request.step, len(request.seq)
        outgoing = request.end_step(draws, start_s, end_s)
        forwards = request.burst.steps
        num_fed = sum([each.query_length for each in forwards])
        result = StepResult(
            query_length=round(num_fed / len(forwards)),
            num_offered=step.num_candidates,
            num_accepted=request.num_main_accepted,
            num_emitted=len(request.seq) - length,
            num_left=0,
            is_prefill=step.is_prefill,
            seconds=(end_s - start_s) / len(forwards),
            end_s=end_s,
            cycle_s=end_s - self._free_since_s,
        )
        self._free_since_s = end_s
        self._unlearnt = request, result
        return self.wrap(outgoing)

    def learn(self) -> list[tuple[Link, Frame]]:
        """The policy hears of the step that ended, once all has been received that came during
        it."""
        if self._unlearnt is None:
            return []
        (request, result), self._unlearnt = self._unlearnt, None
        self.policy.on_step(result._replace(num_left=len(request.cands.main)))
        self.role.batch = self.policy.batch if self.role.is_first else 1
        was_alone = self.role.is_alone
        self.role.is_alone = self.role.is_last and self.policy.is_alone
        if not was_alone or self.role.is_alone:
            return []
        return self.wrap([item for r in self.requests.values() for item in tell_kept(r)])

    def num_missing(self, now_s: float) -> int:
        """Candidates without which the oldest request does not step."""
        request = next(iter(self.requests.values()), None)
        if request is None or self._ready_at(request, now_s) == now_s:
            return 0
        situation = self._situation(request, now_s)
        wanted, _ = self.policy.wait(situation)
        return min(wanted, situation.num_useful) - situation.num_candidates

    def add_wait(self, seconds: float) -> None:
        """The stage had nothing to do for so long although requests were in flight."""
        for request in self.requests.values():
            request.counts.wait_s += seconds

    def refresh(self, now_s: float) -> list[tuple[Link, Frame]]:
        """For links that may lose frames: full verdicts where drafts have stayed away too long."""
        outgoing: list[Outgoing] = []
        if self.role.is_alone:
            return []
        for key, request in self.requests.items():
            if now_s - self._last_draft_s[key] > REFRESH_S and not request.is_ended:
                self._last_draft_s[key] = now_s
                outgoing += request.full_verdict()
        return self.wrap(outgoing)

    def full_verdicts(self) -> list[tuple[Link, Frame]]:
        """For a stage above that may have missed something: all it needs, for every request."""
        return self.wrap([item for r in self.requests.values() for item in r.full_verdict()])

    def greet(self) -> list[tuple[Link, Frame]]:
        """After a restart: tells both neighbours that this is a new process."""
        hello = Hello(self.role.index, 0, "", "", "")
        ends = ((Link.UP, self.role.is_first), (Link.DOWN, self.role.is_last))
        return self.wrap([(link, hello) for link, is_end in ends if not is_end])

    def wrap(self, outgoing: list[Outgoing]) -> list[tuple[Link, Frame]]:
        """Messages as frames of this stage."""
        return [(link, self.links.wrap(link, message)) for link, message in outgoing]

    # -- messages ---------------------------------------------------------------------------

    def _on_message(self, message: Message, now_s: float) -> list[Outgoing]:
        if isinstance(message, Draft):
            return self._on_draft(message, now_s)
        if isinstance(message, Verdict):
            request = self.requests.get(message.request)
            if request is None:
                self.num_unknown += 1
                return []
            self._free_since_s = now_s
            return request.on_verdict(message)
        if isinstance(message, Submit):
            return self._on_submit(message, now_s)
        if isinstance(message, Finish | Abort):
            return self._on_finish(message)
        return []

    def _on_submit(self, submit: Submit, now_s: float) -> list[Outgoing]:
        if submit.request in self.requests or submit.request in self._gone:
            return []
        request = RequestState(submit, self.role, self._finish_check(submit))
        self.requests[submit.request] = request
        self._last_draft_s[submit.request] = now_s
        return request.full_verdict()

    def _on_draft(self, draft: Draft, now_s: float) -> list[Outgoing]:
        request = self.requests.get(draft.request)
        if request is None:
            self.num_unknown += 1
            return [(Link.UP, Finish(draft.request))] if draft.request in self._gone else []
        num_before = len(request.cands.main)
        if request.on_draft(draft):  # stale ones alone may mean that a lost frame parted the two
            self._last_draft_s[draft.request] = now_s
        num_tokens = max(0, len(request.cands.main) - num_before)
        self.policy.on_draft(num_tokens, request.drafter_stopped, now_s)
        return []

    def _on_finish(self, message: Finish | Abort) -> list[Outgoing]:
        if message.request in self._gone:
            return []
        request = self.requests.pop(message.request, None)
        counts = Counts()  # of a request whose Submit was lost and whose end came first
        if request is not None:
            self._last_draft_s.pop(message.request)
            counts = request.counts
            counts.num_past_end = 0 if self.role.is_last else len(request.seq) - request.acked
        self._gone[message.request] = None
        while len(self._gone) > NUM_REMEMBERED:
            self._gone.popitem(last=False)
        stats = Stats(message.request, counts.to_values())
        upwards: list[Outgoing] = [] if self.role.is_first else [(Link.UP, message)]
        return [*upwards, (Link.LAUNCHER, stats)]

    def _on_new_peer(self, link: Link) -> list[Outgoing]:
        """A neighbour was replaced. From below: its verdicts start anew, with a full one. From
        above: it knows nothing yet."""
        outgoing: list[Outgoing] = []
        for request in self.requests.values():
            if link is Link.DOWN:
                request.verdict_seen = 0
            elif link is Link.UP:
                request.num_verdicts_sent = 0
                outgoing += request.full_verdict()
        return outgoing

    # -- parts ------------------------------------------------------------------------------

    def _begin_step(self, request: RequestState) -> Step | None:
        most, can_step = self.policy.use(len(request.cands.main)), request.can_step
        extras = offers_beside(request, most)
        if not extras:
            return request.begin_step(most)
        own_length, own_value, next_may_wait = 0, 0.0, False
        if can_step:
            num_candidates = request.num_usable(most)
            own_length = max(1, len(request.seq) - request.kv_valid) + num_candidates
            own_value = expected_tokens(request.candidate_stats.agreement, num_candidates)
            if not self.role.is_last:
                # The next stage accepts a token if it has accepted all that it has not seen yet.
                num_unseen = len(request.seq) - request.acked
                agreement = request.outcomes.stats.agreement
                own_value *= agreement ** (num_unseen + 1)
                next_may_wait = num_unseen < MAX_URGENT
        values = tuple([value for value, _ in extras])
        offer = Offer(own_length, own_value, values, self.role.is_first, next_may_wait)
        takes_own, num_extras = self.policy.feed(offer)
        chosen = [extra for _, extra in extras[:num_extras]]
        return request.begin_step(most, chosen, takes_own=takes_own)

    def _ready_at(self, request: RequestState, now_s: float) -> float | None:
        """When `request` may step: now, later (the wait for candidates ends), or None (not before
        a message arrives)."""
        if self.role.is_first or request.is_prefill or request.drafter_stopped:
            return now_s
        situation = self._situation(request, now_s)
        wanted, patience_s = self.policy.wait(situation)
        if situation.num_candidates >= min(wanted, situation.num_useful):
            return now_s
        if patience_s is None:
            return None
        if request.waiting_until is None:
            request.waiting_until = now_s + patience_s
        return request.waiting_until

    def _situation(self, request: RequestState, now_s: float) -> Situation:
        num_useful = min(request.room, request.remaining) - 1
        return Situation(len(request.cands.main), num_useful, now_s)

    def _finish_check(self, submit: Submit) -> FinishCheck:
        if self.role.is_last:
            return FinishChecker(submit, self._decode)
        return lambda _token: ""
