"""The tree of tokens that may follow: what is first, what a drawn token leaves of it."""

from __future__ import annotations

from collections.abc import Sequence

from pipespec.hashing import ROOT, hash_tokens
from pipespec.state.candidates import Candidates


def tree(*paths: Sequence[int], most: int = 99) -> Candidates:
    """Candidates that arrived path by path; the drafter's own text first."""
    candidates = Candidates(ROOT, most)
    for path in paths:
        node = candidates.root
        for token in path:
            child = candidates.add(node, token, is_own=path is paths[0])
            assert child is not None
            node = child
    return candidates


def follow(candidates: Candidates, *tokens: int) -> list[bool]:
    """Whether each token stayed on the main path."""
    return [
        candidates.follow(token, hash_tokens(tokens[: index + 1]))
        for index, token in enumerate(tokens)
    ]


def test_the_first_path_is_the_main_one_and_branches_leave_it_as_it_is() -> None:
    assert tree([1, 2, 3], [1, 5, 6], [7]).main == [1, 2, 3]


def test_the_own_text_is_the_main_path_even_if_a_branch_came_before_it() -> None:
    candidates = Candidates(ROOT, 99)
    node = candidates.add(candidates.root, 1, is_own=False)
    assert node is not None
    branch = candidates.add(node, 5, is_own=False)
    assert candidates.main == [1, 5]
    own = candidates.add(node, 2)
    assert own is not None and branch is not None
    assert candidates.main == [1, 2]
    assert candidates.ends_main(own)
    candidates.add(branch, 6, is_own=False)
    candidates.add(own, 3)
    assert candidates.main == [1, 2, 3]


def test_a_branch_that_turns_out_to_be_the_own_text_becomes_the_main_path() -> None:
    candidates = tree([1, 2], [1, 5, 6])
    node = candidates.find(hash_tokens([1]))
    assert node is not None
    candidates.add(node, 5)
    assert candidates.main == [1, 5, 6]


def test_the_rank_of_a_token_is_its_place_among_the_alternatives() -> None:
    candidates = tree([1, 2, 3], [1, 5], [1, 6], [7])
    assert candidates.rank([], 7) == 0
    assert [candidates.rank([1], token) for token in (5, 6, 2, 9)] == [0, 1, None, None]
    assert candidates.rank([4], 7) is None


def test_a_path_that_is_repeated_and_goes_on_extends_the_main_one() -> None:
    assert tree([1, 2], [1, 2, 3]).main == [1, 2, 3]


def test_a_token_on_the_main_path_moves_along_it_and_drops_its_siblings() -> None:
    candidates = tree([1, 2, 3], [4, 5], [1, 6])
    assert follow(candidates, 1) == [True]
    assert candidates.main == [2, 3]
    assert set(candidates.paths()) == {(2,), (2, 3), (6,)}
    assert candidates.find(hash_tokens([4])) is None


def test_a_token_on_a_branch_makes_the_rest_of_it_the_main_path() -> None:
    candidates = tree([1, 2, 3], [1, 5, 6], [1, 5, 7])
    assert follow(candidates, 1, 5) == [True, False]
    assert candidates.main == [6]
    assert len(candidates) == 2
    end = candidates.find(hash_tokens([1, 5, 6]))
    assert end is not None
    assert candidates.ends_main(end)


def test_a_token_on_no_branch_leaves_nothing() -> None:
    candidates = tree([1, 2], [3])
    assert follow(candidates, 9) == [False]
    assert (candidates.main, len(candidates)) == ([], 0)
    assert candidates.find(hash_tokens([9])) is candidates.root


def test_the_hash_of_a_prefix_finds_its_node() -> None:
    candidates = tree([1, 2], [1, 5])
    node = candidates.find(hash_tokens([1, 5]))
    assert node is not None
    assert node.token == 5
    assert not candidates.ends_main(node)


def test_a_full_tree_takes_what_it_has_and_nothing_new() -> None:
    candidates = tree([1, 2], most=2)
    assert candidates.add(candidates.root, 1) is not None
    assert candidates.add(candidates.root, 3) is None
    assert candidates.main == [1, 2]
