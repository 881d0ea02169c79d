"""Text from tokens as they come: never half a character, and in the end all of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from pipespec.tokenizer.protocol import TextTokenizer

_REPLACEMENT: Final = "\ufffd"


class StreamDecoder:
    """Decodes one output incrementally.

    All texts that `push` and `flush` return, put together, are what `decode` makes of all ids.
    Only a short window is decoded each time. It starts where the text before was complete, and
    holds at least one token with text before the new ones: decoders strip the space of a first
    word, and the new tokens must not look like one.
    """

    def __init__(self, tokenizer: TextTokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._window: list[int] = []
        self._num_settled = 0  # tokens of the window whose text was complete at an earlier push
        self._emitted = ""  # the part of the window's text that is out

    def push(self, ids: Sequence[int]) -> str:
        """The text that is certain now; perhaps empty."""
        self._window += ids
        closed = self._without_open_run()
        text = self._decode(closed)
        # A replacement character at the end may be the first bytes of a character.
        certain = text.rstrip(_REPLACEMENT)
        piece = certain[len(self._emitted) :]
        self._emitted += piece
        if len(certain) == len(text) and len(closed) == len(self._window):
            self._shrink()
        return piece

    def flush(self) -> str:
        """The rest, when no more tokens come; the decoder is as new afterwards."""
        piece = self._decode(self._window)[len(self._emitted) :]
        self._window, self._num_settled, self._emitted = [], 0, ""
        return piece

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, self._skip)

    def _without_open_run(self) -> list[int]:
        """The window without a run of byte-fallback tokens at its end: such a run is decoded as a
        whole, so its next token can change what the ones before it mean."""
        runs, end = self._tokenizer.byte_ids, len(self._window)
        for index in range(len(self._window) - 1, -1, -1):
            if self._window[index] in runs:
                end = index
            elif not (self._skip and self._window[index] in self._tokenizer.special_ids):
                break
        return self._window[:end]

    def _shrink(self) -> None:
        """Forgets the tokens before the last complete text, if what stays has any text."""
        tail = self._window[self._num_settled :]
        if text := self._decode(tail):
            self._window, self._emitted = tail, text
        self._num_settled = len(self._window)


def token_lengths(tokenizer: TextTokenizer, ids: Sequence[int], text: str) -> list[int]:
    """How many characters of `text`, the text of `ids` up to a stop text, each token brought.

    A character that several tokens spell counts for the one that completes it; special tokens and
    what stands after the end of `text` have 0. The sum is the length of `text`.
    """
    decoder, left = StreamDecoder(tokenizer), len(text)
    lengths: list[int] = []
    for position, token in enumerate(ids, 1):
        piece = decoder.push((token,)) + (decoder.flush() if position == len(ids) else "")
        lengths.append(min(len(piece), left))
        left -= lengths[-1]
    return lengths
