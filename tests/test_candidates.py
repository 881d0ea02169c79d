"""The path of tokens that may follow and its branches: what a drawn token leaves of them."""

from __future__ import annotations

from collections.abc import Sequence

from pipespec.hashing import ROOT, hash_tokens
from pipespec.messages import Draft
from pipespec.state.candidates import Candidates, branches_of

START = 10  # tokens before them


def held(main: Sequence[int], *branches: tuple[int, Sequence[int]], most: int = 99) -> Candidates:
    """Candidates with branches, each after so many tokens of the main path."""
    candidates = Candidates(START, ROOT, most)
    assert candidates.add(START, tuple(main)) == 0
    for place, tokens in branches:
        assert candidates.add_branch(START + place, tuple(tokens)) == 0
    return candidates


def test_branches_leave_the_main_path_as_it_is() -> None:
    candidates = held([1, 2, 3], (1, [5, 6]), (0, [7]))
    assert candidates.main == [1, 2, 3]
    assert set(candidates.paths()) == {(1,), (1, 2), (1, 2, 3), (1, 5), (1, 5, 6), (7,)}
    assert len(candidates) == 6


def test_a_branch_at_the_end_is_the_main_path_until_the_own_text_says_otherwise() -> None:
    candidates = held([1], (1, [5, 6]))
    assert candidates.main == [1, 5, 6]
    candidates.add(START + 1, (2,))
    assert candidates.main == [1, 2]
    assert len(candidates) == 2
    candidates.add(START + 2, (3,))
    assert candidates.main == [1, 2, 3]


def test_own_text_that_goes_on_otherwise_drops_the_branches_from_there_on() -> None:
    candidates = held([1, 2, 3, 4], (0, [9]), (1, [8]), (2, [7]))
    candidates.add(START + 1, (5, 6))
    assert set(candidates.paths()) == {(1,), (1, 5), (1, 5, 6), (9,)}
    assert len(candidates) == 4


def test_the_rank_of_a_token_is_its_place_among_the_alternatives() -> None:
    candidates = held([1, 2, 3], (1, [5]), (1, [6]), (0, [7]))
    assert candidates.rank(0, 7) == 0
    assert [candidates.rank(1, token) for token in (5, 6, 2, 9)] == [0, 1, None, None]


def test_what_is_repeated_and_goes_on_extends_what_was_there() -> None:
    candidates = held([1, 2], (0, [4]), (0, [4, 5]), (0, [4]))
    candidates.add(START, (1, 2, 3))
    assert candidates.main == [1, 2, 3]
    assert set(candidates.paths()) >= {(4,), (4, 5)}
    assert len(candidates) == 5


def test_a_branch_that_begins_as_the_main_path_leaves_it_later() -> None:
    candidates = held([1, 2, 3], (0, [1, 5]), (0, [1, 2]))
    assert set(candidates.paths()) == {(1,), (1, 2), (1, 2, 3), (1, 5)}


def test_a_token_on_the_main_path_moves_along_it_and_drops_the_branches_there() -> None:
    candidates = held([1, 2, 3], (0, [4, 5]), (1, [6]))
    assert candidates.follow(1)
    assert candidates.main == [2, 3]
    assert set(candidates.paths()) == {(2,), (2, 3), (6,)}
    assert len(candidates) == 3


def test_a_token_on_a_branch_makes_the_rest_of_it_the_main_path() -> None:
    candidates = held([1, 2, 3], (1, [5, 6]), (2, [4]))
    assert candidates.follow(1)
    assert not candidates.follow(5)
    assert candidates.main == [6]
    assert len(candidates) == 1
    assert candidates.end == START + 3
    assert candidates.has(START + 3, hash_tokens([1, 5, 6]))


def test_a_token_on_no_branch_leaves_nothing() -> None:
    candidates = held([1, 2], (0, [3]))
    assert not candidates.follow(9)
    assert (candidates.main, len(candidates)) == ([], 0)
    assert candidates.prefix_hash == hash_tokens([9])


def test_prefixes_of_the_main_path_are_known_by_their_hash() -> None:
    candidates = held([1, 2], (1, [5]))
    assert [candidates.has(START + n, hash_tokens([1, 2][:n])) for n in range(3)] == [True] * 3
    assert not candidates.has(START + 2, hash_tokens([1, 5]))
    assert not candidates.has(START + 3, hash_tokens([1, 2, 3]))


def test_what_there_is_no_room_for_is_not_taken() -> None:
    candidates = held([1, 2], (0, [7]), most=4)
    assert candidates.add_branch(START, (7, 8, 9)) == 1
    assert candidates.add_branch(START + 1, (5,)) == 1
    assert candidates.add(START, (1, 2, 3)) == 1
    assert set(candidates.paths()) == {(1,), (1, 2), (7,), (7, 8)}


def test_the_branches_of_a_draft_are_read_from_its_parents() -> None:
    draft = Draft(1, ROOT, START, (1, 2, 3, 4, 5, 6, 7, 8), False, (1, 2, -1, 0, 5, 3))
    assert list(branches_of(draft)) == [
        (START + 2, (3, 4)),
        (START, (5,)),
        (START + 1, (6, 7)),
        (START + 2, (3, 4, 8)),
    ]
