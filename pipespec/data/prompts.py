"""From a row of any data set to a sample, and from a sample to what a model is fed.

A row is text (columns `prompt`, `question`, `text`) or a conversation; a conversation is rendered
by the chat template of the tokenizer that will read it, so it stays a list of turns until then.
This module does not know where rows come from.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Protocol

from pipespec.errors import DataError

TEXT_COLUMNS: Final = ("prompt", "question", "text")
COLUMNS: Final = ("conversation", *TEXT_COLUMNS)  # the first that a row has is taken


@dataclass(frozen=True, slots=True)
class Turn:
    """What one role ("system", "user", "assistant", ...) said."""

    role: str
    content: str


class Span(NamedTuple):
    """Characters `start` to `end` - 1."""

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Sample:
    """One prompt: `text`, or `messages`, the turns before the reply that is to be generated.

    index: its position in the data set, from 0. document: where in the text, or in the last turn,
    the part stands that may be shortened; None where nothing is known of the prompt's parts.
    """

    index: int
    text: str | None = None
    messages: tuple[Turn, ...] | None = None
    document: Span | None = None

    def __post_init__(self) -> None:
        assert (self.text is None) != (self.messages is None), "a sample is text or messages"


class PromptTokenizer(Protocol):
    """The part of a tokenizer that prompts need."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...

    def render_chat(
        self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool
    ) -> str: ...


def prompt_text(
    sample: Sample,
    tokenizer: PromptTokenizer,
    generation_prompt: bool = True,
    *,
    is_basic: bool = False,
) -> str:
    """The text that is fed. generation_prompt: end a conversation with the header of the reply; the
    original did not, and its models wrote "assistant" first. is_basic: see `basic_text`."""
    if sample.messages is None:
        assert sample.text is not None
        return sample.text
    if is_basic:
        return basic_text(sample.messages, generation_prompt)
    messages = [{"role": turn.role, "content": turn.content} for turn in sample.messages]
    return tokenizer.render_chat(messages, generation_prompt)


def prompt_ids(
    sample: Sample,
    tokenizer: PromptTokenizer,
    generation_prompt: bool = True,
    *,
    is_basic: bool = False,
) -> list[int]:
    """The token ids that are fed. A chat template writes its own begin-of-text token, so none is
    added to a conversation; `basic_text` is plain text and gets one."""
    text = prompt_text(sample, tokenizer, generation_prompt, is_basic=is_basic)
    return tokenizer.encode(text, add_special_tokens=sample.messages is None or is_basic)


def basic_text(messages: Sequence[Turn], generation_prompt: bool = True) -> str:
    """A conversation for models without a chat template: a line `USER: ...`, a line
    `ASSISTANT: ...` and so on, the last of them waiting for its text."""
    lines = [f"{turn.role.upper()}: {turn.content}" for turn in messages]
    return "\n".join([*lines, "ASSISTANT:"] if generation_prompt else lines)


def sample_from_row(index: int, row: Mapping[str, Any], columns: Iterable[str] = COLUMNS) -> Sample:
    """The sample of a row.

    Raises:
        DataError: what is wrong with the row; the caller says which row of which file it is.
    """
    wanted = tuple(columns)
    column = next((column for column in wanted if row.get(column) is not None), None)
    if column is None:
        seen = ", ".join(map(str, row)) or "none"
        raise DataError(f"has none of the columns {', '.join(wanted)} (it has: {seen})")
    value = row[column]
    if column == "conversation":
        return Sample(index, messages=_turns_before_reply(value))
    return Sample(index, text=check_text(column, value))


def check_text(column: str, value: object) -> str:
    """The text that is in a column.

    Raises:
        DataError: there is none.
    """
    if not isinstance(value, str):
        raise DataError(f'"{column}" is not a text')
    if not value.strip():
        raise DataError(f'"{column}" is empty')
    _check_unicode(column, value)
    return value


def _turns_before_reply(conversation: object) -> tuple[Turn, ...]:
    """Everything before the last assistant turn, which is the reply to be generated. A conversation
    that ends with a user's turn has no reply yet and is kept whole."""
    if not isinstance(conversation, list | tuple):
        raise DataError('"conversation" is not a list of turns')
    turns = [_turn(number, item) for number, item in enumerate(conversation, 1)]
    if turns and turns[-1].role != "user":
        replies = [number for number, turn in enumerate(turns) if turn.role == "assistant"]
        turns = turns[: replies[-1]] if replies else turns
    if not any(turn.role == "user" for turn in turns):
        raise DataError('"conversation" has no user turn before the reply')
    return tuple(turns)


def _turn(number: int, item: object) -> Turn:
    if isinstance(item, Mapping):
        role, content = item.get("role"), item.get("content")
        if isinstance(role, str) and isinstance(content, str):
            _check_unicode("conversation", content)
            return Turn(role, content)
    raise DataError(f'"conversation" turn {number} is not {{"role": text, "content": text}}')


def _check_unicode(column: str, text: str) -> None:
    """JSON can spell half a surrogate pair, which is no text and which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f'"{column}" has half a surrogate pair at {error.start}') from error
