"""What a stage feeds beside its own text in one forward, and what it tells of it.

Two things share the rows: candidates of other branches than the main path, to be verified now, and
prepared outcomes, to be continued for later. What either is worth is known here; how much of it a
forward has time for, a policy knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from typing import TYPE_CHECKING, NamedTuple

from pipespec.messages import Draft
from pipespec.state.candidates import Twig
from pipespec.state.outcomes import Branch, Case
from pipespec.state.tail import TailToken

if TYPE_CHECKING:
    from pipespec.state.request import RequestState


Extra = Twig | Case


def offers_beside(request: RequestState, most: int) -> list[tuple[float, Extra]]:
    """What the next forward could feed beside the main path, of which it verifies at most
    `most` candidates: best first, each after its value, parents before children."""
    if not request.rows.count or request.is_prefill:
        return []
    can_step = request.can_step
    num_candidates = request.num_usable(most) if can_step else 0
    end = len(request.seq) if can_step else request.kv_valid
    num_more = num_to_follow(request, has_own=True) if can_step else 0
    request.outcomes.make_room(end + num_candidates + num_more)
    found: list[tuple[float, Extra]] = []
    if can_step and request.role.max_twigs:
        stats = request.candidate_stats
        twigs = request.cands.twigs(
            num_candidates, request.role.max_twigs, request.room - 1, stats.agreement, stats.share
        )
        found += [(twig.value, twig) for twig in twigs]
    if not request.role.outcomes.num_ranked:
        return found
    found += request.outcomes.offers(request.acked, end)
    return sorted(found, key=itemgetter(0), reverse=True) if request.role.max_twigs else found


def num_to_follow(request: RequestState, *, has_own: bool) -> int:
    """How many forwards may follow the next one in the same step, whether that feeds own tokens or
    branches only."""
    if not request.role.is_first or request.is_prefill:
        return 0
    return (min(request.role.batch, request.room) if has_own else request.role.batch) - 1


class Feeds(NamedTuple):
    """What is fed beside the own text, and who got a place: twigs first, each after what it
    follows. rounds: as of `Step`. reserved: the cache rows for these."""

    tail: tuple[TailToken, ...] = ()
    twigs: tuple[Twig, ...] = ()
    branches: tuple[Branch, ...] = ()
    rounds: tuple[int, ...] = ()
    reserved: range = range(0)


def place_feeds(
    request: RequestState, twigs: Sequence[Twig], branches: Sequence[Branch], num_more: int
) -> Feeds:
    """Finds cache rows for what is fed beside the own text. num_more: forwards that may follow."""
    count = len(twigs) + len(branches)
    if not count:
        return Feeds()
    # Each row comes after those that it sees, so that a runner need not look beyond it.
    seen = [branch.rows[-1] + 1 for branch in branches if branch.rows]
    begin = _first_tail_row(request)
    block = request.rows.take(
        count * (1 + num_more), max([begin, *seen]), begin + 2 * request.rows.count
    )
    rows, reserved = block[:count], block[count:]
    # Rounds are whole, though fewer branches may be left in later ones.
    num_rounds = len(reserved) // count
    length = len(request.seq)
    feeds: list[TailToken] = []
    row_of: dict[Twig, int] = {}
    for twig, row in zip(twigs, rows):
        row_of[twig] = row
        before = twig.before
        parent_row = length + before - 1 if isinstance(before, int) else row_of[before]
        feeds.append(TailToken(twig.token, length + twig.depth, row, parent_row))
    lefts = sorted(
        zip(map(request.outcomes.num_left, branches), branches), key=itemgetter(0), reverse=True
    )[: len(rows) - len(feeds)]
    fed = [branch for _, branch in lefts]
    feeds += [request.outcomes.feed(branch, row) for branch, row in zip(fed, rows[len(feeds) :])]
    rounds = tuple([min(num_rounds, left - 1) for left, _ in lefts] if num_more else ())
    return Feeds(tuple(feeds), tuple(twigs[: len(rows)]), tuple(fed), rounds, reserved)


def make_draft(request: RequestState, end: int, stops: bool, branches: Sequence[Branch]) -> Draft:
    """The own tokens before `end` that the next stage does not have yet, and branches of them. The
    drafter stops at `end`, if `stops`."""
    positions = [branch.position for branch in branches]
    if branches and end <= request.sent:  # nothing new but these
        end, stops = max(positions), False
    start = min([request.sent, end, *positions])
    tokens, parents = request.seq[start:end], list[int]()
    for branch in branches:
        parent = branch.position - start - 1
        for token in branch.tokens:
            parents.append(parent)
            parent = len(tokens)
            tokens.append(token)
            if token in request.eos:
                break  # a burst has gone on beyond it
        branch.num_sent = len(branch.tokens)
    prefix_hash = request.hashes[start]
    return Draft(request.request, prefix_hash, start, tuple(tokens), stops, tuple(parents))


def _first_tail_row(request: RequestState) -> int:
    """Beyond every row that own tokens may reach before the next verdict, or, at the target, in
    the next step; and beyond all that a branch of them may be copied to."""
    role = request.role
    if role.is_last:
        return len(request.seq) + role.max_candidates + 1
    reach = max(request.acked + role.run_ahead, len(request.seq))
    return reach + role.outcomes.length + 1
