"""A contestant that the user brings: any program, started anew for each of its turns.

It finds the prompts in a file of JSON lines, {"index", "prompt", "token_ids", "max_new_tokens",
"temperature", "top_p", "top_k", "min_p", "seed"}, and prints one JSON line a prompt: {"index",
"num_tokens", "seconds"} and, to be compared with greedy, "text" or "token_ids" (of what it
generated), and "first_token_s" if it knows. Loading is not its time: it measures itself, from a
request to the last token, prefill included. What is printed is checked, not believed: all prompts,
once, in no more seconds than it ran.
"""

from __future__ import annotations

import json
import math
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from pipespec.commands.inputs import Prompt
from pipespec.comparison.process import ContestantFailed, Group
from pipespec.config import SamplingParams
from pipespec.errors import UsageError

PLACEHOLDER: Final = "{prompts}"
_MAX_SHOWN: Final = 80


@dataclass(frozen=True, slots=True)
class CommandAnswer:
    """One line of a command; what it does not tell is None."""

    index: int
    num_tokens: int
    seconds: float
    first_token_s: float | None
    text: str | None
    token_ids: tuple[int, ...] | None


def parse_command(text: str) -> tuple[str, str]:
    """Name and command line of `NAME=COMMAND`.

    Raises:
        UsageError: it has another form, or does not say where the prompts go.
    """
    name, equals, command = text.partition("=")
    name = name.strip()
    if not equals or not name or not command.strip():
        raise UsageError(f"--command is {text}; it must be NAME='COMMAND ... {PLACEHOLDER} ...'")
    if any(not (letter.isalnum() or letter in "-_.") for letter in name):
        raise UsageError(f"--command: the name {name} may have letters, digits, '-', '_' and '.'")
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise UsageError(f"--command {name}: {error}") from error
    if not any(PLACEHOLDER in word for word in words):
        raise UsageError(f"--command {name} has no {PLACEHOLDER}, where the file's path goes")
    return name, command.strip()


def write_prompts(
    path: Path, prompts: Sequence[Prompt], limits: Mapping[int, int], sampling: SamplingParams
) -> None:
    """The file that a program reads. limits: of new tokens, by a prompt's index."""
    rows = [
        {
            "index": prompt.index,
            "prompt": prompt.text,
            "token_ids": prompt.ids,
            "max_new_tokens": limits[prompt.index],
            **asdict(sampling),
        }
        for prompt in prompts
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def run_command(
    group: Group,
    command: str,
    prompts_path: Path,
    limits: Mapping[int, int],
    *,
    environment: Mapping[str, str],
    cores: Sequence[int],
    timeout_s: float,
) -> list[CommandAnswer]:
    """One turn: starts the program and reads its lines until it ends.

    limits: of each prompt, by index, the tokens that it may have. timeout_s: the longest silence.

    Raises:
        ContestantFailed: in one clause, with what the program said last.
    """
    words = [word.replace(PLACEHOLDER, str(prompts_path)) for word in shlex.split(command)]
    started_s = time.monotonic()
    group.start(words, environment, cores)
    group.end_input()
    answers: dict[int, CommandAnswer] = {}
    while (line := group.read(timeout_s)) is not None:
        if not line.strip():
            continue
        answer = read_answer(line, limits)
        if answer.index in answers:
            raise ContestantFailed(f"answered prompt {answer.index} twice")
        answers[answer.index] = answer
    ran_s = time.monotonic() - started_s
    if group.wait(timeout_s) != 0:
        raise ContestantFailed(group.describe_end())
    if len(answers) < len(limits):
        raise ContestantFailed(f"answered {len(answers)} of {len(limits)} prompts")
    told_s = sum(answer.seconds for answer in answers.values())
    if told_s > ran_s:
        raise ContestantFailed(f"tells of {told_s:.4g} s, but ran for {ran_s:.4g} s")
    return [answers[index] for index in limits]


def read_answer(line: bytes, limits: Mapping[int, int]) -> CommandAnswer:
    """Checks a line; see `run_command`.

    Raises:
        ContestantFailed: naming what is wrong with it.
    """
    values = _object(line)
    index = values.get("index")
    if type(index) is not int or index not in limits:
        raise ContestantFailed(f'printed "index": {_shown(index)}, which no prompt has')
    where = f"for prompt {index}"
    num_tokens = values.get("num_tokens")
    if type(num_tokens) is not int or not 1 <= num_tokens <= limits[index]:
        raise ContestantFailed(
            f'printed "num_tokens": {_shown(num_tokens)} {where}; it must be an integer from 1 to '
            f"{limits[index]}"
        )
    seconds = _seconds(values.get("seconds"))
    if seconds is None:
        raise ContestantFailed(
            f'printed "seconds": {_shown(values.get("seconds"))} {where}; it must be above 0'
        )
    first_s = _seconds(values.get("first_token_s"))
    ids = values.get("token_ids")
    if ids is not None and not _are_ids(ids, num_tokens):
        raise ContestantFailed(f'printed "token_ids" {where} that are not "num_tokens" integers')
    text = values.get("text")
    return CommandAnswer(
        index,
        num_tokens,
        seconds,
        first_s if first_s is not None and first_s <= seconds else None,
        text if isinstance(text, str) else None,
        None if ids is None else tuple(ids),
    )


def _object(line: bytes) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        text = _short(line.decode("utf-8", errors="replace").strip())
        raise ContestantFailed(f"printed a line that is no JSON object: {text}")
    return values


def _are_ids(value: Any, count: int) -> bool:
    is_list = isinstance(value, list) and len(value) == count
    return is_list and all(type(token) is int and token >= 0 for token in value)


def _seconds(value: Any) -> float | None:
    """A number of seconds above 0, or None."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) and value > 0 else None


def _shown(value: Any) -> str:
    return _short(json.dumps(value))


def _short(text: str) -> str:
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."
