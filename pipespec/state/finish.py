"""When a request is over: end-of-text ids, stop texts, max_new_tokens, exact to the token.

Only the target asks. Its tokens are final, so the check moves forward one token at a time and is
never rolled back. The first condition that holds ends the text, so an end of text in the middle of
accepted candidates cuts there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from pipespec.messages import Submit

Decode = Callable[[Sequence[int]], str]


class FinishChecker:
    """Call with each output token in order; returns "eos", "stop", "length" or "" (go on).

    A stop text is looked for in the decoded last tokens only: every token but a special one is at
    least one byte of text, so a window of as many tokens as the longest stop text has bytes holds
    it; a few more absorb what a tokenizer does to the first token it decodes.
    """

    def __init__(self, submit: Submit, decode: Decode | None) -> None:
        assert decode is not None or not submit.stop, "stop texts need a tokenizer at the target"
        self._eos = frozenset(submit.eos)
        self._stop = submit.stop
        self._decode = decode
        self._num_left = submit.max_new_tokens
        longest = max((len(text.encode()) for text in submit.stop), default=0)
        self._window: deque[int] = deque(maxlen=2 * longest + 8)

    def __call__(self, token: int) -> str:
        self._num_left -= 1
        if token in self._eos:
            return "eos"
        if self._stop:
            assert self._decode is not None
            self._window.append(token)
            text = self._decode(list(self._window))
            if any(stop in text for stop in self._stop):
                return "stop"
        return "" if self._num_left > 0 else "length"


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """`text` before the first occurrence of any stop text."""
    ends = [text.find(item) for item in stop]
    return text[: min((end for end in ends if end >= 0), default=len(text))]
