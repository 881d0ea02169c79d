"""What a stage prepares for verdicts that may come: a continuation of each likely outcome.

While the next stage verifies, this one continues not only its own sequence but also what it would
be if the verdict stopped at some position and brought another token there: one of those that the
stage itself ranked just below its choice. A verdict that was foreseen so costs no drafting at all.
Source: speculative speculative decoding, arXiv 2603.03251, here for every boundary of a chain.

A branch's tokens are fed to rows of the cache beyond all rows that the own sequence may reach; if
its verdict comes, the rows are copied to where they belong. Which branches exist is decided here,
how many are fed in a forward by a policy, from their values. Plain data, as all of `state`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from operator import itemgetter

from pipespec.state.tail import TailRows, TailToken

Ranked = tuple[int, ...]  # token ids, best first
Case = tuple[int, int]  # a verdict puts at this position this token
LEAST_CHANCE = 0.01  # of a case; what is less likely is not looked at
LEAST_ALIVE = 0.002  # chance that a verdict accepts a token; what is less likely is not drafted


@dataclass(frozen=True, slots=True)
class Budget:
    """How much a stage may spend. num_ranked: alternatives a position. length: tokens that a
    branch continues for. num_feeds: most branch tokens in one forward. num_rows: of the cache."""

    num_ranked: int = 0
    length: int = 8
    num_feeds: int = 16
    num_rows: int = 128

    def most_tokens(self, run_ahead: int) -> int:
        """That the next stage may have to hold: each case at each position that may be unverified,
        and those of the case that occurred."""
        return self.num_ranked * (self.length + 1) * (run_ahead + 2)


@dataclass(slots=True, eq=False)
class Branch:
    """The case that a verdict puts `tokens[0]` at `position`; the other tokens continue it.

    rows: of the cache, of the tokens that were fed. ranked: what was drawn after each of them.
    """

    position: int
    tokens: list[int]
    rows: list[int] = field(default_factory=list)
    ranked: list[Ranked] = field(default_factory=list)
    num_sent: int = 0


class RankStats:
    """Running frequencies: how often the own token is right, and which rank the right one has."""

    def __init__(self, num_ranked: int) -> None:
        self._num_seen, self._num_right = 8.0, 5.6  # a prior worth eight tokens
        # Of the demo family's corrections 0.45 are ranked second, 0.17 third, 0.08 fourth.
        shape = [0.45, 0.17, 0.08, *(0.3 / n**2 for n in range(4, num_ranked + 1))]
        self._num_corrected = 8.0
        self._num_at = [8.0 * share for share in shape[:num_ranked]]

    @property
    def agreement(self) -> float:
        """Chance that a token is what the verdict will say."""
        return self._num_right / self._num_seen

    def num_alive(self) -> int:
        """Tokens after which the rest of a text is as good as dead."""
        agreement = min(max(self.agreement, 1e-9), 0.999)
        return int(math.log(LEAST_ALIVE) / math.log(agreement))

    def share(self, rank: int) -> float:
        """Chance that a correction is the alternative of this rank, counted from 0."""
        return self._num_at[rank] / self._num_corrected if rank < len(self._num_at) else 0.0

    def observe(self, num_right: int, rank: int | None, *, corrected: bool) -> None:
        """A verdict agreed with so many tokens and, if `corrected`, replaced the next by the
        alternative of this rank (None: by another token)."""
        decay = 0.99 ** (num_right + corrected)
        self._num_seen = self._num_seen * decay + num_right + corrected
        self._num_right = self._num_right * decay + num_right
        if corrected:
            self._num_corrected = 0.98 * self._num_corrected + 1.0
            self._num_at = [0.98 * count for count in self._num_at]
            if rank is not None and rank < len(self._num_at):
                self._num_at[rank] += 1.0


class Outcomes:
    """The branches of one request at one stage."""

    def __init__(
        self, budget: Budget, rows: TailRows, run_ahead: int, limit: int, eos: frozenset[int]
    ) -> None:
        """limit: no token at this position or after it is wanted."""
        self.budget = budget
        self._limit = limit
        self._length = min(budget.length, run_ahead)
        self.stats = RankStats(budget.num_ranked)
        self.branches: dict[Case, Branch] = {}
        self._alternatives: dict[int, Ranked] = {}  # by position
        self._eos = eos
        self._rows = rows

    def learn(self, position: int, ranked: Sequence[int]) -> None:
        """The tokens ranked below the one that now stands at `position`."""
        if self.budget.num_ranked:
            self._alternatives[position] = tuple(ranked[: self.budget.num_ranked])

    def rank(self, position: int, token: int) -> int | None:
        """Which alternative of the position the token is, counted from 0."""
        alternatives = self._alternatives.get(position, ())
        return alternatives.index(token) if token in alternatives else None

    def observe(self, num_right: int, position: int, correction: int | None) -> None:
        """A verdict agreed with so many tokens and brought another token at `position`, if any."""
        is_corrected = correction is not None
        rank = None if correction is None else self.rank(position, correction)
        self.stats.observe(num_right, rank, corrected=is_corrected)

    def offers(self, acked: int, end: int) -> list[tuple[float, Case]]:
        """Cases whose branches could grow by a token in the next forward, best first, each after
        its value: how likely it is that this token will be drafted for what occurs and accepted.

        acked: where the next verdict begins. end: own tokens before it have their rows in the cache
        after this forward.
        """
        most = min(self.budget.num_feeds, self._rows.num_free)
        return sorted(self._open(acked, end), key=itemgetter(0), reverse=True)[:most]

    def branch(self, case: Case) -> Branch:
        """What is known of the case until now."""
        return self.branches.get(case) or Branch(case[0], [case[1]])

    def feed(self, branch: Branch, row: int) -> TailToken:
        """The branch's next token, to be stored in `row`."""
        rows, tokens, position = branch.rows, branch.tokens, branch.position
        if rows:
            parent_row = rows[-1]
        else:
            parent_row = position - 1
            self.branches[position, tokens[0]] = branch
        feed = TailToken(tokens[-1], position + len(rows), row, parent_row)
        rows.append(row)
        return feed

    def num_left(self, branch: Branch) -> int:
        """How many tokens of the branch may yet be fed."""
        return min(self._length, self._limit - 1 - branch.position) - len(branch.rows)

    def match(self, position: int, tokens: Sequence[int]) -> Branch | None:
        """The branch for a verdict that puts these tokens at `position` and after."""
        branch = self.branches.get((position, tokens[0]))
        if branch is None or branch.tokens[: len(tokens)] != list(tokens):
            return None
        return branch if branch.rows else None

    def start_over(self) -> None:
        """Gives all rows back: those that are left lie where nothing can be fed."""
        self._drop(list(self.branches))

    def clear(self, length: int) -> None:
        """All branches are void, and what was known of positions from `length` on."""
        self._drop(list(self.branches))
        for position in [known for known in self._alternatives if known >= length]:
            del self._alternatives[position]

    def forget_before(self, position: int, *, was_lost: bool) -> None:
        """A verdict has passed this position: earlier cases did not occur. was_lost: the next stage
        has lost what was sent."""
        self._drop([key for key in self.branches if key[0] < position])
        for known in [known for known in self._alternatives if known < position]:
            del self._alternatives[known]
        if was_lost:
            for branch in self.branches.values():
                branch.num_sent = 0

    def unsent(self, sent: int, batch: int) -> list[Branch]:
        """Branches with tokens that the next stage has not got, once they are worth a message.

        A slow drafter tells each token at once. A fast one, who has a batch in hand soon, tells of
        each branch once: by what it grows later is sent if its case occurs, and to read it all
        takes the next stage more time than to wait for it.

        sent: own tokens before it come first; the case that one is wrong comes after it.
        batch: so many tokens are worth a message.
        """
        found = [
            branch
            for branch in self.branches.values()
            if branch.position < sent
            and max(1, branch.num_sent) < len(branch.tokens)
            and (batch == 1 or not branch.num_sent)
        ]
        if sum(len(branch.tokens) for branch in found) >= batch:
            return found
        may_grow = any(map(self._goes_on, self.branches.values()))
        return [] if may_grow else found

    def adopt(self, branch: Branch) -> None:
        """The branch's case occurred; the own sequence now holds its tokens."""
        self.clear(branch.position)
        for offset, ranked in enumerate(branch.ranked, 1):
            self.learn(branch.position + offset, ranked[1:])

    def make_room(self, end: int) -> None:
        """The own sequence needs all cache rows before `end`."""
        self._drop([k for k, branch in self.branches.items() if branch.rows[0] < end])

    def _open(self, acked: int, end: int) -> list[tuple[float, Case]]:
        """Cases that could be continued for longer, at positions from `acked` to `end`."""
        found: list[tuple[float, Case]] = []
        agreement = self.stats.agreement
        shares = [self.stats.share(rank) for rank in range(self.budget.num_ranked)]
        chance, branches = 1.0 - agreement, self.branches
        for position in range(acked, min(end, self._limit - 2) + 1):
            if chance < LEAST_CHANCE:
                break
            for token, share in zip(self._alternatives.get(position, ()), shares):
                case = position, token
                branch = branches.get(case)
                if branch is None and token not in self._eos:
                    found.append((chance * share, case))
                elif branch is not None and self._goes_on(branch):
                    found.append((chance * share * agreement ** len(branch.rows), case))
            chance *= agreement
        return found

    def _goes_on(self, branch: Branch) -> bool:
        return self.num_left(branch) > 0 and self._eos.isdisjoint(branch.tokens)

    def _drop(self, cases: Iterable[Case]) -> None:
        for case in cases:
            self._rows.free(self.branches.pop(case).rows)


def grow(branches: Iterable[Branch], draws: Iterable[Ranked]) -> None:
    """What was drawn after the token that each was last fed."""
    for branch, ranked in zip(branches, draws):
        branch.tokens.append(ranked[0])
        branch.ranked.append(ranked)
