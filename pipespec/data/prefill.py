"""Shortens a prompt to a number of tokens without touching what it asks for.

The document within a prompt loses its end. Where nothing is known of a prompt's parts, plain text
loses its own end, and of a conversation the longest turn does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from pipespec.data.prompts import Sample, Span, Turn
from pipespec.errors import DataError

_CHARACTERS_PER_TOKEN = 4  # of English, roughly: where the search begins


def shortened(
    sample: Sample, num_tokens: int, count: Callable[[Sample], int]
) -> tuple[Sample, int]:
    """The sample with as much of its document as fits into `num_tokens` tokens, and how many
    characters it lost.

    count: the tokens of a whole prompt, all that a chat template adds included.

    Raises:
        DataError: what would be left without any document does not fit.
    """
    if count(sample) <= num_tokens:
        return sample, 0
    turn, span = _document(sample)

    def keep(num_characters: int) -> Sample:
        return _without(sample, turn, Span(span.start + num_characters, span.end))

    if (num_least := count(keep(0))) > num_tokens:
        raise DataError(f"is {num_least} tokens without any of its document or text")
    length = span.end - span.start
    low, high = 0, min(length, _CHARACTERS_PER_TOKEN * num_tokens)
    while high < length and count(keep(high)) <= num_tokens:
        low, high = high, min(length, 2 * high)
    while high - low > 1:  # `low` fits, `high` does not
        middle = (low + high) // 2
        if count(keep(middle)) <= num_tokens:
            low = middle
        else:
            high = middle
    return keep(low), length - low


def _document(sample: Sample) -> tuple[int, Span]:
    """What may be shortened: the index of the turn, and where in it."""
    if sample.messages is None:
        return 0, sample.document or Span(0, len(sample.text or ""))
    if sample.document is not None:
        return len(sample.messages) - 1, sample.document
    lengths = [len(turn.content) for turn in sample.messages]
    longest = max(lengths)
    return lengths.index(longest), Span(0, longest)


def _without(sample: Sample, turn: int, lost: Span) -> Sample:
    if sample.messages is None:
        assert sample.text is not None
        return replace(sample, text=_cut(sample.text, lost), document=None)
    messages = list(sample.messages)
    messages[turn] = Turn(messages[turn].role, _cut(messages[turn].content, lost))
    return replace(sample, messages=tuple(messages), document=None)


def _cut(text: str, lost: Span) -> str:
    return text[: lost.start] + text[lost.end :]
