"""What a stage feeds beside its own text in one forward, and what it tells of it.

Two things share the rows: candidates of other branches than the main path, to be verified now, and
prepared outcomes, to be continued for later. What either is worth is known here; how much of it a
forward has time for, a policy knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipespec.messages import Draft, Link, Message
from pipespec.state.candidates import Twig
from pipespec.state.outcomes import Branch
from pipespec.state.tail import Feed

if TYPE_CHECKING:
    from pipespec.state.request import RequestState


def offers_beside(request: RequestState, most: int) -> list[Twig | Branch]:
    """What the next forward could feed beside the main path, of which it verifies at most
    `most` candidates: best first, parents before children."""
    if not request.rows.count or request.is_prefill:
        return []
    num_candidates = request.num_usable(most) if request.can_step else 0
    end = len(request.seq) if request.can_step else request.kv_valid
    request.outcomes.make_room(end + num_candidates)
    found: list[Twig | Branch] = []
    if request.can_step and request.role.max_twigs:
        stats = request.candidate_stats
        found += request.cands.twigs(
            num_candidates, request.role.max_twigs, request.room - 1, stats.agreement, stats.share
        )
    if request.role.outcomes.num_ranked:
        found += request.outcomes.offers(request.acked, end)
    return sorted(found, key=lambda extra: -extra.value)


def place_feeds(
    request: RequestState, twigs: Sequence[Twig], branches: Sequence[Branch]
) -> tuple[list[Feed], list[Twig], list[Branch]]:
    """Finds cache rows for what is fed beside the own text: the feeds, and those who got one;
    twigs first, each after what it follows."""
    # Each row comes after those that it sees, so that a runner need not look beyond it.
    seen = [branch.rows[-1] + 1 for branch in branches if branch.rows]
    begin = _first_tail_row(request)
    rows = request.rows.take(
        len(twigs) + len(branches), max([begin, *seen]), begin + 2 * request.rows.count
    )
    length = len(request.seq)
    feeds: list[Feed] = []
    row_of: dict[Twig, int] = {}
    for twig, row in zip(twigs, rows):
        row_of[twig] = row
        before = twig.before
        parent_row = length + before - 1 if isinstance(before, int) else row_of[before]
        feeds.append(Feed(twig.token, length + twig.depth, row, parent_row))
    fed = branches[: len(rows) - len(feeds)]
    feeds += [request.outcomes.feed(branch, row) for branch, row in zip(fed, rows[len(feeds) :])]
    return feeds, list(twigs[: len(rows)]), list(fed)


def branch_draft(request: RequestState) -> list[tuple[Link, Message]]:
    """Prepared continuations that the next stage does not have yet, as one tree."""
    batch = 5 * request.role.batch - 4  # a slow drafter sends each token at once
    branches = request.outcomes.unsent(request.sent, batch)
    if not branches:
        return []
    end = max(branch.position for branch in branches)
    tokens = list(request.seq[request.acked : end])
    parents = list(range(-1, len(tokens) - 1))
    for branch in branches:
        parent = branch.position - request.acked - 1
        for token in branch.tokens:
            parents.append(parent)
            parent = len(tokens)
            tokens.append(token)
        branch.num_sent = len(branch.tokens)
    prefix_hash = request.hashes[request.acked]
    draft = Draft(request.request, prefix_hash, request.acked, tuple(tokens), False, tuple(parents))
    return [(Link.DOWN, draft)]


def _first_tail_row(request: RequestState) -> int:
    """Beyond every row that own tokens may reach before the next verdict, or, at the target, in
    the next step; and beyond all that a branch of them may be copied to."""
    role = request.role
    if role.is_last:
        return len(request.seq) + role.max_candidates + 1
    reach = max(request.acked + role.run_ahead, len(request.seq))
    return reach + role.outcomes.length + 1
