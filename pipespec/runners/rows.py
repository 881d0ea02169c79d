"""What runners of real models do with a row before and after its forward."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Final

from pipespec.errors import PipeSpecError
from pipespec.runners.base import BurstRow, Row, RunnerInfo, TreeRow

CHUNK: Final = 512  # tokens of a prompt in one forward, cut at multiples of it
SMALLEST_BUCKET: Final = 256


def check_row(row: Row, info: RunnerInfo, num_embeddings: int) -> None:
    """Whether the model can take the row; call it before anything is written.

    num_embeddings: ids that the model has an embedding for.

    Raises:
        PipeSpecError: a position beyond the context, or an id beyond the embedding.
    """
    assert 1 <= row.num_draws <= len(row.ids) and row.start >= 0
    _check_ids(row.ids, row.start + len(row.ids), info, num_embeddings)


def check_tree(tree: TreeRow, info: RunnerInfo, num_embeddings: int) -> None:
    """`check_row` for a text with branches; one of the two may be empty."""
    assert tree.row.ids or (tree.tail and tree.row.num_draws == 0)
    if tree.row.ids:
        check_row(tree.row, info, num_embeddings)
    if tree.tail:
        first, last = tree.tail[0].row, tree.tail[-1].row
        assert first >= tree.row.start + len(tree.row.ids)
        assert last == first + len(tree.tail) - 1 < info.context_length + info.num_tail_rows
        end = 1 + max(item.position for item in tree.tail)
        _check_ids([item.token for item in tree.tail], end, info, num_embeddings)


def check_burst(burst: BurstRow, info: RunnerInfo, num_embeddings: int) -> None:
    """`check_tree`, and that every forward which may follow has positions and cache rows."""
    check_tree(burst.tree, info, num_embeddings)
    row, tail, rounds = burst.tree.row, burst.tree.tail, burst.rounds
    assert row.num_draws <= 1 and len(rounds) == len(tail)
    assert all(burst.num_more >= a >= b >= 0 for a, b in pairwise([*rounds, 0]))
    ends = [item.position + 1 + count for item, count in zip(tail, rounds)]
    if row.ids:
        ends.append(row.start + len(row.ids) + burst.num_more)
    _check_end(max(ends), info)
    if tail:
        first = tail[0].row
        assert not row.ids or first >= row.start + len(row.ids) + burst.num_more
        assert tail[-1].row + sum(rounds) < info.context_length + info.num_tail_rows


def _check_end(end: int, info: RunnerInfo) -> None:
    if end > info.context_length:
        raise PipeSpecError(
            f"{info.name}: position {end - 1} is beyond the context of {info.context_length} "
            "tokens; shorten the prompt or --max-new-tokens"
        )


def _check_ids(ids: Sequence[int], end: int, info: RunnerInfo, num_embeddings: int) -> None:
    _check_end(end, info)
    for unknown in (min(ids), max(ids)):
        if not 0 <= unknown < num_embeddings:
            raise PipeSpecError(
                f"{info.name}: token id {unknown} is outside its vocabulary of {num_embeddings}; "
                "the models of a hierarchy must share a tokenizer"
            )


def draw_positions(row: Row) -> range:
    """The positions of the tokens that the row's draws choose."""
    end = row.start + len(row.ids)
    return range(end - row.num_draws + 1, end + 1)


def chunks(start: int, count: int, *, on_grid: bool = False) -> list[tuple[int, int]]:
    """Cuts positions `start` to `start + count` into pieces (start, stop) of at most `CHUNK`.

    Cuts are at absolute multiples of `CHUNK`, so that a prompt is computed alike wherever its
    feeding began; what fits in one piece stays whole, unless `on_grid`.
    """
    end = start + count
    if count <= CHUNK and not on_grid:
        return [(start, end)]
    cuts = [start, *range((start // CHUNK + 1) * CHUNK, end, CHUNK), end]
    return list(pairwise(cuts))


def bucket(end: int, num_rows: int) -> int:
    """Of how many cache rows a static step looks at whose text ends before row `end`: a power of
    two, so that short texts do not pay for the whole cache, and few shapes serve all lengths."""
    assert 0 < end <= num_rows
    return min(num_rows, max(SMALLEST_BUCKET, 1 << (end - 1).bit_length()))
