"""From a row of a known set to a prompt: one function a set, as `registry.BUILT_IN` lists them.

Instructions are the user's turn of a conversation, so that the model's own chat template frames
them. Where a long document stands in a prompt, the sample says where it ends, and it alone is
shortened by `--prefill`. Columns are those of the hub; all wording is our own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from pipespec.data.prompts import Sample, Span, Turn, check_text
from pipespec.errors import DataError

WIKITEXT_WORDS: Final = 128

ONE_SHOT_EXAMPLE: Final = """\
Question: A bakery fills 6 trays with 12 rolls each. It sells 45 rolls before noon and 19 after. \
How many rolls are left?
Answer: The bakery has 6 * 12 = 72 rolls.
It sells 45 + 19 = 64 rolls.
So 72 - 64 = 8 rolls are left.
#### 8
"""


def cnn_dailymail(index: int, row: Mapping[str, Any]) -> Sample:
    instruction = "Summarize this news article in three or four sentences.\n\n"
    return _request(index, instruction, text_of(row, "article"))


def xsum(index: int, row: Mapping[str, Any]) -> Sample:
    instruction = "Say in one sentence what this news article is about.\n\n"
    return _request(index, instruction, text_of(row, "document"))


def narrativeqa(index: int, row: Mapping[str, Any]) -> Sample:
    """The whole story (not its summary), then the question."""
    question = text_of(row, "question", "text")
    return _request(
        index,
        "Read this story. A question about it follows.\n\n",
        text_of(row, "document", "text"),
        f"\n\nQuestion: {question}\nAnswer in one or two sentences.",
    )


def mmlu(index: int, row: Mapping[str, Any]) -> Sample:
    """One question with its choices, no examples. It asks for reasons, so that there is something
    to generate."""
    subject = text_of(row, "subject").replace("_", " ")
    choices = row.get("choices")
    if not isinstance(choices, list | tuple) or not 2 <= len(choices) <= 26:
        raise DataError('"choices" is not a list of 2 to 26 texts' + seen_in(row, "choices"))
    lines = [
        f"{chr(ord('A') + n)}. {check_text('choices', item)}" for n, item in enumerate(choices)
    ]
    return _request(
        index,
        f"A multiple choice question about {subject}:\n\n",
        text_of(row, "question"),
        "\n" + "\n".join(lines) + "\n\nExplain briefly, then give the letter of the right answer.",
    )


def mt_bench(index: int, row: Mapping[str, Any]) -> Sample:
    """The first turn; the second would need the model's answer to it."""
    turns = row.get("prompt")
    if not isinstance(turns, list | tuple) or not turns:
        raise DataError('"prompt" is not a list of turns' + seen_in(row, "prompt"))
    return _request(index, "", check_text("prompt", turns[0]))


def one_shot(index: int, row: Mapping[str, Any]) -> Sample:
    """Plain text: a worked example of our own, then gsm8k's question in the same form."""
    head, question = f"{ONE_SHOT_EXAMPLE}\nQuestion: ", text_of(row, "question")
    span = Span(len(head), len(head) + len(question))
    return Sample(index, text=f"{head}{question}\nAnswer:", document=span)


def pg19(index: int, row: Mapping[str, Any]) -> Sample:
    """The book from its first line, to be continued."""
    return Sample(index, text=text_of(row, "text"))


def wikitext(index: int, row: Mapping[str, Any]) -> Sample | None:
    """The first 128 words, to be continued; None for a shorter row."""
    text = row.get("text")
    if not isinstance(text, str):
        raise DataError('"text" is not a text' + seen_in(row, "text"))
    words = text.split(maxsplit=WIKITEXT_WORDS)[:WIKITEXT_WORDS]
    if len(words) < WIKITEXT_WORDS:
        return None
    return Sample(index, text=check_text("text", " ".join(words)))


def text_of(row: Mapping[str, Any], *path: str) -> str:
    """The text of a column, or of a field within it.

    Raises:
        DataError: naming the column.
    """
    value: Any = row
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    if value is None:
        raise DataError(f'has no "{".".join(path)}"' + seen_in(row, path[0]))
    return check_text(".".join(path), value)


def seen_in(row: Mapping[str, Any], column: str) -> str:
    """Which columns there are, if this one is not among them."""
    return "" if column in row else f" (it has: {', '.join(map(str, row)) or 'none'})"


def _request(index: int, before: str, document: str, after: str = "") -> Sample:
    """A user's turn around a document."""
    span = Span(len(before), len(before) + len(document))
    return Sample(index, messages=(Turn("user", before + document + after),), document=span)
