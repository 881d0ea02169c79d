"""The wire protocol: every message that stages and launcher exchange, and its msgpack encoding.

Token ids and counters only; no probabilities, no pickle. A frame is one msgpack array

    [version, kind, sender, incarnation, receiver_incarnation, sequence, *fields]

and `decode` checks version, kind, the number of fields, each type and each range, so that what it
returns can be acted on; anything else raises `ProtocolError`. Positions are absolute (the prompt
counts) and zero-based. Drafts travel down (towards the target), verdicts up.

This module does not know what a message means: `state` does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from enum import StrEnum
from itertools import count
from operator import lt
from typing import Any, Final, NamedTuple

import msgpack

from pipespec.config import SamplingParams
from pipespec.errors import ProtocolError

VERSION: Final = 4
LAUNCHER: Final = -1  # the sender index of the launcher; stages are 0 (first draft) to k-1 (target)
MAX_TOKEN_ID: Final = (1 << 31) - 1
MAX_TOKENS: Final = 1 << 22  # ids in one message; the longest prompt that can be submitted
MAX_FRAME_BYTES: Final = 64 << 20
MAX_TEXT: Final = 1 << 20
_MAX_INT: Final = (1 << 63) - 1
_INTEGERS: Final = {int}


class Link(StrEnum):
    """The three connections of a stage."""

    UP = "up"  # to the stage before it, towards the first draft
    DOWN = "down"  # to the stage after it, towards the target
    LAUNCHER = "launcher"


Tokens = tuple[int, ...]
Counters = dict[str, Any]
Check = Callable[[Any], Any]


def _integer(low: int, high: int) -> Check:
    def check(value: Any) -> int:
        if type(value) is not int or not low <= value <= high:
            raise ValueError(f"an integer from {low} to {high}")
        return value

    return check


def _flag(value: Any) -> bool:
    if type(value) is not bool:
        raise ValueError("true or false")
    return value


def _text(value: Any) -> str:
    if type(value) is not str or len(value) > MAX_TEXT:
        raise ValueError(f"a text of at most {MAX_TEXT} characters")
    return value


def _tokens(value: Any) -> Tokens:
    if type(value) not in (list, tuple) or len(value) > MAX_TOKENS:
        raise ValueError(f"a list of at most {MAX_TOKENS} token ids")
    if value and not (_are_integers(value) and min(value) >= 0 and max(value) <= MAX_TOKEN_ID):
        raise ValueError("token ids that are integers from 0 to 2**31 - 1")
    return tuple(value)


def _parents(value: Any) -> Tokens:
    if type(value) not in (list, tuple) or len(value) > MAX_TOKENS:
        raise ValueError(f"a list of at most {MAX_TOKENS} indexes")
    if value and not (_are_integers(value) and min(value) >= -1):
        raise ValueError("for each prepared token the index of an earlier one, or -1")
    return tuple(value)


def _verifications(value: Any) -> Tokens:
    numbers = _tokens(value)
    offered, accepted, emitted = numbers[::3], numbers[1::3], numbers[2::3]
    is_whole = len(offered) == len(emitted)
    is_possible = (a <= min(o, e) and e <= a + 1 for o, a, e in zip(offered, accepted, emitted))
    if not (is_whole and all(is_possible)):
        raise ValueError("of each verification candidates, of them accepted ones, and tokens")
    return numbers


def _are_integers(values: Sequence[Any]) -> bool:
    return set(map(type, values)) == _INTEGERS


def _texts(value: Any) -> tuple[str, ...]:
    if type(value) not in (list, tuple) or len(value) > 64:
        raise ValueError("a list of at most 64 texts")
    return tuple(_text(item) for item in value)


def _counters(value: Any) -> Counters:
    if type(value) is not dict or not all(type(key) is str for key in value):
        raise ValueError("a map with text keys")
    return value


def _sampling(value: Any) -> SamplingParams:
    if isinstance(value, SamplingParams):
        return value
    if type(value) not in (list, tuple) or len(value) != 5:
        raise ValueError("five sampling parameters")
    temperature, top_p, top_k, min_p, seed = value
    numbers = (temperature, top_p, min_p)
    if not all(type(x) in (int, float) for x in numbers) or type(top_k) is not int:
        raise ValueError("sampling parameters that are numbers")
    if type(seed) is not int:
        raise ValueError("a sampling seed that is an integer")
    try:
        return SamplingParams(float(temperature), float(top_p), top_k, float(min_p), seed)
    except Exception as error:
        raise ValueError(str(error)) from error


_REQUEST = _integer(0, _MAX_INT)
_POSITION = _integer(0, 1 << 40)
_HASH = _integer(0, (1 << 64) - 1)
_NUMBER = _integer(1, _MAX_INT)
_STAGE = _integer(LAUNCHER, 1023)
_INCARNATION = _integer(0, _MAX_INT)


def _wire(check: Check, **options: Any) -> Any:
    """A dataclass field that travels, with the check that its decoded value must pass."""
    return field(metadata={"check": check}, **options)


@dataclass(frozen=True, slots=True)
class Submit:
    """A request enters at the target and travels up. `committed` is the launcher's journal: ids
    of the output that are final already (empty, except after the target was restarted)."""

    request: int = _wire(_REQUEST)
    prompt: Tokens = _wire(_tokens)
    committed: Tokens = _wire(_tokens)
    sampling: SamplingParams = _wire(_sampling)
    max_new_tokens: int = _wire(_integer(1, MAX_TOKENS))
    eos: Tokens = _wire(_tokens)
    stop: tuple[str, ...] = _wire(_texts)


@dataclass(frozen=True, slots=True)
class Draft:
    """A hint from stage i to i+1: `tokens` may follow the prefix whose hash is `parent`. First come
    the drafter's own, each after the one before it, then what it prepared for other verdicts.
    `last`: it stops after its own until it hears a verdict. `parents`: for each of the prepared
    tokens the index of the one before it, -1 for the prefix itself."""

    request: int = _wire(_REQUEST)
    parent: int = _wire(_HASH)
    start: int = _wire(_POSITION)
    tokens: Tokens = _wire(_tokens)
    last: bool = _wire(_flag)
    parents: Tokens = _wire(_parents, default=())

    @property
    def num_own(self) -> int:
        """How many of the tokens are the drafter's own."""
        return len(self.tokens) - len(self.parents)


