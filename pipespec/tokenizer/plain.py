"""A tokenizer without files: ids 0 to 255 are bytes, 256 ends a text. For emulated models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from pipespec.errors import DataError
from pipespec.tokenizer.protocol import ChatMessages
from pipespec.tokenizer.vocabulary import Vocabulary

END_ID: Final = 256
END_TEXT: Final = "<|end|>"


class ByteTokenizer:
    """UTF-8 bytes as ids; implements `TextTokenizer`."""

    num_ids = END_ID + 1
    eos_ids = (END_ID,)
    special_ids = frozenset({END_ID})
    byte_ids: frozenset[int] = frozenset()
    has_chat_template = True

    @property
    def digest(self) -> str:
        return self.vocabulary().digest

    def vocabulary(self) -> Vocabulary:
        tokens = {index: f"<0x{index:02X}>" for index in range(END_ID)}
        return Vocabulary("bytes", {**tokens, END_ID: END_TEXT}, self.special_ids)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(utf8(text))

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        end = b"" if skip_special_tokens else END_TEXT.encode()
        data = b"".join(bytes((i,)) if i < END_ID else end for i in ids if i <= END_ID)
        return data.decode("utf-8", "replace")

    def render_chat(self, messages: ChatMessages, add_generation_prompt: bool) -> str:
        turns = "".join(f"{message['role']}: {message['content']}\n" for message in messages)
        return f"{turns}assistant: " if add_generation_prompt else turns


def utf8(text: str) -> bytes:
    """The text's bytes.

    Raises:
        DataError: half of a surrogate pair, which JSON can spell but no text contains.
    """
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"the prompt's character {error.start} is half of a surrogate pair, not text; remove it"
        ) from error
