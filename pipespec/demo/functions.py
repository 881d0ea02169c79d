"""The functions in source files: whole ones to train on, and where prompts are cut from.

A model that has seen functions as documents of their own, each with an end, ends one instead of
running on into a loop.
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from pipespec.demo.corpus import SourceFile, is_library_module

MAX_FUNCTION_CHARS = 4000
MIN_FUNCTION_LINES = 3

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, slots=True)
class SourceFunction:
    """A function or method: its dotted name in the module, its syntax tree, the file's lines."""

    name: str
    node: FunctionNode
    lines: tuple[str, ...]
    is_method: bool

    def text(self, end_line: int | None = None) -> str:
        """The exact source from `def` to `end_line` (None: the function's last), no decorators."""
        last = self.node.end_lineno if end_line is None else end_line
        return "\n".join(self.lines[self.node.lineno - 1 : last]) + "\n"


def functions_of(file: SourceFile) -> Iterator[SourceFunction]:
    """Functions of the module and methods of its classes, in their order; none of a file that this
    Python cannot parse."""
    source = file.text()
    try:
        with warnings.catch_warnings():
            # Invalid escapes in somebody else's strings are no concern of our users.
            warnings.simplefilter("ignore")
            module = ast.parse(source)
    except SyntaxError:
        return
    lines = tuple(source.split("\n"))
    for node in module.body:
        if isinstance(node, FunctionNode):
            yield SourceFunction(node.name, node, lines, False)
        elif isinstance(node, ast.ClassDef):
            for member in node.body:
                if isinstance(member, FunctionNode):
                    yield SourceFunction(f"{node.name}.{member.name}", member, lines, True)


def function_texts(files: Iterable[SourceFile]) -> Iterator[str]:
    """Every function of library modules that is neither trivial nor huge, no text twice."""
    seen: set[str] = set()
    for file in files:
        if not is_library_module(file.module_name):
            continue
        for function in functions_of(file):
            text = function.text()
            is_fit = text.count("\n") >= MIN_FUNCTION_LINES and len(text) <= MAX_FUNCTION_CHARS
            if is_fit and text not in seen:
                seen.add(text)
                yield text
