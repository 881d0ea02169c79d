"""A text as it comes, each token in the style of what brought it; on one stream, in order.

On a terminal the styles are colours; elsewhere, and with NO_COLOR, marks around the text.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Final

from rich.color import ColorSystem
from rich.console import Console
from rich.style import Style

from pipespec.metrics import Origin
from pipespec.tokenizer import StreamDecoder, TextTokenizer

# Told apart without red and green, and, by their backgrounds, where the text is a space.
STYLES: Final = {
    Origin.ACCEPTED: Style(color="#3B8EEA"),
    Origin.CORRECTION: Style(color="#FFFFFF", bgcolor="#B34700", bold=True),
    Origin.BONUS: Style(color="#000000", bgcolor="#E0B000"),
    Origin.UNDRAFTED: Style(underline=True),
}
MARKS: Final = {
    Origin.ACCEPTED: ("", ""),
    Origin.CORRECTION: ("[!", "!]"),
    Origin.BONUS: ("[+", "+]"),
    Origin.UNDRAFTED: ("[.", ".]"),
}
_MEANINGS: Final = {
    Origin.ACCEPTED: "drafted, accepted",
    Origin.CORRECTION: "correction",
    Origin.BONUS: "bonus",
    Origin.UNDRAFTED: "no draft",
}
_NAMES: Final = {
    Origin.ACCEPTED: ("accepted", "accepted"),
    Origin.CORRECTION: ("correction", "corrections"),
    Origin.BONUS: ("bonus token", "bonus tokens"),
    Origin.UNDRAFTED: ("without a draft", "without a draft"),
}
Paint = Callable[[str, Origin], str]


class AcceptanceView:
    """What `generate` is to be given as `on_tokens` and `on_text`.

    write: puts text out. Text becomes certain later than its tokens (a character may need several,
    a stop text may swallow them), so the origins of characters wait in a queue until it does.
    """

    def __init__(
        self, tokenizer: TextTokenizer, paint: Paint, write: Callable[[str], None]
    ) -> None:
        self._decoder = StreamDecoder(tokenizer)
        self._paint = paint
        self._write = write
        self._waiting: deque[tuple[Origin, int]] = deque()
        self._last = Origin.UNDRAFTED
        self._counts: Counter[Origin] = Counter()

    @property
    def legend(self) -> str:
        """What the styles mean, each in its own."""
        return "  ".join(self._paint(text, origin) for origin, text in _MEANINGS.items())

    @property
    def summary(self) -> str:
        """How many tokens came from where."""
        parts = [
            f"{count} {_NAMES[origin][count != 1]}"
            for origin in Origin
            if (count := self._counts[origin])
        ]
        return f"{self._counts.total()} tokens: {', '.join(parts)}"

    def on_tokens(self, tokens: Sequence[int], origins: Sequence[Origin]) -> None:
        """Tokens have come; their text follows."""
        self._counts.update(origins)
        for token, origin in zip(tokens, origins, strict=True):
            if length := len(self._decoder.push([token])):
                self._waiting.append((origin, length))

    def on_text(self, piece: str) -> None:
        """Text has become certain."""
        while piece:
            # At the end, characters that were never completed belong to the last token.
            self._last, length = (
                self._waiting.popleft() if self._waiting else (self._last, len(piece))
            )
            if length > len(piece):
                self._waiting.appendleft((self._last, length - len(piece)))
            self._write(self._paint(piece[:length], self._last))
            piece = piece[length:]


def painter(console: Console) -> Paint:
    """Colours where the console shows them, else marks."""
    if not console.is_terminal or console.no_color or console.color_system is None:
        return _mark
    system = _COLOR_SYSTEMS[console.color_system]

    def colour(text: str, origin: Origin) -> str:
        style = STYLES[origin]
        shown = text.replace("\n", " \n") if style.bgcolor else text  # a line's end shows as well
        lines = shown.split("\n")
        return "\n".join(style.render(line, color_system=system) for line in lines)

    return colour


def _mark(text: str, origin: Origin) -> str:
    before, after = MARKS[origin]
    return f"{before}{text}{after}"


_COLOR_SYSTEMS: Final = {
    "standard": ColorSystem.STANDARD,
    "256": ColorSystem.EIGHT_BIT,
    "truecolor": ColorSystem.TRUECOLOR,
    "windows": ColorSystem.WINDOWS,
}
