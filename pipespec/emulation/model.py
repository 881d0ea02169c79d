"""A models config's "emulated" object: what a model that is not at hand takes and says.

step_ms               forward time by number of tokens, {"1": 120, "8": 431}; linear between,
                      flat beyond the ends
prefill_ms_per_token  added for each token beyond the table's largest number; default 0
agreement             drafts only: how often the token equals the target's on the same prefix;
                      with "stretches" {"easy": 0.97, "hard": 0.85} or one number for both
stretches             mean lengths of easy and hard passages in tokens, {"easy": 30, "hard": 5};
                      equal in all stages; default none
rank_exponent         where the draft is wrong, the target's token is not among its first n
                      choices with probability n ** -rank_exponent; default 0.86, that of the
                      demo family; 0: it never is among them
second_share          where the draft is wrong, how often the target's token is its second choice,
                      the ranks below keeping their proportions; default what rank_exponent says
vocab_size            default: the tokenizer's; equal in all stages
context_length        default 131072
seed                  default 0; equal in all stages
eos_after             the token at this position (the prompt counts) ends the text; default none
eos_token_id          default 0; drawn nowhere else
source                where the numbers are from; changes nothing
"""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Final

from pipespec.emulation.oracle import DEMO_RANK_EXPONENT, Oracle, Stretches
from pipespec.errors import ConfigError
from pipespec.hashing import hash_tokens

NUM_IDS: Final = 1 << 31  # a prompt may hold any id, whatever ids are drawn
NUM_TAIL_ROWS: Final = 1 << 20  # for branches; they cost nothing here
_KINDS: Final = ("easy", "hard")


@dataclass(frozen=True, slots=True)
class Emulation:
    """The "emulated" object, checked; step_ms sorted by number of tokens. agreement: None for the
    target, else in easy and in hard stretches."""

    step_ms: tuple[tuple[int, float], ...]
    prefill_ms_per_token: float = 0.0
    agreement: tuple[float, float] | None = None
    stretches: Stretches | None = None
    rank_exponent: float = DEMO_RANK_EXPONENT
    second_share: float | None = None
    vocab_size: int = NUM_IDS
    context_length: int = 1 << 17
    seed: int = 0
    eos_after: int | None = None
    eos_token_id: int = 0
    source: str = ""

    def forward_s(self, num_tokens: int) -> float:
        """Seconds that one forward of so many tokens takes."""
        counts = [count for count, _ in self.step_ms]
        at = bisect_left(counts, num_tokens)
        if at == len(counts):
            beyond = num_tokens - counts[-1]
            return (self.step_ms[-1][1] + beyond * self.prefill_ms_per_token) / 1e3
        count, step_ms = self.step_ms[at]
        if at > 0:
            count_before, ms_before = self.step_ms[at - 1]
            share = (num_tokens - count_before) / (count - count_before)
            step_ms = ms_before + share * (step_ms - ms_before)
        return step_ms / 1e3

    def oracle(self, vocab_size: int, name: str) -> Oracle:
        """Its tokens, of `vocab_size` ids. name: tells drafts apart that are wrong."""
        assert vocab_size >= 3
        easy, hard = self.agreement or (1.0, 1.0)
        return Oracle(
            agreement=easy,
            vocab_size=vocab_size,
            seed=self.seed,
            hard_agreement=hard if self.stretches else None,
            stretches=self.stretches,
            rank_exponent=self.rank_exponent,
            second_share=self.second_share,
            own=hash_tokens(name.encode()),
            eos=self.eos_token_id,
            eos_after=self.eos_after,
        )


def parse_emulation(values: Mapping[str, Any], name: str) -> Emulation:
    """Checks a models config's "emulated" object; `name` is the model's, for messages.

    Raises:
        ConfigError: naming the model, the key and what is allowed.
    """
    known = [item.name for item in fields(Emulation)]
    for key in values:
        if key not in known:
            raise ConfigError(f'{name}: unknown key "{key}" in "emulated"; it has {known}')
    checked: dict[str, Any] = {"step_ms": _step_ms(values.get("step_ms"), name)}
    for key, whole, low, high in (
        ("prefill_ms_per_token", False, 0, 1e6),
        ("rank_exponent", False, 0, 100),
        ("second_share", False, 0, 1),
        ("vocab_size", True, 3, NUM_IDS),
        ("context_length", True, 1, 1 << 40),
        ("seed", True, 0, (1 << 63) - 1),
        ("eos_after", True, 1, 1 << 40),
        ("eos_token_id", True, 0, NUM_IDS - 1),
    ):
        if values.get(key) is not None:
            checked[key] = _number(key, values[key], name, low, high, whole=whole)
    stretches = values.get("stretches")
    if stretches is not None:
        checked["stretches"] = Stretches(*_pair("stretches", stretches, name, 1, 1e9))
    agreement = values.get("agreement")
    if isinstance(agreement, Mapping):
        if stretches is None:
            raise ConfigError(
                f'{name}: "emulated" has an "agreement" of easy and hard stretches; it needs '
                '"stretches" too, like {"easy": 30, "hard": 5}'
            )
        checked["agreement"] = _pair("agreement", agreement, name, 0, 1)
    elif agreement is not None:
        checked["agreement"] = (_number("agreement", agreement, name, 0, 1),) * 2
    source = values.get("source", "")
    if not isinstance(source, str):
        raise ConfigError(f'{name}: "emulated" has "source": {source!r}; it must be a text')
    return Emulation(**checked, source=source)


def _number(
    key: str, value: object, name: str, low: float, high: float, *, whole: bool = False
) -> Any:
    kinds = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
        kind = "an integer" if whole else "a number"
        raise ConfigError(
            f'{name}: "emulated" has "{key}": {value!r}; it must be {kind} from {low} to {high}'
        )
    return value


def _pair(key: str, value: object, name: str, low: float, high: float) -> tuple[float, float]:
    """The numbers for easy and for hard stretches."""
    if not isinstance(value, Mapping) or set(value) != set(_KINDS):
        raise ConfigError(
            f'{name}: "emulated" has "{key}": {value!r}; it must be an object like '
            '{"easy": 0.97, "hard": 0.85}'
        )
    easy, hard = (_number(f"{key}.{kind}", value[kind], name, low, high) for kind in _KINDS)
    return easy, hard


def _step_ms(table: object, name: str) -> tuple[tuple[int, float], ...]:
    problem = f'{name}: "emulated" needs "step_ms", an object like {{"1": 120, "8": 431}}'
    if not isinstance(table, Mapping) or not table:
        raise ConfigError(problem)
    entries = []
    for key, value in table.items():
        text = str(key)
        if not re.fullmatch("[1-9][0-9]{0,8}", text):
            raise ConfigError(f"{problem}; {key!r} is not a number of tokens")
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ConfigError(f"{problem}; {value!r} is not a number of milliseconds")
        if not 0 <= value <= 1e7 or not math.isfinite(value):
            raise ConfigError(f"{problem}; {value!r} is out of range")
        entries.append((int(text), float(value)))
    return tuple(sorted(entries))
