"""Candidates beside the main path are verified in the same forward. Vocabulary: single digits."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from pipespec.config import SamplingParams, Schedule
from pipespec.hashing import hash_tokens
from pipespec.messages import Draft, Submit, Verdict
from pipespec.state import RequestState, Role
from pipespec.state.beside import offers_beside
from pipespec.state.step import Step

PROMPT = (7, 7, 7)
FINISHES_AT_0 = "eos"


def target(max_twigs: int = 4, *, num_stages: int = 2, index: int = 1) -> RequestState:
    """A verifier after its prefill, which drew 1, with the candidates 2 3 4; if 3 is wrong, 5 6 or
    8; and if 4 is wrong, 9."""
    submit = Submit(1, PROMPT, (), SamplingParams(), 50, (), ())
    role = Role(index, num_stages, 8, 8, max_branch_tokens=99, max_twigs=max_twigs)
    state = RequestState(submit, role, lambda token: FINISHES_AT_0 if token == 0 else "")
    state.begin_step(16)
    state.end_step([(1,)], 0.0, 1.0)
    tokens, parents = (2, 3, 4, 5, 6, 8, 9), (-1, 0, 1, 0, 3, 0, 1)
    assert state.on_draft(Draft(1, hash_tokens((*PROMPT, 1)), 4, tokens, False, parents))
    return state


def begin(state: RequestState, most: int = 16) -> Step:
    return state.begin_step(most, [extra for _, extra in offers_beside(state, most)])


def verify(state: RequestState, after: dict[tuple[int, ...], int], most: int = 16) -> Step:
    """One forward. after: the token drawn after each path of candidates; 7 after any other."""
    step = begin(state, most)
    paths = [step.ids[step.base_index :][:depth] for depth in range(step.num_candidates + 1)]
    path_of_row = {step.base - 1 + depth: path for depth, path in enumerate(paths)}
    for feed in step.tail:
        path_of_row[feed.row] = (*path_of_row[feed.parent_row], feed.token)
        paths.append(path_of_row[feed.row])
    state.end_step([(after.get(path, 7),) for path in paths], 0.0, 1.0)
    return step


def own(state: RequestState) -> list[int]:
    return state.seq[len(PROMPT) :]


def test_the_likeliest_candidates_beside_the_main_path_are_offered_parents_first() -> None:
    step = begin(target())
    assert step.ids == (1, 2, 3, 4)
    assert [(twig.token, twig.depth) for twig in step.twigs] == [(5, 1), (6, 2), (9, 2), (8, 1)]
    assert [feed.position for feed in step.tail] == [5, 6, 6, 5]
    by_token = {feed.token: feed for feed in step.tail}
    assert by_token[5].parent_row == by_token[8].parent_row == 4
    assert by_token[6].parent_row == by_token[5].row
    assert by_token[9].parent_row == 5


def test_no_more_are_offered_than_allowed() -> None:
    assert [twig.token for twig in begin(target(1)).twigs] == [5]
    assert begin(target(0)).twigs == ()


def test_candidates_beside_a_main_path_that_is_not_verified_are_not_offered() -> None:
    assert [twig.token for twig in begin(target(), most=1).twigs] == [5, 6, 8]


def test_a_rejection_goes_on_along_the_branch_that_was_drawn() -> None:
    state = target()
    step = verify(state, {(): 2, (2,): 5, (2, 5): 6, (2, 5, 6): 3})
    assert own(state) == [1, 2, 5, 6, 3]
    assert state.counts.accepted == [3]
    assert state.counts.offered == [3 + 4]
    row_of = {feed.token: feed.row for feed in step.tail}
    after = begin(state)
    assert (after.keep_start, after.keep) == (5, (row_of[5], row_of[6]))
    assert (after.start, after.ids) == (7, (3,)), "what the branch fed is kept, not fed again"


def test_a_rejection_that_no_branch_foresaw_ends_the_verification() -> None:
    state = target()
    verify(state, {(): 2, (2,): 6})
    assert own(state) == [1, 2, 6]
    after = begin(state)
    assert (after.keep, after.start, after.ids) == ((), 5, (6,))


def test_the_main_path_is_accepted_as_if_there_were_no_branches() -> None:
    state = target()
    verify(state, {(): 2, (2,): 3, (2, 3): 4, (2, 3, 4): 5})
    assert own(state) == [1, 2, 3, 4, 5]
    assert begin(state).keep == ()


def test_what_follows_a_verified_branch_is_the_main_path_then() -> None:
    state = target(max_twigs=2)
    draft = Draft(1, hash_tokens((*PROMPT, 1)), 4, (2, 5, 6, 3, 3), False, (0, 1, 2, 3))
    assert state.on_draft(draft)
    verify(state, {(): 2, (2,): 5, (2, 5): 6, (2, 5, 6): 3}, most=1)
    assert own(state) == [1, 2, 5, 6, 3]
    assert state.cands.main == [3]


def test_a_branch_ends_where_the_text_ends() -> None:
    state = target()
    state.on_draft(Draft(1, hash_tokens((*PROMPT, 1, 2)), 5, (0, 4), False))
    state.candidate_stats.observe(0, 2, corrected=True)
    verify(state, {(): 2, (2,): 0, (2, 0): 4}, most=1)
    assert own(state) == [1, 2, 0]
    assert state.finish_reason == FINISHES_AT_0


def test_kept_rows_are_cut_by_a_rollback_before_they_are_copied() -> None:
    state = target(num_stages=3)
    step = verify(state, {(): 2, (2,): 5, (2, 5): 6, (2, 5, 6): 3})
    row_of = {feed.token: feed.row for feed in step.tail}
    state.on_verdict(Verdict(1, 1, 4, (2, 5, 8), False))
    assert own(state) == [1, 2, 5, 8]
    after = begin(state)
    assert (after.keep_start, after.keep) == (5, (row_of[5],))
    assert (after.start, after.ids) == (6, (8,))


def test_a_step_whose_text_has_grown_meanwhile_goes_on_from_there() -> None:
    """Its own draw for a place that a verdict has decided counts no more."""
    state = target(num_stages=3)
    begin(state)
    state.on_verdict(Verdict(1, 1, 3, (1, 2), False))
    state.end_step([(8,), (3,), (6,), (6,), *((7,) for _ in range(4))], 0.0, 1.0)
    assert own(state) == [1, 2, 3, 6]


def test_shares_of_ranks_follow_what_is_drawn() -> None:
    state = target()
    before = state.candidate_stats.share(1)
    verify(state, {(): 2, (2,): 8})
    assert state.candidate_stats.share(1) > before


@pytest.mark.parametrize(("tail_rows", "expected"), [(0, (0, 0)), (192, (2, 6))])
def test_a_runner_without_rows_for_branches_gets_none(
    tail_rows: int, expected: Sequence[int]
) -> None:
    schedule = Schedule(outcomes=2, tree=6)
    role = Role.of(schedule, 1, 3, 1000, tail_rows)
    assert [role.outcomes.num_ranked, role.max_twigs] == list(expected)
    assert role.max_branch_tokens > 0, "the stage before it may still send some"


def test_the_first_stage_verifies_nothing_and_the_last_prepares_nothing() -> None:
    schedule = Schedule(outcomes=2, tree=6)
    first, last = (Role.of(schedule, index, 2, 1000, 192) for index in (0, 1))
    assert (first.outcomes.num_ranked, first.max_twigs, first.max_branch_tokens) == (2, 0, 0)
    assert (last.outcomes.num_ranked, last.max_twigs) == (0, 6)
