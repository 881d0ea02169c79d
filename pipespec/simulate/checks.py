"""What must hold besides equal text.

The target commits only its own draws, so nearly any protocol bug still gives the right text. These
checks see what the text hides: whose prefix a candidate was drafted on, on which context a draw was
made, what the KV cache really holds, how far ahead a stage runs.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from pipespec.emulation import TokenOracle
from pipespec.hashing import extend, hash_tokens
from pipespec.messages import Draft
from pipespec.simulate.cache import Cache
from pipespec.state.candidates import Twig
from pipespec.state.request import RequestState
from pipespec.state.step import Step

Path = tuple[int, ...]  # tokens from the end of the own sequence to a candidate


class InvariantViolation(AssertionError):
    """The protocol broke one of its promises; the text names it."""


def check(holds: bool, promise: str) -> None:
    if not holds:
        raise InvariantViolation(promise)


def check_step(request: RequestState, step: Step, cache: Cache) -> None:
    """At the start of a forward, after rows were kept."""
    check(bool(step.ids or step.tail), "a step feeds something")
    context = request.seq + request.cands.main[: step.num_candidates]
    check(cache.tokens(step.start) == request.seq[: step.start], "KV ids equal the prefix")
    check(cache.is_path(step.start), "KV holds what the step builds on")
    check(list(step.ids) == context[step.start : step.end], "a step feeds own tokens, then others")
    check(not step.ids or step.base <= len(request.seq), "a step draws the next own token")
    check(step.num_candidates < max(1, request.room), "a step stays within the room")


def check_next(
    request: RequestState, step: Step, following: Step, draws: Sequence[tuple[int, ...]]
) -> None:
    """Before the next forward of a step."""
    check(bool(following.ids or following.tail), "a step feeds something")
    own = [draws[step.num_draws - 1][0]] if step.ids else []
    check(list(following.ids) == own, "a step goes on from its own draw")
    check(following.start == step.end, "a step goes on where it was")
    check(following.end <= request.acked + request.role.run_ahead, "a step stays within the room")
    check(following.end < request.limit, "nothing is fed that nobody wants to go on from")
    check(following.num_more == step.num_more - 1, "a step ends")
    count = len(following.tail)
    drawn = [ranked[0] for ranked in draws[step.num_draws :]]
    fed = [(feed.token, feed.parent_row, feed.position) for feed in following.tail]
    expected = [(token, x.row, x.position + 1) for token, x in zip(drawn, step.tail)]
    check(fed == expected[:count], "branches go on from their own draws")
    first_row = step.tail[-1].row + 1 if step.tail else 0
    rows = [feed.row for feed in following.tail]
    check(rows == list(range(first_row, first_row + count)), "a runner knows the next rows")


def check_feed(request: RequestState, step: Step, index: int, cache: Cache) -> None:
    """Before an item of the tail is fed: what it follows is the prefix that it was made for."""
    feed = step.tail[index]
    if index < len(step.twigs):
        prefix = _prefix_of(request, step.twigs[index].before)
        check(feed.row >= step.end, "a candidate beside the main path keeps clear of its rows")
    else:
        branch = step.branches[index - len(step.twigs)]
        before = branch.tokens[: feed.position - branch.position]
        prefix = hash_tokens(request.seq[: branch.position] + before)
        reach = request.acked + request.role.run_ahead
        check(feed.row > reach, "a branch keeps clear of own rows")
        check(feed.row > feed.position, "a branch is copied forwards")
        check(feed.position < request.limit - 1, "nothing is fed that nobody wants to go on from")
    check(feed.row > feed.parent_row, "a row comes after those that it sees")
    check(cache.hash_of(feed.parent_row) == prefix, "a branch is fed on the prefix it follows")


def _prefix_of(request: RequestState, place: Twig | int) -> int:
    """The hash of own text and candidates up to a place among them."""
    if isinstance(place, int):
        return hash_tokens(request.seq + request.cands.main[:place])
    return extend(_prefix_of(request, place.before), place.token)


def check_draws(request: RequestState, num_before: int, oracle: TokenOracle) -> None:
    """After a forward: every token it added is the model's choice for the prefix before it."""
    for position in range(num_before, len(request.seq)):
        expected = oracle.draw(request.hashes[position])
        check(request.seq[position] == expected, "draws are used only on their own context")


def check_draft(request: RequestState, draft: Draft) -> None:
    """Before a Draft is sent: each token stands where its drafter drew it."""
    texts = [request.seq]
    for branch in request.outcomes.branches.values():
        texts.append(request.seq[: branch.position] + branch.tokens)
    held = {tuple(text[:n]) for text in texts for n in range(draft.start + 1, len(text) + 1)}
    check(held.issuperset(_paths(draft, request.seq)), "a draft says what was drawn")


def _paths(draft: Draft, drafter: Sequence[int]) -> list[Path]:
    """The whole text up to each of the tokens, given the sequence of the drafter."""
    ends: list[Path] = []
    for index, token in enumerate(draft.tokens):
        parent = index - 1 if index < draft.num_own else draft.parents[index - draft.num_own]
        ends.append((*(ends[parent] if parent >= 0 else drafter[: draft.start]), token))
    return ends


def check_candidates(
    request: RequestState, before: Collection[Path], draft: Draft, ghost: Sequence[int]
) -> None:
    """After a Draft. before: the paths of the candidates until then. ghost: the whole sequence of
    the drafter, which no real Draft carries."""
    drafted, own = set(_paths(draft, ghost)), tuple(request.seq)
    for path in request.cands.paths():
        if path not in before:
            check(own + path in drafted, "a candidate was drafted on the prefix it follows")


def check_caps(request: RequestState, *, reliable: bool) -> None:
    """After every transition."""
    role = request.role
    most = role.max_candidates + role.max_branch_tokens
    check(len(request.cands) <= most, "candidates stay within the cap")
    if not role.is_last:
        check(request.sent <= request.acked + role.run_ahead, "sent drafts stay within run-ahead")
        check(request.sent <= len(request.seq), "only own tokens are sent")
    check_rows(request)
    if reliable:
        if not role.max_branch_tokens:  # a branch may take the place of a main path not held yet
            in_cap = len(request.cands.main) <= role.max_candidates
            check(in_cap, "the main path stays within its cap")
        check(request.counts.num_overflows == 0, "nobody sends more than the next stage takes")
        check(request.counts.num_dropped_verdicts == 0, "no verdict is out of order")


def check_rows(request: RequestState) -> None:
    """Who holds which cache row beyond the own text."""
    rows = [row for branch in request.outcomes.branches.values() for row in branch.rows]
    if request.step is not None:
        rows += request.burst.reserved
        rows += [feed.row for feed, _ in zip(request.step.tail, request.step.twigs)]
    check(len(rows) == len(set(rows)), "no two hold the same row")
    num_used = request.rows.count - request.rows.num_free
    check(len(rows) == num_used, "a row that nobody holds is free")


def check_hashes(request: RequestState) -> None:
    """The incremental hashes name the sequence (checked at the end: it costs O(sequence))."""
    check(len(request.hashes) == len(request.seq) + 1, "one hash for each prefix")
    check(request.hashes[-1] == hash_tokens(request.seq), "hashes name the sequence")
