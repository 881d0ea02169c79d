"""The rules of one request at one stage, each in a few lines. Vocabulary: single digits."""

from __future__ import annotations

from collections.abc import Sequence

from pipespec.config import SamplingParams, Schedule
from pipespec.hashing import hash_tokens
from pipespec.messages import Draft, Finish, Frame, Link, Output, Stats, Submit, Verdict
from pipespec.policy import make_policy
from pipespec.state import FinishChecker, RequestState, Role, StageState
from pipespec.state.request import Outgoing

PROMPT = (7, 7, 7)


def request_at(
    index: int, num_stages: int = 3, *, run_ahead: int = 4, max_new_tokens: int = 20,
    eos: tuple[int, ...] = (), context_length: int = 1 << 20,
) -> RequestState:  # fmt: skip
    submit = Submit(1, PROMPT, (), SamplingParams(), max_new_tokens, eos, ())
    role = Role(
        index, num_stages, run_ahead, run_ahead, context_length=context_length, max_branch_tokens=9
    )
    state = RequestState(submit, role, FinishChecker(submit, None))
    state.kv_valid = len(PROMPT)  # as after a prefill that drew nothing
    return state


def draft(prefix: Sequence[int], tokens: Sequence[int], last: bool = False) -> Draft:
    """Tokens drafted on the prompt followed by `prefix`."""
    before = (*PROMPT, *prefix)
    return Draft(1, hash_tokens(before), len(before), tuple(tokens), last)


def step(state: RequestState, draws: Sequence[int]) -> list[Outgoing]:
    state.begin_step(16)
    return state.end_step([(token,) for token in draws], 0.0, 1.0)


def own(state: RequestState) -> list[int]:
    return state.seq[len(PROMPT) :]


def messages(outgoing: list[Outgoing], link: Link) -> list[object]:
    return [message for to, message in outgoing if to is link]


def test_a_draft_on_the_own_prefix_becomes_candidates() -> None:
    state = request_at(2)
    state.on_draft(draft([], [1, 2, 3]))
    assert state.cands.main == [1, 2, 3]


def test_a_draft_on_another_prefix_is_stale() -> None:
    state = request_at(2)
    step(state, [5])
    state.on_draft(draft([6], [1, 2]))
    assert state.cands.main == []
    assert state.counts.num_stale_drafts == 2


def test_a_draft_that_repeats_known_candidates_extends_them() -> None:
    state = request_at(2)
    state.on_draft(draft([], [1, 2]))
    state.on_draft(draft([1], [2, 3]))
    assert state.cands.main == [1, 2, 3]


def test_the_text_that_was_drafted_last_is_the_main_path() -> None:
    """A drafter sends one text after the other; nothing goes on from the earlier one."""
    state = request_at(2)
    state.on_draft(draft([], [1, 2, 3]))
    state.on_draft(draft([1], [9, 8]))
    assert state.cands.main == [1, 9, 8]
    state.on_draft(draft([1, 2, 3], [4]))
    assert state.cands.main == [1, 9, 8]
    assert state.counts.num_stale_drafts == 1


def test_a_draft_may_be_a_tree() -> None:
    state = request_at(2)
    state.on_draft(Draft(1, hash_tokens(PROMPT), 3, (1, 2, 5, 6, 9), False, (-1, 0, 0, 2, -1)))
    assert state.cands.main == [1, 2]
    assert set(state.cands.paths()) == {(1,), (1, 2), (1, 5), (1, 5, 6), (9,)}


def test_verification_accepts_the_matching_prefix_and_adds_the_correction_token() -> None:
    state = request_at(2)
    state.on_draft(draft([], [1, 2, 3]))
    outgoing = step(state, [1, 2, 8, 4])
    assert own(state) == [1, 2, 8]
    assert state.cands.main == []
    assert messages(outgoing, Link.LAUNCHER) == [Output(1, 3, (1, 2, 8), "", (3, 2, 3))]
    assert messages(outgoing, Link.UP) == [Verdict(1, 1, 3, (1, 2, 8), False)]


def test_full_acceptance_adds_the_bonus_token() -> None:
    state = request_at(2)
    state.on_draft(draft([], [1, 2]))
    step(state, [1, 2, 3])
    assert own(state) == [1, 2, 3]
    assert state.counts.accepted == [2]
    assert state.counts.emitted == [3]


