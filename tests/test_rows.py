"""What a row asks for: where prompts are cut, which positions its draws choose, what is refused."""

from __future__ import annotations

from itertools import pairwise

import pytest

from pipespec.config import SamplingParams
from pipespec.runners.base import Row
from pipespec.runners.rows import CHUNK, chunks, draw_positions


def test_what_fits_in_a_chunk_is_not_cut() -> None:
    assert chunks(0, CHUNK) == [(0, CHUNK)]
    assert chunks(CHUNK - 3, CHUNK) == [(CHUNK - 3, 2 * CHUNK - 3)]


@pytest.mark.parametrize("start", [0, 1, CHUNK - 1, CHUNK, CHUNK + 7])
@pytest.mark.parametrize("count", [CHUNK + 1, 2 * CHUNK, 3 * CHUNK - 5])
def test_longer_prompts_are_cut_at_absolute_multiples_of_a_chunk(start: int, count: int) -> None:
    pieces = chunks(start, count)
    assert pieces[0][0] == start
    assert pieces[-1][1] == start + count
    assert all(left[1] == right[0] and right[0] % CHUNK == 0 for left, right in pairwise(pieces))
    assert all(0 < stop - begin <= CHUNK for begin, stop in pieces)


def test_the_draw_after_a_token_chooses_the_next_position() -> None:
    row = Row(slot=0, start=10, ids=[5, 6, 7, 8], num_draws=2, sampling=SamplingParams())
    assert list(draw_positions(row)) == [13, 14]
