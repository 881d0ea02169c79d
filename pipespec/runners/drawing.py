"""From rows to tokens, for every runner that computes logits. Knows no model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from pipespec.errors import PipeSpecError
from pipespec.runners.base import Row, RunnerInfo
from pipespec.runners.memory import out_of_memory_as
from pipespec.runners.rows import check_row, draw_positions
from pipespec.sampling import draw


def draw_rows(
    rows: Sequence[Row],
    info: RunnerInfo,
    num_embeddings: int,
    row_logits: Callable[[Row], Tensor],
) -> list[list[int]]:
    """Feeds every row in turn; `result[r]` holds the draws of `rows[r]`.

    num_embeddings: ids that the model has an embedding for. row_logits: feeds a row and returns
    [num_draws, vocab_size].

    Raises:
        PipeSpecError: a position beyond the context or an id beyond the embedding; nothing was
            written. Or logits that are not finite, or no memory.
    """
    for row in rows:
        check_row(row, info, num_embeddings)
    no_room = (
        f"{info.name} ran out of memory on {info.device} during a forward; shorten the prompt, use "
        'a smaller model or "quantize", or give it more devices'
    )
    with out_of_memory_as(PipeSpecError, no_room):
        return [
            draw(row_logits(row), draw_positions(row), row.sampling, info.vocab_size)
            for row in rows
        ]