def test_a_correction_leaves_the_rejected_token_out_of_the_cache() -> None:
    state = request_at(2)
    state.on_draft(draft([], [1, 2, 3]))
    step(state, [1, 9, 8, 4])
    assert state.kv_valid == len(PROMPT) + 1
    assert state.begin_step(16).ids == (9,)


def test_the_bonus_token_is_fed_at_the_next_step() -> None:
    state = request_at(2)
    state.on_draft(draft([], [1, 2]))
    step(state, [1, 2, 3])
    assert state.kv_valid == len(PROMPT) + 2
    assert state.begin_step(16).ids == (3,)


def test_a_verdict_rolls_back_and_is_passed_on_in_the_same_transition() -> None:
    middle = request_at(1)
    step(middle, [1])
    step(middle, [2])
    outgoing = middle.on_verdict(Verdict(1, 1, 3, (5,), False))
    assert own(middle) == [5]
    assert messages(outgoing, Link.UP) == [Verdict(1, 3, 3, (5,), False)]
    assert middle.counts.num_rolled_back == 2


def test_a_verdict_that_only_grows_the_sequence_is_passed_on_too() -> None:
    middle = request_at(1)
    outgoing = middle.on_verdict(Verdict(1, 1, 3, (1, 2), False))
    assert own(middle) == [1, 2]
    assert messages(outgoing, Link.UP) == [Verdict(1, 1, 3, (1, 2), False)]


def test_a_verdict_that_confirms_costs_no_draft() -> None:
    drafter = request_at(0)
    for token in (1, 2, 3):
        step(drafter, [token])
    drafter.on_verdict(Verdict(1, 1, 3, (1, 2), False))
    assert own(drafter) == [1, 2, 3]
    assert drafter.counts.num_rollbacks == 0


def test_a_verdict_out_of_order_waits_for_a_full_one() -> None:
    drafter = request_at(0)
    drafter.on_verdict(Verdict(1, 2, 4, (2,), False))
    assert own(drafter) == []
    drafter.on_verdict(Verdict(1, 3, 3, (1, 2), True))
    assert own(drafter) == [1, 2]
    drafter.on_verdict(Verdict(1, 1, 3, (9,), False))
    assert own(drafter) == [1, 2]


def test_draws_for_a_context_that_was_rolled_back_are_discarded() -> None:
    drafter = request_at(0)
    step(drafter, [1])
    drafter.begin_step(16)
    drafter.on_verdict(Verdict(1, 1, 3, (5,), False))
    assert drafter.end_step([(2,)], 0.0, 1.0) == []
    assert own(drafter) == [5]
    assert drafter.counts.num_discarded_steps == 1


def test_draws_survive_a_verdict_that_agrees_with_what_was_fed() -> None:
    middle = request_at(1)
    middle.on_draft(draft([], [1, 2]))
    middle.begin_step(16)
    middle.on_verdict(Verdict(1, 1, 3, (1,), False))
    middle.end_step([(1,), (2,), (3,)], 0.0, 1.0)
    assert own(middle) == [1, 2, 3]


def test_run_ahead_bounds_what_is_drafted_and_says_so() -> None:
    drafter = request_at(0, run_ahead=2)
    step(drafter, [1])
    outgoing = step(drafter, [2])
    sent = messages(outgoing, Link.DOWN)
    assert isinstance(sent[0], Draft)
    assert sent[0].last
    assert not drafter.can_step


def drafter_in_burst(eos: tuple[int, ...] = ()) -> RequestState:
    drafter = request_at(0, eos=eos)
    step(drafter, [1])
    drafter.role.batch = 3
    assert drafter.begin_step(16).num_more == 2
    return drafter


def end_burst(drafter: RequestState, *draws: int) -> list[Outgoing]:
    """One draw a forward."""
    *others, last = draws
    for token in others:
        following = drafter.draw_on([(token,)])
        assert following is not None and following.ids == (token,)
    assert drafter.draw_on([(last,)]) is None
    return drafter.end_step([(last,)], 0.0, len(draws))


def test_a_burst_draws_on_from_its_own_draws() -> None:
    drafter = drafter_in_burst()
    sent = messages(end_burst(drafter, 2, 3, 4), Link.DOWN)
    assert sent == [Draft(1, hash_tokens((*PROMPT, 1)), 4, (2, 3, 4), True)]
    assert own(drafter) == [1, 2, 3, 4]
    assert drafter.kv_valid == len(drafter.seq) - 1, "the last draw has not been fed"
    assert drafter.counts.query_lengths == [1, 1, 1, 1]
    assert drafter.counts.step_times_s == [1.0] * 4
    assert sum(drafter.counts.offered) == 0, "a draft's own draws are nobody's candidates"


