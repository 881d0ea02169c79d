"""Generated word problems in GSM8K's shape: a question, a worked answer, a last line `#### n`.

A problem is a template, the numbers in it, and words that change nothing: names, things, wording.
Template and numbers decide the split, so a held-out question is no rewording of a train question;
that, and a seed of its own for each split, keeps the splits apart. There are 117,995,808 distinct
questions, of 125,948 combinations of template and numbers; one combination in ten is held out.

Every step is one `+`, `-` or `*`, written out; every number is between 2 and 199, and factors are
small, because a tiny model has to learn the tables by heart. The same seed gives the same problems
on every machine and Python version. Shape: Cobbe et al., "Training Verifiers to Solve Math Word
Problems", arXiv 2110.14168.
"""

from __future__ import annotations

import operator
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Final, Literal, TypeVar

from pipespec.demo.corpus import is_held_out

Split = Literal["train", "held-out"]

NUM_HELD_OUT_ROWS: Final = 1000  # of the data set; `arithmetic_problems` gives as many as asked for

NAMES: Final = (
    *("Anna", "Ben", "Carl", "Dora", "Emma", "Finn", "Grace", "Hugo"),
    *("Ida", "Jack", "Kate", "Leo", "Mia", "Nora", "Oscar", "Paul"),
)
THINGS: Final = (
    *("apples", "balls", "books", "cards", "coins", "eggs", "flowers", "marbles"),
    *("nuts", "pens", "plums", "shells", "stamps", "stones", "tickets", "toys"),
)
CHAT_INSTRUCTION: Final = (
    "Work it out step by step. End with a line that has #### and the number, nothing else."
)

_SMALLEST, _LARGEST = 2, 199  # no number 1: every noun stays a plural
_OPERATIONS: Final = {"+": operator.add, "-": operator.sub, "*": operator.mul}
_RESULT_NAMES: Final = "wxyz"
_DIGIT: Final = range(2, 10)
_TEEN: Final = range(2, 21)
_LARGE: Final = range(20, 100)
_FINAL_ANSWER: Final = re.compile(r"####[ \t]*(\S*)")

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Problem:
    """One word problem. answer: one step a line, then `#### result`."""

    question: str
    answer: str
    result: int

    @property
    def prompt(self) -> str:
        """What a model is fed; the answer follows after a space, as in training text."""
        return f"Question: {self.question}\nAnswer:"

    @property
    def text(self) -> str:
        """The whole problem as one document of training text."""
        return f"{self.prompt} {self.answer}\n"


@dataclass(frozen=True, slots=True)
class Template:
    """What a kind of problem says.

    numbers: where `a`, `b`, ... are drawn from. steps: an operation and the sentence around it; in
    the sentence `{equation}` is the operation written out. Results are named w, x, y, z in turn.
    """

    name: str
    wordings: tuple[str, ...]
    numbers: tuple[range, ...]
    steps: tuple[tuple[str, str], ...]

    def values(self, numbers: Sequence[int]) -> dict[str, int] | None:
        """Numbers and results by name, or None where a result is too small or too large."""
        values = dict(zip("abcde", numbers))
        for name, (operation, _) in zip(_RESULT_NAMES, self.steps):
            left, sign, right = operation.split()
            values[name] = _OPERATIONS[sign](values[left], values[right])
            if not _SMALLEST <= values[name] <= _LARGEST:
                return None
        return values

    def is_held_out(self, numbers: Sequence[int]) -> bool:
        """Whether problems of this template with these numbers are kept from training."""
        return is_held_out(f"arithmetic {self.name} {' '.join(map(str, numbers))}")

    def problem(self, wording: str, words: Mapping[str, str], values: Mapping[str, int]) -> Problem:
        """The problem of one choice of wording, words and numbers."""
        lines = []
        for name, (operation, sentence) in zip(_RESULT_NAMES, self.steps):
            left, sign, right = operation.split()
            written = f"{values[left]} {sign} {values[right]} = {values[name]}"
            lines.append(sentence.format(equation=written, **words, **values))
        result = values[_RESULT_NAMES[len(self.steps) - 1]]
        lines.append(f"#### {result}")
        return Problem(wording.format(**words, **values), "\n".join(lines), result)


