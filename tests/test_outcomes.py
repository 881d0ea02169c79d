"""A first draft prepares for verdicts. Vocabulary: single digits; ranks are given by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipespec.config import SamplingParams
from pipespec.hashing import hash_tokens
from pipespec.messages import Draft, Link, Submit, Verdict
from pipespec.state import RequestState, Role
from pipespec.state.beside import offers_beside
from pipespec.state.outcomes import Branch, Budget, RankStats
from pipespec.state.request import Outgoing
from pipespec.state.step import Step

PROMPT = (7, 7, 7)
BUDGET = Budget(num_ranked=2, length=3, num_feeds=2, num_rows=8)


def drafter(
    budget: Budget = BUDGET,
    *,
    run_ahead: int = 4,
    max_new_tokens: int = 50,
    eos: int | None = None,
    batch: int = 1,
) -> RequestState:
    """Stage 0 of two, after its prefill drew 1 (ranked below: 2, 3)."""
    eos_ids = () if eos is None else (eos,)
    submit = Submit(1, PROMPT, (), SamplingParams(), max_new_tokens, eos_ids, ())
    role = Role(0, 2, run_ahead, 0, batch, outcomes=budget)
    state = RequestState(submit, role, lambda _token: "")
    begin(state)
    state.end_step([(1, 2, 3)], 0.0, 1.0)
    return state


def begin(state: RequestState) -> Step:
    """A forward over all that could be fed."""
    return state.begin_step(16, [extra for _, extra in offers_beside(state, 16)])


def step(state: RequestState, own: Sequence[int], *tails: Sequence[int]) -> Step:
    """One forward, with these ranked draws."""
    started = begin(state)
    assert len(started.tail) == len(tails), started.tail
    state.end_step([tuple(own)][: started.num_draws] + [tuple(t) for t in tails], 0.0, 1.0)
    return started


def verdict(state: RequestState, start: int, *tokens: int) -> list[Outgoing]:
    return state.on_verdict(Verdict(1, state.verdict_seen + 1, start, tokens, False))


def own(state: RequestState) -> list[int]:
    return state.seq[len(PROMPT) :]


def test_the_alternatives_of_an_unverified_token_are_fed_beside_the_own_text() -> None:
    state = drafter()
    started = step(state, (4, 5, 6), (8, 0, 0), (9, 0, 0))
    assert started.ids == (1,)
    assert [(x.token, x.position, x.parent_row) for x in started.tail] == [(2, 3, 2), (3, 3, 2)]
    rows = [x.row for x in started.tail]
    assert rows == [rows[0], rows[0] + 1]
    assert rows[0] > 3 + 4, "beyond all rows that the own text may reach"


def test_a_verdict_that_was_foreseen_costs_no_drafting() -> None:
    state = drafter()
    started = step(state, (4, 5, 6), (8, 0, 0), (9, 0, 0))
    verdict(state, 3, 2)
    assert own(state) == [2, 8]
    assert state.counts.num_outcome_hits == 1
    after = begin(state)
    assert (after.keep_start, after.keep) == (3, (started.tail[0].row,))
    assert (after.start, after.ids) == (4, (8,)), "only the last token is left to feed"


def test_a_verdict_that_was_not_foreseen_leaves_no_branch() -> None:
    state = drafter()
    step(state, (4, 5, 6), (8, 0, 0), (9, 0, 0))
    verdict(state, 3, 6)
    assert own(state) == [6]
    assert (state.counts.num_outcome_hits, state.outcomes.branches) == (0, {})
    after = begin(state)
    assert (after.keep, after.start, after.ids) == ((), 3, (6,))


def test_a_verdict_that_goes_on_otherwise_was_not_foreseen() -> None:
    state = drafter()
    step(state, (4, 5, 6), (8, 0, 0), (9, 0, 0))
    verdict(state, 3, 2, 6)
    assert own(state) == [2, 6]
    assert (state.counts.num_outcome_hits, state.counts.num_corrections) == (0, 1)
    assert begin(state).keep == ()


def test_a_verdict_may_know_more_of_a_case_than_was_prepared() -> None:
    state = drafter()
    step(state, (4, 5, 6), (8, 0, 0), (9, 0, 0))
    verdict(state, 3, 2, 8)
    assert own(state) == [2, 8]
    assert (state.counts.num_outcome_hits, state.counts.num_corrections) == (1, 1)
    assert begin(state).ids == (8,)


def test_the_likelier_case_is_continued_first_until_its_length() -> None:
    state = drafter(Budget(1, 2, 1, 8), run_ahead=2)
    assert [x.token for x in step(state, (4, 5), (8, 0)).tail] == [2]
    assert not state.can_step, "from here on there is time for branches only"
    assert [x.token for x in step(state, (), (9, 0)).tail] == [8]
    assert [x.token for x in step(state, (), (6, 0)).tail] == [5]
    assert [x.token for x in step(state, (), (6, 0)).tail] == [6]
    assert offers_beside(state, 16) == []
    assert state.begin_step(16) is None
    verdict(state, 3, 2)
    assert own(state) == [2, 8, 9]


def test_a_branch_in_flight_goes_on_from_its_draw_when_the_verdict_overtakes_it() -> None:
    state = drafter()
    begin(state)
    verdict(state, 3, 2)
    assert own(state) == [2]
    state.end_step([(4, 5, 6), (8, 1, 1), (9, 1, 1)], 0.0, 1.0)
    assert own(state) == [2, 8], "the draw of the branch that was fed with 2"
    assert begin(state).ids == (8,)


def test_a_rollback_before_the_copy_cuts_what_is_copied() -> None:
    state = drafter()
    step(state, (4, 5, 6), (8, 0, 0), (9, 0, 0))
    verdict(state, 3, 2)
    verdict(state, 3, 5)
    assert own(state) == [5]
    after = begin(state)
    assert (after.keep, after.start, after.ids) == ((), 3, (5,))


def test_a_branch_ends_at_an_end_of_text() -> None:
    state = drafter(Budget(1, 3, 1, 8), run_ahead=1, eos=0)
    step(state, (), (0, 5))
    assert offers_beside(state, 16) == []
    assert state.begin_step(16) is None
    verdict(state, 3, 2)
    assert own(state) == [2, 0]
    assert state.is_ended


def test_branches_are_sent_as_a_tree_once_none_of_them_goes_on() -> None:
    state = drafter(Budget(1, 2, 1, 8), run_ahead=2, batch=50)
    begin(state)
    ((_, text),) = state.end_step([(4, 5), (8, 0)], 0.0, 1.0)
    assert text == Draft(1, hash_tokens(PROMPT), 3, (1, 4), True)
    begin(state)
    ((link, first),) = state.end_step([(9, 0)], 0.0, 1.0)
    assert link is Link.DOWN
    assert first == Draft(1, hash_tokens(PROMPT), 3, (2, 8, 9), False, (-1, 0, 1))
    begin(state)
    assert state.end_step([(6, 0)], 0.0, 1.0) == []
    begin(state)
    ((_, second),) = state.end_step([(5, 0)], 0.0, 1.0)
    after_the_first = hash_tokens((*PROMPT, 1))
    assert second == Draft(1, after_the_first, 4, (5, 6, 5), False, (-1, 0, 1))


def test_what_the_next_stage_has_as_a_branch_is_not_sent_again() -> None:
    state = drafter(Budget(1, 2, 1, 8), run_ahead=4, batch=2)
    step(state, (4, 0), (8, 0))
    step(state, (5, 0), (9, 0))
    sent = [m for _, m in verdict(state, 3, 2) if isinstance(m, Draft)]
    assert own(state) == [2, 8, 9]
    assert sent == []
    assert state.sent == len(state.seq)


def test_a_drafter_that_cannot_go_on_after_a_hit_says_so() -> None:
    """The next stage has the branch without that word, and may wait for more."""
    state = drafter(Budget(1, 2, 1, 8), run_ahead=1, max_new_tokens=2)
    step(state, (), (8, 0))
    sent = [m for _, m in verdict(state, 3, 2) if isinstance(m, Draft)]
    assert [(m.tokens, m.last) for m in sent] == [((), True)]


def test_a_stage_that_lost_its_candidates_gets_the_branches_again() -> None:
    state = drafter(Budget(1, 1, 1, 8), run_ahead=1)
    step(state, (), (8, 0))
    assert state.outcomes.unsent(state.sent, 1) == []
    outgoing = state.on_verdict(Verdict(1, state.verdict_seen + 1, 3, (), True))
    tokens = [m.tokens for _, m in outgoing if isinstance(m, Draft)]
    assert tokens == [(1, 2, 8)], "in one message"


def test_rank_shares_follow_what_verdicts_bring() -> None:
    stats = RankStats(2)
    for _ in range(300):
        stats.observe(1, 1, corrected=True)
    assert 0.45 < stats.agreement < 0.55
    assert stats.share(1) > 0.9
    assert stats.share(0) < 0.05


# -- several forwards in one step ---------------------------------------------------------------


def burst(budget: Budget, batch: int = 4, **options: Any) -> tuple[RequestState, Step]:
    """A drafter whose step may go on, and its first forward: 1 was drawn before it."""
    state = drafter(budget, batch=batch, **options)
    return state, begin(state)


def go_on(state: RequestState, own: int, *tails: int) -> Step:
    """The forward in flight drew these, and two worse ones of each; the one that follows it."""
    following = state.draw_on([(token, 0, 9) for token in (own, *tails)])
    assert following is not None
    return following


def branches(state: RequestState) -> list[Branch]:
    return list(state.outcomes.branches.values())


def num_used(state: RequestState) -> int:
    return state.rows.count - state.rows.num_free


def test_branches_grow_in_every_forward_of_a_burst() -> None:
    state, first = burst(Budget(2, 3, 2, 20))
    assert (first.num_more, first.rounds) == (2, (2, 2))
    second = go_on(state, 4, 8, 6)
    assert (second.start, second.ids) == (4, (4,))
    assert [(x.token, x.position) for x in second.tail] == [(8, 4), (6, 4)]
    assert [x.parent_row for x in second.tail] == [x.row for x in first.tail]
    assert [x.row for x in second.tail] == [first.tail[-1].row + n for n in (1, 2)]
    third = go_on(state, 5, 7, 6)
    assert (third.ids, third.num_more, third.rounds) == ((5,), 0, (0, 0))
    ((_, sent),) = state.end_step([(6, 0, 9), (1, 0, 9), (0, 2, 9)], 0.0, 3.0)
    assert own(state) == [1, 4, 5, 6]
    before = hash_tokens(PROMPT)
    parents = (-1, 4, 5, 6, -1, 8, 9, 10)
    assert sent == Draft(1, before, 3, (1, 4, 5, 6, 2, 8, 7, 1, 3, 6, 6, 0), True, parents)
    assert state.counts.query_lengths == [3, 3, 3]


def test_branches_that_have_their_length_drop_out_of_a_burst() -> None:
    state, first = burst(Budget(1, 3, 2, 20), batch=1, run_ahead=9)
    state.end_step([(4, 5), (8, 0)], 0.0, 1.0)
    state.role.batch = 3
    second = begin(state)
    assert [(x.token, x.parent_row) for x in second.tail] == [(5, 3), (8, first.tail[0].row)]
    assert (second.num_more, second.rounds) == (2, (2, 1))
    third = go_on(state, 6, 7, 9)
    assert ([x.token for x in third.tail], third.rounds) == ([7, 9], (1, 0))
    fourth = go_on(state, 6, 7, 9)
    assert ([x.token for x in fourth.tail], fourth.rounds) == ([7], (0,))
    assert fourth.tail[0].row == third.tail[1].row + 1, "the rows follow each other"
    state.end_step([(6, 9), (7, 9)], 0.0, 1.0)
    assert [branch.tokens for branch in branches(state)] == [[2, 8, 9, 9], [5, 7, 7, 7]]


def test_rows_that_a_burst_did_not_come_to_are_given_back() -> None:
    state, first = burst(Budget(2, 3, 2, 20))
    assert num_used(state) > 2
    second = go_on(state, 4, 8, 6)
    state.end_step([(5, 0, 9), (7, 0, 9), (7, 0, 9)], 0.0, 2.0)
    assert num_used(state) == 4
    held = [row for branch in state.outcomes.branches.values() for row in branch.rows]
    assert sorted(held) == [x.row for x in (*first.tail, *second.tail)]


def test_with_few_rows_a_burst_has_fewer_rounds_and_no_row_too_many() -> None:
    state, first = burst(Budget(2, 3, 2, 5))
    assert first.rounds == (1, 1)
    second = go_on(state, 4, 8, 6)
    third = go_on(state, 5, 7, 7)
    assert (len(second.tail), third.tail) == (2, ())
    state.end_step([(5, 0, 9)], 0.0, 3.0)
    assert num_used(state) == 4


def test_a_verdict_during_a_burst_adopts_the_branch_that_grew_in_it() -> None:
    state, first = burst(Budget(2, 3, 2, 20))
    second = go_on(state, 4, 8, 6)
    verdict(state, 3, 2)
    assert own(state) == [2, 8]
    assert state.draw_on([(5, 0, 9), (7, 1, 9), (6, 0, 9)]) is None
    state.end_step([(5, 0, 9), (7, 1, 9), (6, 0, 9)], 0.0, 2.0)
    assert own(state) == [2, 8, 7], "the draw of the branch in the last forward"
    assert state.counts.num_discarded_steps == 2
    assert num_used(state) == 0
    after = begin(state)
    assert (after.keep_start, after.keep) == (3, (first.tail[0].row, second.tail[0].row))
    assert (after.start, after.ids) == (5, (7,))
    assert {x.token for x in after.tail} <= {1, 9, 0}, "the alternatives of what it drew"


def test_a_verdict_after_a_burst_may_know_what_grew_in_it() -> None:
    state, _ = burst(Budget(2, 3, 2, 20))
    go_on(state, 4, 8, 6)
    state.end_step([(5, 0, 9), (7, 0, 9), (6, 0, 9)], 0.0, 2.0)
    verdict(state, 3, 2, 8)
    assert own(state) == [2, 8, 7]
    assert state.counts.num_outcome_hits == 1


def test_a_verdict_that_passes_a_branch_ends_the_burst_that_it_grows_in() -> None:
    state, _ = burst(Budget(2, 3, 2, 20))
    go_on(state, 4, 8, 6)
    verdict(state, 3, 1)
    assert state.draw_on([(5, 0, 9), (7, 0, 9), (6, 0, 9)]) is None
    state.end_step([(5, 0, 9), (7, 0, 9), (6, 0, 9)], 0.0, 2.0)
    assert own(state) == [1, 4, 5]
    assert (state.outcomes.branches, num_used(state)) == ({}, 0)


def test_branches_near_the_end_of_the_text_drop_out_of_a_burst_earlier() -> None:
    """No token at position 7 is wanted, so none at 6 need be fed, nor is anybody told of it."""
    state, first = burst(Budget(1, 9, 4, 40), batch=1, max_new_tokens=4)
    assert [x.position for x in first.tail] == [3]
    state.end_step([(4, 5), (8, 0)], 0.0, 1.0)
    state.role.batch = 4
    second = begin(state)
    assert [x.position for x in second.tail] == [4, 4]
    assert (second.num_more, second.rounds) == (1, (1, 1))
    third = state.draw_on([(4, 5), (8, 0), (6, 0)])
    assert third is not None
    assert [x.position for x in third.tail] == [5, 5]
    state.end_step([(4, 5), (8, 0), (6, 0)], 0.0, 2.0)
    assert state.remaining == 0
    assert {len(branch.tokens) + branch.position for branch in branches(state)} == {7}


def test_an_end_of_text_within_a_burst_ends_the_branch_once_the_burst_is_over() -> None:
    state, _ = burst(Budget(1, 3, 1, 8), batch=3, eos=0)
    go_on(state, 4, 0)
    ((_, sent),) = state.end_step([(6, 5), (8, 5)], 0.0, 2.0)
    assert isinstance(sent, Draft)
    assert sent.tokens[sent.num_own :] == (2, 0), "what was drawn after it belongs to no text"
    assert begin(state).tail[0].token == 5, "of another branch"
    verdict(state, 3, 2)
    assert own(state) == [2, 0]
    assert state.is_ended


def test_branches_alone_go_on_in_a_burst() -> None:
    state = drafter(Budget(1, 2, 2, 20), run_ahead=2)
    step(state, (4, 5), (8, 0))
    assert not state.can_step
    state.role.batch = 4
    first = begin(state)
    assert (first.ids, [x.token for x in first.tail], first.rounds) == ((), [5, 8], (1, 0))
    second = state.draw_on([(6, 0), (9, 0)])
    assert second is not None
    assert [(x.token, x.parent_row) for x in second.tail] == [(6, first.tail[0].row)]
    assert state.draw_on([(7, 0)]) is None
    state.end_step([(7, 0)], 0.0, 2.0)
    assert [branch.tokens for branch in branches(state)] == [[2, 8, 9], [5, 6, 7]]
    assert own(state) == [1, 4]