def test_a_burst_may_end_early() -> None:
    drafter = drafter_in_burst()
    assert drafter.end_step([(2,)], 0.0, 1.0) == [], "less than a batch"
    assert own(drafter) == [1, 2]
    assert drafter.begin_step(16).ids == (2,)


def test_a_verdict_that_confirms_ends_a_burst_and_all_draws_count() -> None:
    drafter = drafter_in_burst()
    assert drafter.draw_on([(2,)]).ids == (2,)
    drafter.on_verdict(Verdict(1, 1, 3, (1,), False))
    assert drafter.draw_on([(3,)]) is None
    drafter.end_step([(3,)], 0.0, 2.0)
    assert own(drafter) == [1, 2, 3]
    assert drafter.begin_step(16).ids == (3,)


def test_a_verdict_cuts_a_burst_off_and_what_was_drawn_before_it_stays_in_the_cache() -> None:
    drafter = drafter_in_burst()
    assert drafter.draw_on([(2,)]).ids == (2,)
    drafter.on_verdict(Verdict(1, 1, 3, (1, 2, 5), False))
    assert drafter.draw_on([(3,)]) is None
    drafter.end_step([(3,)], 0.0, 2.0)
    assert own(drafter) == [1, 2, 5]
    assert drafter.kv_valid == 5, "2 was fed on what the text still is"
    assert drafter.counts.num_discarded_steps == 2


def test_a_burst_ends_with_the_text() -> None:
    drafter = drafter_in_burst(eos=(0,))
    end_burst(drafter, 2, 0, 4)
    assert own(drafter) == [1, 2, 0]
    assert not drafter.can_step


def test_a_draft_pauses_at_an_end_of_text_until_a_verdict_contradicts() -> None:
    drafter = request_at(0, eos=(0,))
    step(drafter, [0])
    assert not drafter.can_step
    drafter.on_verdict(Verdict(1, 1, 3, (4,), False))
    assert drafter.can_step


def test_the_target_cuts_at_the_first_end_of_text() -> None:
    target = request_at(2, eos=(0,))
    target.on_draft(draft([], [1, 0, 0]))
    outgoing = step(target, [1, 0, 0, 5])
    assert own(target) == [1, 0]
    assert messages(outgoing, Link.LAUNCHER) == [Output(1, 3, (1, 0), "eos", (3, 2, 2))]


def test_max_new_tokens_is_exact_although_more_candidates_are_there() -> None:
    target = request_at(2, max_new_tokens=2)
    target.on_draft(draft([], [1, 2, 3]))
    outgoing = step(target, [1, 2])
    assert own(target) == [1, 2]
    assert messages(outgoing, Link.LAUNCHER) == [Output(1, 3, (1, 2), "length", (1, 1, 2))]


def test_a_draft_with_a_full_context_says_that_nobody_need_wait() -> None:
    drafter = request_at(0, context_length=4, max_new_tokens=20)
    outgoing = drafter.on_verdict(Verdict(1, 1, 3, (1, 2, 3), False))
    sent = messages(outgoing, Link.DOWN)
    assert sent == [Draft(1, hash_tokens((*PROMPT, 1, 2, 3)), 6, (), True)]
    assert not drafter.can_step


def test_candidates_are_not_used_while_the_prompt_is_computed() -> None:
    target = request_at(2)
    target.kv_valid = 0
    target.on_draft(draft([], [1, 2]))
    started = target.begin_step(16)
    assert started.ids == PROMPT
    assert started.is_prefill


def test_a_stage_that_missed_a_request_reports_its_end_once() -> None:
    """Its Submit was lost on a link that was not open yet; the launcher waits for its counts."""
    state = StageState(Role(0, 2, 16, 16), make_policy(Schedule(), is_first=True), [1, 1])
    ends = [state.receive(Link.DOWN, Frame(1, 1, 1, number, Finish(7)), 0.0) for number in range(2)]
    ((link, frame),) = ends[0]
    assert link is Link.LAUNCHER
    assert isinstance(frame.message, Stats)
    assert frame.message.request == 7
    assert frame.message.values["num_drafted"] == 0
    assert ends[1] == []