@dataclass(frozen=True, slots=True)
class Verdict:
    """A command from stage i+1 to i: from `start` on, my own tokens are `tokens`. Numbered per
    (incarnation, request). `full`: `tokens` is everything since the prompt, valid on its own."""

    request: int = _wire(_REQUEST)
    number: int = _wire(_NUMBER)
    start: int = _wire(_POSITION)
    tokens: Tokens = _wire(_tokens)
    full: bool = _wire(_flag)


@dataclass(frozen=True, slots=True)
class Output:
    """Committed tokens, target to launcher. `finish_reason`: "", "eos", "stop" or "length".
    `verifications`: which led to them; for each, in order, how many candidates were offered, how
    many of them accepted, and how many tokens that brought."""

    request: int = _wire(_REQUEST)
    start: int = _wire(_POSITION)
    tokens: Tokens = _wire(_tokens)
    finish_reason: str = _wire(_text)
    verifications: Tokens = _wire(_verifications, default=())


@dataclass(frozen=True, slots=True)
class Finish:
    """The request is complete: every stage forgets it and reports its `Stats`."""

    request: int = _wire(_REQUEST)


@dataclass(frozen=True, slots=True)
class Abort:
    """The caller no longer wants the request: like `Finish`."""

    request: int = _wire(_REQUEST)


@dataclass(frozen=True, slots=True)
class Hello:
    """A stage introduces itself, to the launcher at its start and to its neighbours whenever its
    incarnation changes. `endpoint`: where it accepts the link from the stage above ("" if none).
    The digests must match what the launcher sent it to do."""

    stage: int = _wire(_STAGE)
    pid: int = _wire(_integer(0, _MAX_INT))
    config_digest: str = _wire(_text)
    tokenizer_digest: str = _wire(_text)
    endpoint: str = _wire(_text)


@dataclass(frozen=True, slots=True)
class Connect:
    """Launcher to stage: where the next stage down listens."""

    endpoint: str = _wire(_text)


@dataclass(frozen=True, slots=True)
class Ready:
    """The stage can serve: its model is loaded and warmed up. `info`: facts about the runner."""

    load_s: float = _wire(lambda value: _float(value))
    info: Counters = _wire(_counters)


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """The stage is alive. `phase`: "starting", "loading", "warming up" or "serving"."""

    phase: str = _wire(_text)
    counters: Counters = _wire(_counters)


@dataclass(frozen=True, slots=True)
class Stats:
    """What one stage did for one finished request: step times in seconds, counts."""

    request: int = _wire(_REQUEST)
    values: Counters = _wire(_counters)


@dataclass(frozen=True, slots=True)
class Fault:
    """The stage is about to exit because of an exception. `kind`: the error class's name."""

    kind: str = _wire(_text)
    message: str = _wire(_text)
    traceback: str = _wire(_text)


