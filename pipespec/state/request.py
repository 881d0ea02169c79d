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

import math
from array import array
from collections.abc import Callable, Sequence
from itertools import accumulate

from pipespec.hashing import ROOT, extend
from pipespec.messages import Draft, Link, Message, Submit, Verdict
from pipespec.state.beside import Extra, make_draft, num_to_follow, place_feeds
from pipespec.state.burst import Burst
from pipespec.state.candidates import Candidates, Twig, branches_of, common_length
from pipespec.state.counts import Counts
from pipespec.state.outcomes import Branch, Outcomes, Ranked, RankStats, grow
from pipespec.state.step import Role, Step
from pipespec.state.tail import TailRows
from pipespec.state.tell import tell, tell_all
from pipespec.state.verification import verify

MAX_ALTERNATIVES = 8  # of a candidate; more are not verified beside it

Outgoing = tuple[Link, Message]
FinishCheck = Callable[[int], str]  # the next output token -> finish reason, "" to go on


class RequestState:
    """The state of one request at one stage. Owned by exactly one `StageState`."""

    __slots__ = (
        "acked", "adopted", "ahead", "burst", "candidate_stats", "cands", "check_finish",
        "context_is_short", "counts", "drafter_stopped", "eos", "finish_reason", "hashes", "intact",
        "keep", "keep_start", "kv_valid", "limit", "num_main_accepted", "num_output",
        "num_steps_output", "num_told", "num_verdicts_sent", "outcomes", "output_at_s",
        "prompt_len", "request", "role", "rows", "sent", "seq", "step", "submit", "verdict_seen",
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
        self.seq = list(submit.prompt)
        # hashes[n] names seq[:n]
        self.hashes = array("Q", accumulate(submit.prompt, extend, initial=ROOT))
        self.drafter_stopped = False  # nothing follows `cands` until the drafter hears from us
        self.finish_reason = ""
        most = role.max_candidates + role.max_branch_tokens
        self.cands = Candidates(self.prompt_len, self.hashes[-1], most)
        for token in submit.committed:
            self._push(token)
            if role.is_last:
                self.finish_reason = check_finish(token)
        self.sent = self.acked = len(self.seq)
        self.num_verdicts_sent = self.verdict_seen = 0
        self.num_told = self.num_output = len(self.seq)  # so much the others know
        self.num_steps_output = 0  # decode steps of which the launcher has heard
        self.output_at_s = -math.inf
        self.kv_valid = 0  # the runner's cache holds seq[:kv_valid]
        self.step: Step | None = None  # the forward in flight
        self.burst = Burst(range(0))
        self.intact = 0  # how much of seq no verdict has touched since the step in flight began
        self.waiting_until: float | None = None
        num_rows = role.outcomes.num_rows if role.outcomes.num_ranked else 0
        self.rows = TailRows(num_rows + role.max_twigs)
        self.outcomes = Outcomes(role.outcomes, self.rows, role.run_ahead, self.limit, self.eos)
        self.ahead = self.role.worth_drafting(self.outcomes.stats)  # tokens beyond `acked`
        self.candidate_stats = RankStats(MAX_ALTERNATIVES)
        self.num_main_accepted = 0  # candidates of the main path, in the step that ended last
        self.adopted: Branch | None = None  # by a verdict that overtook the step in flight
        self.keep: tuple[int, ...] = ()  # cache rows to copy to `keep_start` before the next step
        self.keep_start = 0
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
        return min(self.ahead - (len(self.seq) - self.acked), self.remaining)

    @property
    def is_ended(self) -> bool:
        """No token can follow: the target said so, or a draft drew an end of text."""
        if self.role.is_last:
            return bool(self.finish_reason)
        return len(self.seq) > self.prompt_len and self.seq[-1] in self.eos

    @property
    def can_step(self) -> bool:
        """Own tokens may follow."""
        return self.step is None and self.room > 0 and not self.is_ended

    @property
    def can_prepare(self) -> bool:
        """Outcomes, if any are left, may be prepared although no own tokens may follow: only a
        first draft has the time."""
        return self.role.is_first and self.step is None and self.rows.count > 0

    @property
    def is_prefill(self) -> bool:
        """The next step still has prompt tokens to compute."""
        return self.kv_valid < self.prompt_len

    # -- events -----------------------------------------------------------------------------

    def on_draft(self, draft: Draft) -> bool:
        """Tokens that may follow; False if they follow a prefix that is not held here. Nothing is
        sent: what they lead to is seen at the next step."""
        start, length = draft.start, len(self.seq)
        if not self._holds(start, draft.parent):
            self.counts.num_stale_drafts += len(draft.tokens)
            return False
        cands, own = self.cands, draft.tokens[: draft.num_own]
        reach = start + common_length(self.seq, start, own)  # so far it says what is held here
        if reach >= length:
            num_refused = cands.add(reach, own[reach - start :])
            self.counts.num_overflows += num_refused
            reach = start + len(own) - num_refused
        if (own or not draft.parents) and reach == start + len(own) == cands.end:
            self.drafter_stopped = draft.last
        for position, tokens in branches_of(draft):
            known = common_length(self.seq, position, tokens)
            if length <= position + known and position <= reach:
                self.counts.num_overflows += cands.add_branch(position + known, tokens[known:])
        return True

    def on_verdict(self, verdict: Verdict) -> list[Outgoing]:
        """The next stage's own tokens from `start` on; ours follow them."""
        expected = verdict.number == self.verdict_seen + 1
        is_next = verdict.number > self.verdict_seen and (expected or verdict.full)
        if not is_next or verdict.start > len(self.seq):
            self.counts.num_dropped_verdicts += 1
            return []
        self.verdict_seen = verdict.number
        self.burst.is_cut = True
        start, tokens = verdict.start, verdict.tokens
        end = start + len(tokens)
        same = common_length(self.seq, start, tokens)
        first_new, rest = start + same, tokens[same:]
        ahead = self.ahead
        is_corrected = bool(rest) and first_new < len(self.seq)
        self.counts.num_corrections += is_corrected
        self.outcomes.observe(same, first_new, rest[0] if is_corrected else None)
        self.ahead = self.role.worth_drafting(self.outcomes.stats)
        self.acked = end
        outgoing, is_hit = list[Outgoing](), False
        if rest:
            branch = self.outcomes.match(first_new, rest)
            self._roll_back(first_new)
            for token in rest:
                self._push(token)
            self.sent = len(self.seq)
            is_hit = branch is not None
            if branch is not None:
                self._adopt(branch, len(rest))
            outgoing += self._send_up(first_new)
        elif verdict.full:
            self.sent = end  # the receiver lost its candidates: what follows is sent again
        else:
            self.sent = max(self.sent, end)
        self.outcomes.forget_before(end, was_lost=verdict.full)
        return outgoing + self.flush(is_answer=is_hit or self.ahead < ahead)

    def num_usable(self, most: int) -> int:
        """Candidates that the next forward verifies, if it verifies at most `most`."""
        if self.is_prefill or not self.cands.main:
            return 0
        return min(len(self.cands.main), self.role.max_candidates, self.room - 1, most)

    def begin_step(
        self, most: int, extras: Sequence[Extra] = (), *, takes_own: bool = True
    ) -> Step | None:
        """Starts a forward: over what the cache lacks and as many candidates as are of use, at most
        `most`, if takes_own and own tokens may follow; and over `extras`, the best of those that
        `offers_beside` found. None if there is nothing to feed or no row left for it."""
        num_candidates, start = 0, self.kv_valid
        ids: tuple[int, ...] = ()
        cases = [extra for extra in extras if not isinstance(extra, Twig)]
        branches = [self.outcomes.branch(case) for case in cases]
        cached = [branch for branch in branches if branch.position <= start]
        twigs: list[Twig] = []
        if self.can_step and (takes_own or not cached):
            num_candidates = self.num_usable(most)
            start = min(start, len(self.seq) - 1)
            ids = (*self.seq[start:], *self.cands.main[:num_candidates])
            twigs = [extra for extra in extras if isinstance(extra, Twig)]
        num_more = num_to_follow(self, has_own=bool(ids))
        feeds = place_feeds(self, twigs, branches if ids else cached, num_more)
        if not ids and not feeds.tail:
            if branches:
                self.outcomes.start_over()
            return None
        keep, self.keep = self.keep, ()
        self.step = Step(
            self.request, start, ids, num_candidates, self.is_prefill, feeds.tail, feeds.twigs,
            feeds.branches, keep, self.keep_start, num_more, feeds.rounds,
        )  # fmt: skip
        self.burst = Burst(feeds.reserved)
        self.intact = len(self.seq)
        self.waiting_until = None
        return self.step

    def draw_on(self, draws: Sequence[Ranked]) -> Step | None:
        """The forward in flight drew this, as for `end_step`: the next one of the same step. None
        if there is none, or if a verdict has come, which may have voided what it would build on;
        the draws are for `end_step` then."""
        if self.step is None or self.burst.is_cut:
            return None
        following = self.burst.go_on(self.step, draws)
        self.step = following or self.step
        return following

    def end_step(self, draws: Sequence[Ranked], start_s: float, end_s: float) -> list[Outgoing]:
        """The forward is done. `draws[j]`: tokens by rank for position `step.base + j`, the choice
        first; then for the position after each of `step.tail`."""
        last = self.step
        assert last is not None and len(draws) == last.num_draws + len(last.tail)
        self.rows.free(feed.row for feed, _ in zip(last.tail, last.twigs))
        self.rows.free(self.burst.reserved)
        grow(last.branches, draws[last.num_draws + len(last.twigs) :])
        step, draws = self.burst.end(last, draws)
        self.step, self.num_main_accepted = None, 0
        if self.adopted is not None or not step.ids:
            return self._end_overtaken_step(step, start_s, end_s)
        self.kv_valid = min(self.intact, step.base)
        if self.intact >= step.base:
            fed = step.ids[step.base_index :]
            self.kv_valid += common_length(self.seq, step.base, fed)
        if self.kv_valid < len(self.seq):
            self.counts.num_discarded_steps += len(self.burst.steps)
            self.counts.log_step(self.burst.steps, 0, 0, start_s, end_s)
            return []
        num_accepted, num_emitted = self._take(step, draws)
        self.counts.log_step(self.burst.steps, num_accepted, num_emitted, start_s, end_s)
        return self._send_up(len(self.seq) - num_emitted, end_s) + self.flush()

    def _take(self, step: Step, draws: Sequence[Ranked]) -> tuple[int, int]:
        """Own tokens follow: the candidates that were drawn, and one more. Returns how many
        candidates were accepted and how many tokens followed."""
        first_new = len(self.seq)
        verified = verify(step, draws, first_new - step.base)
        if self.role.max_twigs and step.num_candidates:
            is_rejected = first_new + verified.num_main < step.end
            token = verified.draws[verified.num_main][0]
            rank = self.cands.rank(verified.num_main, token) if is_rejected else None
            self.candidate_stats.observe(verified.num_main, rank, corrected=is_rejected)
        for token, *others in verified.draws:
            if self.is_ended or self.remaining <= 0:
                break
            self.outcomes.learn(len(self.seq), others)
            self._push(token)
            if self.role.is_last:
                self.finish_reason = self.check_finish(token)
        num_emitted = len(self.seq) - first_new
        num_accepted = min(verified.num_main + len(verified.rows), num_emitted)
        self.num_main_accepted = min(verified.num_main, num_accepted)
        self.kv_valid = first_new + num_accepted
        self.keep_start = first_new + self.num_main_accepted
        self.keep = tuple(verified.rows[: num_accepted - self.num_main_accepted])
        return num_accepted, num_emitted

    def flush(self, *, is_answer: bool = False, is_urgent: bool = False) -> list[Outgoing]:
        """Drafts not sent yet, within the bound on run-ahead, if at least a batch or the last.

        is_answer: the next stage may wait to hear that nothing follows. is_urgent: no more will
        come soon."""
        if self.role.is_last:
            return []
        end = min(len(self.seq), self.acked + self.role.run_ahead)
        num_unsent = end - self.sent
        stops = self.room <= 0 or self.is_ended
        # Nobody may wait for a draft whose context is full, so it says so, with no tokens.
        has_news = num_unsent > 0 or (self.context_is_short and self.remaining <= 0)
        has_news |= is_answer and stops
        is_due = num_unsent >= self.role.batch or stops or is_urgent
        # A slow drafter sends each token of a branch at once.
        branches = self.outcomes.unsent(end, 5 * self.role.batch - 4)
        if not branches and not (has_news and is_due):
            return []
        draft = make_draft(self, end, stops, branches)
        self.sent = max(self.sent, end)
        return [(Link.DOWN, draft)]

    def full_verdict(self) -> list[Outgoing]:
        """Everything a stage above needs to take part from nothing; idempotent."""
        return tell_all(self)

    # -- parts of the transitions -----------------------------------------------------------

    def _holds(self, length: int, prefix_hash: int) -> bool:
        """Whether so many own tokens and candidates have this hash."""
        if length < len(self.seq):
            return self.hashes[length] == prefix_hash
        return self.cands.has(length, prefix_hash)

    def _adopt(self, branch: Branch, num_known: int) -> None:
        """A prepared verdict came and brought `num_known` of the branch's tokens: go on with the
        others as if they had been drawn now."""
        self.outcomes.adopt(branch)
        self.counts.num_outcome_hits += 1
        for token in branch.tokens[num_known:]:
            if self.is_ended or self.room <= 0:
                break
            self._push(token)
            self.counts.num_drafted += 1
        self.sent = min(len(self.seq), branch.position + max(num_known, branch.num_sent))
        self.keep_start, self.keep = branch.position, tuple(branch.rows)
        self.keep = self.keep[: len(self.seq) - self.keep_start]
        self.kv_valid = branch.position + len(self.keep)
        if self.step is not None:
            self.adopted = branch

    def _end_overtaken_step(self, step: Step, start_s: float, end_s: float) -> list[Outgoing]:
        """Nothing was drawn for the own sequence, unless a branch in the step has become it."""
        branch, self.adopted = self.adopted, None
        num_emitted = 0
        if branch is not None:
            is_next = branch.position + len(branch.tokens) - 1 == len(self.seq)
            is_fed = branch in step.branches
            if is_fed and is_next and self.room > 0 and not self.is_ended:
                self._push(branch.tokens[-1])
                self.outcomes.learn(len(self.seq) - 1, branch.ranked[-1][1:])
                num_emitted = 1
        self.counts.num_discarded_steps += len(self.burst.steps) if step.ids else 0
        self.counts.log_step(self.burst.steps, 0, num_emitted, start_s, end_s)
        told = self._send_up(len(self.seq) - num_emitted) if num_emitted else []
        return told + self.flush(is_urgent=True)

    def _push(self, token: int) -> None:
        """Own tokens grow by one: consume the candidate that says the same, or drop the branch."""
        if not self.cands.follow(token):
            self.drafter_stopped = False
        self.seq.append(token)
        self.hashes.append(self.cands.prefix_hash)

    def _roll_back(self, length: int) -> None:
        num_removed = len(self.seq) - length
        if num_removed <= 0:
            return
        self.drafter_stopped = False
        del self.seq[length:]
        del self.hashes[length + 1 :]
        self.cands.clear(length, self.hashes[-1])
        self.outcomes.clear(length)
        self.adopted = None
        self.keep = self.keep[: max(0, length - self.keep_start)]
        self.kv_valid = min(self.kv_valid, length)
        self.intact = min(self.intact, length)
        self.counts.num_rollbacks += 1
        self.counts.num_rolled_back += num_removed

    def _send_up(self, first_new: int, now_s: float = 0.0) -> list[Outgoing]:
        """Own tokens from `first_new` on, to the stage above and, from the target, as output."""
        return tell(self, first_new, now_s)
