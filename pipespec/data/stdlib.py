"""Prompts from the standard library: signatures and docstrings of functions no demo model has seen.

A prompt is the exact source of a public function or method, without decorators, up to the end of
its docstring; a model is to continue with the body. The line end after the docstring is left to the
model: in source it is one token with the indentation that follows, and a prompt that ends with it
alone would tell the model that the function is over. Only modules that `pipespec.demo.corpus` holds
out are used. They come from the running interpreter, so another Python version has somewhat other
prompts.

What it does not know: whether a near-duplicate of a function is on the train side.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipespec.demo.corpus import SourceFile, held_out_files, is_library_module
from pipespec.demo.functions import SourceFunction, functions_of

MIN_PROMPT_CHARS = 100
MAX_PROMPT_CHARS = 700
# A docstring that restates the function's name tells the model nothing to go on.
MIN_DOCSTRING_WORDS = 8
# After a function with a shorter body there would be hardly anything left to write.
MIN_BODY_LINES = 3


@dataclass(frozen=True, slots=True)
class StdlibPrompt:
    """A prompt and the function it is from, such as `textwrap.indent`."""

    name: str
    text: str


@dataclass(frozen=True, slots=True)
class _Candidate:
    prompt: StdlibPrompt
    is_method: bool

    @property
    def order(self) -> tuple[bool, bytes]:
        """Functions before methods, which begin indented; otherwise a stable hash of the name."""
        name = self.prompt.name.encode("utf-8")
        return self.is_method, hashlib.blake2b(name, digest_size=8).digest()


def stdlib_prompts(folder: Path | None = None) -> list[StdlibPrompt]:
    """All prompts, no text twice, always in the same order for one Python version.

    The order takes one function of each module, then the second of each, and so on; within such a
    round a stable hash of the name decides, so the first few are from different modules.
    """
    ranked: list[tuple[int, tuple[bool, bytes], StdlibPrompt]] = []
    seen: set[str] = set()
    for file in held_out_files(folder):
        turn = 0
        for candidate in sorted(_candidates(file), key=lambda candidate: candidate.order):
            if candidate.prompt.text not in seen:
                seen.add(candidate.prompt.text)
                ranked.append((turn, candidate.order, candidate.prompt))
                turn += 1
    return [prompt for _, _, prompt in sorted(ranked, key=lambda entry: entry[:2])]


def _candidates(file: SourceFile) -> Iterator[_Candidate]:
    name = file.module_name
    if not is_library_module(name) or _is_private(name):
        return
    for function in functions_of(file):
        text = None if _is_private(function.name) else _prompt_text(function)
        if text is not None:
            yield _Candidate(StdlibPrompt(f"{name}.{function.name}", text), function.is_method)


def _is_private(dotted_name: str) -> bool:
    return any(part.startswith("_") for part in dotted_name.split("."))


def _prompt_text(function: SourceFunction) -> str | None:
    """From the `def` line to the docstring's last line, or None where that makes no good prompt."""
    node = function.node
    docstring = ast.get_docstring(node)
    if docstring is None or len(node.body) < 2:
        return None
    end, last = node.body[0].end_lineno, node.end_lineno
    assert end is not None and last is not None
    text = function.text(end).removesuffix("\n")
    good = (
        MIN_PROMPT_CHARS <= len(text) <= MAX_PROMPT_CHARS
        and len(docstring.split()) >= MIN_DOCSTRING_WORDS
        # A doctest alone does not say what to write.
        and not docstring.startswith(">>>")
        and last - end >= MIN_BODY_LINES
        # A statement on the docstring's own last line would be cut in two.
        and node.body[1].lineno > end
    )
    return text if good else None
