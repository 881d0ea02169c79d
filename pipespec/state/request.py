"""One request at one stage: own tokens, candidates, and the rules that change them.

A stage's own sequence is the prompt plus the tokens it has drawn or been told. Candidates are the
tokens that the stage before it drafted to follow them. Four events change a request: a `Draft`
from above, a `Verdict` from below, a step's start and a step's end. Each is a plain method that
returns the messages it causes; each costs O(tokens in the event).

Three rules carry the protocol:

- A Draft is a hint: it names the prefix it follows by hash and is ignored unless that prefix is
  what the stage itself holds. Stale, repeated and reordered drafts thereby identify themselves.
- A Verdict is a command, applied in order. Every change *or growth* of own tokens is passed on
  upwards in the same transition.
- Draws count only for the context they were computed on.

No clock, no I/O, no threads, no torch. Source: PipeSpec, arXiv 2505.01572, with parent hashes in
place of its shared counters.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipespec.hashing import ROOT, extend
from pipespec.messages import Draft, Link, Message, Output, Submit, Verdict
from pipespec.state.counts import Counts

Outgoing = tuple[Link, Message]
FinishCheck = Callable[[int], str]  # the next output token -> finish reason, "" to go on


@dataclass(slots=True)
class Role:
    """Where a stage stands and what bounds it; one object for all its requests.

    run_ahead: tokens it may be ahead of the last verdict (the last stage has no such bound).
    max_candidates: the most that the stage before it may be ahead. batch: tokens that a first draft
    collects before it sends them. A policy may change the bounds between two transitions.
    context_length: positions that the stage's own model can hold; a draft whose context is full
    stops drafting, the target's was checked before the request was submitted.
    """

    index: int
    num_stages: int
    run_ahead: int
    max_candidates: int
    batch: int = 1
    context_length: int = 1 << 40

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @property
    def is_last(self) -> bool:
        return self.index == self.num_stages - 1


@dataclass(frozen=True, slots=True)
class Step:
    """One forward to run: feed `ids` at position `start`, take the draws after the last
    `num_candidates + 1` of them. `base` is the position that the first draw is for."""

    request: int
    start: int
    ids: tuple[int, ...]
    num_candidates: int
    is_prefill: bool = False

    @property
    def base(self) -> int:
        return self.start + len(self.ids) - self.num_candidates

    @property
    def end(self) -> int:
        return self.start + len(self.ids)


class RequestState:
    """The state of one request at one stage. Owned by exactly one `StageState`."""

    __slots__ = (
        "acked", "cands", "check_finish", "context_is_short", "counts", "drafter_stopped", "eos",
        "finish_reason", "hashes", "intact", "kv_valid", "limit", "num_verdicts_sent",
        "prompt_len", "request", "role", "sent", "seq", "step", "submit", "verdict_seen",
        "waiting_until",
    )  # fmt: skip

    def __init__(self, submit: Submit, role: Role, check_finish: FinishCheck) -> None:
        self.submit = submit
        self.request = submit.request
        self.role = role
        self.check_finish = check_finish
        self.eos = frozenset(submit.eos)
        self.prompt_len = len(submit.prompt)
        self.limit = self.prompt_len + submit.max_new_tokens
        self.context_is_short = not role.is_last and role.context_length + 1 < self.limit
        if self.context_is_short:
            self.limit = role.context_length + 1
        self.seq: list[int] = []
        self.hashes = array("Q", [ROOT])  # hashes[n] names seq[:n]
        self.cands: list[int] = []
        self.drafter_stopped = False  # nothing follows `cands` until the drafter hears from us
        self.finish_reason = ""
        for token in submit.prompt:
            self._append(token)
        for token in submit.committed:
            self._append(token)
            if role.is_last:
                self.finish_reason = check_finish(token)
        self.sent = self.acked = len(self.seq)
        self.num_verdicts_sent = 0
        self.verdict_seen = 0
        self.kv_valid = 0  # the runner's cache holds seq[:kv_valid]
        self.step: Step | None = None
        self.intact = 0  # how much of seq no verdict has touched since the step in flight began
        self.waiting_until: float | None = None
        self.counts = Counts()

    # -- what may happen next ---------------------------------------------------------------

    @property
    def remaining(self) -> int:
        """Tokens until max_new_tokens, or until the context of a draft is full (then negative)."""
        return self.limit - len(self.seq)

    @property
    def room(self) -> int:
        """Tokens this stage may still add before it must hear a verdict."""
        if self.role.is_last:
            return self.remaining
        return min(self.role.run_ahead - (len(self.seq) - self.acked), self.remaining)

    @property
    def is_ended(self) -> bool:
        """No token can follow: the target said so, or a draft drew an end of text."""
        if self.role.is_last:
            return bool(self.finish_reason)
        return len(self.seq) > self.prompt_len and self.seq[-1] in self.eos

    @property
    def can_step(self) -> bool:
        return self.step is None and self.room > 0 and not self.is_ended

    @property
    def is_prefill(self) -> bool:
        """The next step still has prompt tokens to compute."""
        return self.kv_valid < self.prompt_len

    def hash_at(self, position: int) -> int:
        """Hash of own tokens plus candidates before `position`."""
        if position <= len(self.seq):
            return self.hashes[position]
        prefix = self.hashes[-1]
        for token in self.cands[: position - len(self.seq)]:
            prefix = extend(prefix, token)
        return prefix

    # -- events -----------------------------------------------------------------------------

    def on_draft(self, draft: Draft) -> bool:
        """Tokens that may follow; False if they follow a prefix that is not held here. Nothing is
        sent: what they lead to is seen at the next step."""
        start, known = draft.start, len(self.seq) + len(self.cands)
        if start > known or self.hash_at(start) != draft.parent:
            self.counts.num_stale_drafts += len(draft.tokens)
            return False
        for position, token in enumerate(draft.tokens, start):
            ahead = position - len(self.seq)
            if ahead < 0:
                if self.seq[position] != token:
                    return True  # the verdict that says so is on its way already
            elif ahead == len(self.cands):
                self.cands.append(token)
            elif self.cands[ahead] != token:
                self.cands[ahead:] = [token]
        if start + len(draft.tokens) == len(self.seq) + len(self.cands):
            self.drafter_stopped = draft.last
        if len(self.cands) > self.role.max_candidates:
            self.counts.num_overflows += 1
            del self.cands[self.role.max_candidates :]
        return True

    def on_verdict(self, verdict: Verdict) -> list[Outgoing]:
        """The next stage's own tokens from `start` on; ours follow them."""
        expected = verdict.number == self.verdict_seen + 1
        if verdict.number <= self.verdict_seen or not (expected or verdict.full):
            self.counts.num_dropped_verdicts += 1
            return []
        if verdict.start > len(self.seq):
            self.counts.num_dropped_verdicts += 1
            return []
        self.verdict_seen = verdict.number
        start, tokens = verdict.start, verdict.tokens
        end = start + len(tokens)
        same = _common_length(self.seq, start, tokens)
        self.acked = end
        outgoing: list[Outgoing] = []
        if same < len(tokens):
            first_new = start + same
            self._roll_back(first_new)
            for token in tokens[same:]:
                self._push(token)
            self.sent = len(self.seq)
            outgoing += self._send_up(first_new)
        elif verdict.full:
            self.sent = end  # the receiver lost its candidates: what follows is sent again
        else:
            self.sent = max(self.sent, end)
        return outgoing + self.flush()

    def begin_step(self, most: int) -> Step:
        """Starts a forward over what the cache lacks and as many candidates as are of use, at most
        `most`."""
        assert self.can_step
        num_candidates = 0 if self.is_prefill else min(len(self.cands), self.room - 1, most)
        start = min(self.kv_valid, len(self.seq) - 1)
        ids = (*self.seq[start:], *self.cands[:num_candidates])
        self.step = Step(self.request, start, ids, num_candidates, self.is_prefill)
        self.intact = len(self.seq)
        self.waiting_until = None
        return self.step

    def end_step(self, draws: Sequence[int], start_s: float, end_s: float) -> list[Outgoing]:
        """The forward is done; `draws[j]` is the choice for position `step.base + j`."""
        step = self.step
        assert step is not None and len(draws) == step.num_candidates + 1
        self.step = None
        fed = step.ids[len(step.ids) - step.num_candidates :]  # the candidates, from step.base on
        if self.intact < step.base:
            valid = self.intact
        else:
            valid = step.base + _common_length(self.seq, step.base, fed)
        self.kv_valid = valid
        if valid < len(self.seq):
            self.counts.num_discarded_steps += 1
            self.counts.log_step(step, 0, 0, start_s, end_s)
            return []
        first_new, num_accepted, accepted = len(self.seq), 0, True
        while not self.is_ended and self.remaining > 0:
            position = len(self.seq)
            token = draws[position - step.base]
            accepted = position < step.end and fed[position - step.base] == token
            self._push(token)
            if self.role.is_last:
                self.finish_reason = self.check_finish(token)
            num_accepted += accepted
            if not accepted:
                break
        rejected = not accepted and len(self.seq) <= step.end
        self.kv_valid = min(step.end, len(self.seq) - rejected)
        num_emitted = len(self.seq) - first_new
        self.counts.log_step(step, num_accepted, num_emitted, start_s, end_s)
        return self._send_up(first_new) + self.flush()

    def flush(self) -> list[Outgoing]:
        """Drafts not sent yet, within the bound on run-ahead, if at least a batch or the last."""
        if self.role.is_last:
            return []
        end = min(len(self.seq), self.acked + self.role.run_ahead)
        num_unsent = end - self.sent
        stops = self.room <= 0 or self.is_ended
        # Nobody may wait for a draft whose context is full, so it says so, with no tokens.
        has_news = num_unsent > 0 or (self.context_is_short and self.remaining <= 0)
        if not has_news or (num_unsent < self.role.batch and not stops):
            return []
        parent, tokens = self.hashes[self.sent], tuple(self.seq[self.sent : end])
        draft = Draft(self.request, parent, self.sent, tokens, stops)
        self.sent = end
        return [(Link.DOWN, draft)]

    def full_verdict(self) -> list[Outgoing]:
        """Everything a stage above needs to take part from nothing; idempotent."""
        if self.role.is_first:
            return []
        self.num_verdicts_sent += 1
        tokens = tuple(self.seq[self.prompt_len :])
        verdict = Verdict(self.request, self.num_verdicts_sent, self.prompt_len, tokens, True)
        return [(Link.UP, self.submit), (Link.UP, verdict)]

    # -- parts of the transitions -----------------------------------------------------------

    def _append(self, token: int) -> None:
        self.seq.append(token)
        self.hashes.append(extend(self.hashes[-1], token))

    def _push(self, token: int) -> None:
        """Own tokens grow by one: consume the candidate that says the same, or drop the branch."""
        if self.cands and self.cands[0] == token:
            self.cands.pop(0)
        else:
            self.cands.clear()
            self.drafter_stopped = False
        self._append(token)

    def _roll_back(self, length: int) -> None:
        num_removed = len(self.seq) - length
        if num_removed <= 0:
            return
        self.cands.clear()
        self.drafter_stopped = False
        del self.seq[length:]
        del self.hashes[length + 1 :]
        self.kv_valid = min(self.kv_valid, length)
        self.intact = min(self.intact, length)
        self.counts.num_rollbacks += 1
        self.counts.num_rolled_back += num_removed

    def _send_up(self, first_new: int) -> list[Outgoing]:
        """Own tokens from `first_new` on, to the stage above and, from the target, as output."""
        tokens = tuple(self.seq[first_new:])
        outgoing: list[Outgoing] = []
        if not tokens:
            return outgoing
        if self.role.is_last:
            output = Output(self.request, first_new, tokens, self.finish_reason)
            outgoing.append((Link.LAUNCHER, output))
        if not self.role.is_first:
            self.num_verdicts_sent += 1
            number = self.num_verdicts_sent
            verdict = Verdict(self.request, number, first_new, tokens, False)
            outgoing.append((Link.UP, verdict))
        return outgoing


def _common_length(seq: Sequence[int], start: int, tokens: Sequence[int]) -> int:
    """How many of `tokens` equal `seq[start:]`, in order."""
    own = seq[start : start + len(tokens)]
    for count, (mine, theirs) in enumerate(zip(own, tokens)):
        if mine != theirs:
            return count
    return len(own)