TEMPLATES: Final = (
    Template(
        "finding",
        (
            "{name} has {a} {things} and finds {b} more. How many {things} does {name} have now?",
            "There are {a} {things} in a box. {name} puts {b} more into it. How many {things} are "
            "in the box?",
        ),
        (_LARGE, _LARGE),
        (("a + b", "There are {equation} {things}."),),
    ),
    Template(
        "giving",
        (
            "{name} has {a} {things} and gives {b} of them to {other}. How many {things} does "
            "{name} still have?",
            "{name} had {a} {things} and lost {b} of them. {other} lost none. How many {things} "
            "does {name} have left?",
        ),
        (_LARGE, range(2, 98)),
        (("a - b", "{name} has {equation} {things} left."),),
    ),
    Template(
        "shopping",
        (
            "{name} buys {a} {things} for {b} dollars each and a bag for {c} dollars. How many "
            "dollars does {name} pay?",
            "A bag costs {c} dollars. {name} takes the bag and {a} {things} at {b} dollars each. "
            "What does {name} pay in dollars?",
        ),
        (_DIGIT, _DIGIT, _TEEN),
        (
            ("a * b", "The {things} cost {equation} dollars."),
            ("w + c", "With the bag that is {equation} dollars."),
        ),
    ),
    Template(
        "change",
        (
            "{name} has {a} dollars and buys {b} {things} for {c} dollars each. How many dollars "
            "are left?",
            "The {things} are {c} dollars each. {name} had {a} dollars and buys {b} {things}. "
            "How many dollars does {name} keep?",
        ),
        (_LARGE, _DIGIT, _DIGIT),
        (
            ("b * c", "The {things} cost {equation} dollars."),
            ("a - w", "{name} has {equation} dollars left."),
        ),
    ),
    Template(
        "sharing",
        (
            "{name} has {a} {things} and gives {b} of them to each of {c} children. How many "
            "{things} are left?",
            "{c} children get {b} {things} each from {name}, who had {a} {things}. How many does "
            "{name} keep?",
        ),
        (_LARGE, _DIGIT, _DIGIT),
        (
            ("c * b", "The children get {equation} {things}."),
            ("a - w", "{name} keeps {equation} {things}."),
        ),
    ),
    Template(
        "ages",
        (
            "{name} is {a} years old. {other} is {b} years older. How old will {other} be in {c} "
            "years?",
            "{other} is {b} years older than {name}, who is {a} now. How old is {other} after {c} "
            "more years?",
        ),
        (range(5, 60), _TEEN, _TEEN),
        (
            ("a + b", "{other} is {equation} years old."),
            ("w + c", "Then {other} is {equation} years old."),
        ),
    ),
    Template(
        "times as old",
        (
            "{name} is {a} years old. {other} is {b} times as old. How many years older is "
            "{other} than {name}?",
            "{other} is {b} times as old as {name}, who is {a}. How many years are between them?",
        ),
        (_TEEN, _DIGIT),
        (
            ("a * b", "{other} is {equation} years old."),
            ("w - a", "The difference is {equation} years."),
        ),
    ),
    Template(
        "walking",
        (
            "{name} walks {a} miles a day for {b} days and then {c} miles more. How many miles "
            "does {name} walk?",
            "For {b} days {name} walked {a} miles each day. On the next day it was {c} miles. How "
            "many miles is that together?",
        ),
        (_DIGIT, _DIGIT, _TEEN),
        (
            ("b * a", "In {b} days {name} walks {equation} miles."),
            ("w + c", "Together that is {equation} miles."),
        ),
    ),
    Template(
        "riding",
        (
            "{name} rides {a} miles an hour for {b} hours, and {other} rides {c} miles an hour for "
            "{d} hours. How many miles do they ride together?",
            "{name} rode for {b} hours at {a} miles an hour. {other} rode for {d} hours at {c} "
            "miles an hour. How many miles did both ride?",
        ),
        (_DIGIT, _DIGIT, _DIGIT, _DIGIT),
        (
            ("b * a", "{name} rides {equation} miles."),
            ("d * c", "{other} rides {equation} miles."),
            ("w + x", "Together they ride {equation} miles."),
        ),
    ),
    Template(
        "reading",
        (
            "A book has {a} pages. {name} reads {b} pages a day for {c} days and {d} pages on the "
            "day after. How many pages are left?",
            "{name} read {b} pages on each of {c} days and then {d} pages more. The book has {a} "
            "pages. How many has {name} not read?",
        ),
        (range(40, 100), _DIGIT, _DIGIT, _TEEN),
        (
            ("c * b", "In {c} days {name} reads {equation} pages."),
            ("w + d", "Then {name} has read {equation} pages."),
            ("a - x", "There are {equation} pages left."),
        ),
    ),
    Template(
        "boxes",
        (
            "{name} has {a} boxes with {b} {things} each and {c} boxes with {d} {things} each. "
            "{e} of the {things} are broken. How many are not?",
            "In {a} boxes are {b} {things} each, in {c} others {d} each. {name} takes {e} {things} "
            "away. How many {things} remain?",
        ),
        (range(2, 7), range(2, 7), range(2, 7), range(2, 7), _TEEN),
        (
            ("a * b", "The first boxes have {equation} {things}."),
            ("c * d", "The others have {equation} {things}."),
            ("w + x", "Together they have {equation} {things}."),
            ("y - e", "Then {equation} {things} remain."),
        ),
    ),
    Template(
        "saving",
        (
            "{name} earns {a} dollars a day for {b} days and has {c} dollars from {other}. {name} "
            "buys {d} {things} for {e} dollars each. How many dollars are left?",
            "{other} gave {name} {c} dollars, and for {b} days of work {name} got {a} dollars each "
            "day. What is left in dollars after {name} buys {d} {things} at {e} dollars each?",
        ),
        (range(4, 10), range(2, 6), range(5, 21), range(2, 6), range(2, 7)),
        (
            ("b * a", "{name} earns {equation} dollars."),
            ("w + c", "With the gift {name} has {equation} dollars."),
            ("d * e", "The {things} cost {equation} dollars."),
            ("x - y", "There are {equation} dollars left."),
        ),
    ),
)