@dataclass(frozen=True, slots=True)
class Shutdown:
    """Launcher to stage: close everything and exit with status 0."""


def _float(value: Any) -> float:
    if type(value) not in (int, float):
        raise ValueError("a number")
    return float(value)


Message = (
    Submit | Draft | Verdict | Output | Finish | Abort | Hello | Connect | Ready | Heartbeat
    | Stats | Fault | Shutdown
)  # fmt: skip

KINDS: Final[tuple[type, ...]] = (
    Submit, Draft, Verdict, Output, Finish, Abort, Hello, Connect, Ready, Heartbeat, Stats, Fault,
    Shutdown,
)  # fmt: skip
_KIND_OF: Final = {kind: index for index, kind in enumerate(KINDS)}
_FIELDS: Final = {
    kind: tuple((item.name, item.metadata["check"]) for item in fields(kind)) for kind in KINDS
}


class Frame(NamedTuple):
    """A message with the identities that let a receiver refuse what a dead process sent.

    `incarnation` numbers the sender's process, `receiver_incarnation` is the receiver's as the
    sender last knew it, `sequence` counts the frames on the link (gaps show loss).
    """

    sender: int
    incarnation: int
    receiver_incarnation: int
    sequence: int
    message: Message


def encode(frame: Frame) -> bytes:
    """The frame as bytes."""
    message = frame.message
    values = [getattr(message, name) for name, _ in _FIELDS[type(message)]]
    for index, value in enumerate(values):
        if isinstance(value, SamplingParams):
            values[index] = value.as_tuple()
    head = [VERSION, _KIND_OF[type(message)], frame.sender, frame.incarnation]
    packed = msgpack.packb([*head, frame.receiver_incarnation, frame.sequence, *values])
    assert isinstance(packed, bytes)
    return packed


def decode(data: bytes) -> Frame:
    """The frame that `encode` wrote.

    Raises:
        ProtocolError: for anything else, naming the message kind and field that is wrong.
    """
    if len(data) > MAX_FRAME_BYTES:
        raise ProtocolError(f"frame of {len(data)} bytes; the limit is {MAX_FRAME_BYTES}")
    try:
        parts = msgpack.unpackb(data, strict_map_key=False, max_ext_len=0)
    except (ValueError, TypeError, RecursionError, msgpack.exceptions.UnpackException) as error:
        raise ProtocolError(f"frame is not msgpack: {error}") from error
    if type(parts) is not list or len(parts) < 6:
        raise ProtocolError("frame is not an array of at least six items")
    if type(parts[0]) is not int or parts[0] != VERSION:
        raise ProtocolError(f"frame has protocol version {parts[0]!r}, not {VERSION}")
    kind_index = parts[1]
    if type(kind_index) is not int or not 0 <= kind_index < len(KINDS):
        raise ProtocolError(f"frame has unknown message kind {kind_index!r}")
    kind = KINDS[kind_index]
    specs = _FIELDS[kind]
    if len(parts) != 6 + len(specs):
        raise ProtocolError(f"{kind.__name__} has {len(parts) - 6} fields; it needs {len(specs)}")
    checks = _CHECKS[kind]
    try:
        head = [check(value) for check, value in zip(checks, parts[2:6])]
        body = [check(value) for check, value in zip(checks[4:], parts[6:])]
    except ValueError as error:
        raise _named(kind, parts[2:]) from error
    message = kind(*body)
    if kind is Draft and not all(map(lt, message.parents, count(message.num_own))):
        raise ProtocolError("Draft.parents must be one for each prepared token, an earlier one")
    return Frame(head[0], head[1], head[2], head[3], message)


_HEAD: Final = (
    ("sender", _STAGE),
    ("incarnation", _INCARNATION),
    ("receiver_incarnation", _INCARNATION),
    ("sequence", _INCARNATION),
)


_CHECKS: Final = {kind: tuple(check for _, check in (*_HEAD, *_FIELDS[kind])) for kind in KINDS}


def _named(kind: type, values: Sequence[Any]) -> ProtocolError:
    """The error of the first value that fails its check."""
    owners = ["frame"] * len(_HEAD) + [kind.__name__] * len(_FIELDS[kind])
    for owner, (name, check), value in zip(owners, (*_HEAD, *_FIELDS[kind]), values):
        try:
            check(value)
        except ValueError as error:
            return ProtocolError(f"{owner}.{name} must be {error}")
    raise AssertionError("every value passes its check")
