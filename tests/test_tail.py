"""Cache rows for tokens beside the own text."""

from __future__ import annotations

from pipespec.state.tail import TailRows


def test_rows_that_are_taken_together_lie_side_by_side() -> None:
    rows = TailRows(4)
    assert rows.take(2, 10, 18) == range(10, 12)
    assert rows.take(2, 10, 18) == range(12, 14)
    assert rows.num_free == 0
    assert len(rows.take(1, 10, 18)) == 0


def test_freed_rows_are_taken_again_if_enough_lie_side_by_side() -> None:
    rows = TailRows(4)
    rows.take(1, 10, 18)
    rows.take(1, 10, 18)
    rows.free([10])
    assert rows.take(2, 10, 18) == range(12, 14), "row 10 is free, but 11 is not"
    assert rows.take(1, 10, 18) == range(10, 11)


def test_no_row_before_the_first_is_taken() -> None:
    rows = TailRows(4)
    rows.take(2, 10, 18)
    rows.free([10, 11])
    assert rows.take(2, 11, 18) == range(11, 13)


def test_fewer_rows_are_taken_if_no_more_lie_side_by_side_before_the_end() -> None:
    rows = TailRows(4)
    rows.take(1, 2, 5)
    assert rows.take(3, 1, 5) == range(3, 5), "row 1 is free too, but row 2 is between them"
    assert rows.take(1, 5, 5) == range(0)
