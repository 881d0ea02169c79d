"""Cache rows for tokens beside the own text."""

from __future__ import annotations

from pipespec.state.tail import TailRows


def test_rows_that_are_taken_together_lie_side_by_side() -> None:
    rows = TailRows(4)
    assert rows.take(2, 10) == range(10, 12)
    assert rows.take(2, 10) == range(12, 14)
    assert rows.num_free == 0
    assert len(rows.take(1, 10)) == 0


def test_freed_rows_are_taken_again_if_enough_lie_side_by_side() -> None:
    rows = TailRows(4)
    rows.take(1, 10)
    rows.take(1, 10)
    rows.free([10])
    assert rows.take(2, 10) == range(12, 14), "row 10 is free, but 11 is not"
    assert rows.take(1, 10) == range(10, 11)


def test_no_row_before_the_first_is_taken() -> None:
    rows = TailRows(4)
    rows.take(2, 10)
    rows.free([10, 11])
    assert rows.take(2, 11) == range(11, 13)


def test_rows_end_after_twice_their_number_even_if_fewer_are_found() -> None:
    rows = TailRows(3)
    for first in (1, 3, 5):
        rows.take(1, first)
    rows.free([1])
    assert rows.take(2, 1) == range(1, 2), "2 and 4 are free too, but not beside it"