def arithmetic_problems(split: Split, count: int, seed: int) -> tuple[Problem, ...]:
    """The first `count` distinct problems of a split and seed; no question twice."""
    problems: dict[str, Problem] = {}
    for problem in _problems(split, seed):
        if len(problems) >= count:
            break
        problems.setdefault(problem.question, problem)
    return tuple(problems.values())


def arithmetic_text(num_problems: int, seed: int) -> Iterator[str]:
    """Training text: one document for each problem of the train split, few of them twice."""
    return (problem.text for problem in islice(_problems("train", seed), num_problems))


def is_correct(problem: Problem, text: str) -> bool:
    """Whether the first `#### n` of a completion is the result; what follows it is not read.

    text: without the prompt. `$12`, `1,200` and a full stop after the number are accepted.
    """
    found = _FINAL_ANSWER.search(text)
    if found is None:
        return False
    return found[1].removeprefix("$").removesuffix(".").replace(",", "") == str(problem.result)


def _problems(split: Split, seed: int) -> Iterator[Problem]:
    """Problems without end, templates equally often; now and then one comes again."""
    rng = random.Random(f"arithmetic {split} {seed}")
    while True:
        template = _choose(rng, TEMPLATES)
        numbers = tuple(_choose(rng, choices) for choices in template.numbers)
        values = template.values(numbers)
        if values is None or template.is_held_out(numbers) != (split == "held-out"):
            continue
        name, other = _choose(rng, NAMES), _choose(rng, NAMES)
        if name != other:
            words = {"name": name, "other": other, "things": _choose(rng, THINGS)}
            yield template.problem(_choose(rng, template.wordings), words, values)


def _choose(rng: random.Random, choices: Sequence[_T]) -> _T:
    """Like `rng.choice`, of which only `random()` is promised to stay what it is."""
    return choices[int(rng.random() * len(choices))]
