"""What the rest of PipeSpec needs from a tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from pipespec.tokenizer.vocabulary import Vocabulary

ChatMessages = Sequence[Mapping[str, str]]  # each with "role" and "content"


class TextTokenizer(Protocol):
    """Encodes prompts and decodes outputs."""

    @property
    def num_ids(self) -> int:
        """The largest id, added tokens included, plus one: ids from here on are never drawn."""
        ...

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The ids that end a text, as the model's folder says."""
        ...

    @property
    def special_ids(self) -> frozenset[int]:
        """The ids that `decode` leaves out when it skips special tokens."""
        ...

    @property
    def byte_ids(self) -> frozenset[int]:
        """The ids whose text is known only when their whole run has ended (byte fallback)."""
        ...

    @property
    def has_chat_template(self) -> bool:
        """Whether `render_chat` works."""
        ...

    @property
    def digest(self) -> str:
        """Equal for the same vocabulary, merges and added tokens; see `Vocabulary`."""
        ...

    def vocabulary(self) -> Vocabulary:
        """What the digest is taken of; made anew on each call."""
        ...

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text. Texts from `render_chat` hold their special tokens already.

        Raises:
            DataError: the text holds half of a surrogate pair.
        """
        ...

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of ids from 0 to `num_ids` - 1; bytes that are not UTF-8 become U+FFFD."""
        ...

    def render_chat(self, messages: ChatMessages, add_generation_prompt: bool) -> str:
        """A conversation as the text that the model was trained on.

        Raises:
            DataError: there is no chat template, or it refuses these messages.
        """
        ...
