"""From rows to tokens, for every runner that computes logits. Knows no model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from torch import Tensor

from pipespec.errors import PipeSpecError
from pipespec.runners.base import Row, RunnerInfo, TreeRow
from pipespec.runners.memory import out_of_memory_as
from pipespec.runners.rows import check_row, check_tree, draw_positions
from pipespec.sampling import draw, rank


def draw_rows(
    rows: Sequence[Row],
    info: RunnerInfo,
    num_embeddings: int,
    row_logits: Callable[[Row], Tensor],
    row_draws: Callable[[Row], list[int] | None] | None = None,
) -> list[list[int]]:
    """Feeds every row in turn; `result[r]` holds the draws of `rows[r]`.

    num_embeddings: ids that the model has an embedding for. row_logits: feeds a row and returns
    [num_draws, vocab_size]. row_draws: feeds a row and returns its draws, or None if that is left
    to the logits; then nothing was fed.

    Raises:
        PipeSpecError: a position beyond the context or an id beyond the embedding; nothing was
            written. Or logits that are not finite, or no memory.
    """
    for row in rows:
        check_row(row, info, num_embeddings)

    def drawn(row: Row) -> list[int]:
        draws = None if row_draws is None else row_draws(row)
        if draws is not None:
            return draws
        return draw(row_logits(row), draw_positions(row), row.sampling, info.vocab_size)

    with _memory_of(info):
        return [drawn(row) for row in rows]


def rank_tree(
    tree: TreeRow,
    info: RunnerInfo,
    num_embeddings: int,
    tree_logits: Callable[[TreeRow], Tensor],
) -> list[tuple[int, ...]]:
    """Feeds a text and its branches; the result of `ModelRunner.forward_tree`.

    tree_logits: feeds them and returns [num_draws + len(tail), vocab_size]. The rest is as of
    `draw_rows`.
    """
    check_tree(tree, info, num_embeddings)
    positions = [*draw_positions(tree.row), *(item.position + 1 for item in tree.tail)]
    sampling, vocab_size = tree.row.sampling, info.vocab_size
    with _memory_of(info):
        return rank(tree_logits(tree), positions, sampling, vocab_size, tree.num_ranked)


def _memory_of(info: RunnerInfo) -> AbstractContextManager[None]:
    return out_of_memory_as(
        PipeSpecError,
        f"{info.name} ran out of memory on {info.device} during a forward; shorten the prompt, use "
        'a smaller model or "quantize", or give it more devices',
    )
