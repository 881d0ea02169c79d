"""Whatever bytes arrive: a frame that can be acted on, or a `ProtocolError`; nothing else."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import msgpack
import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

from pipespec.config import SamplingParams
from pipespec.errors import ProtocolError
from pipespec.messages import (
    KINDS,
    LAUNCHER,
    MAX_FRAME_BYTES,
    VERSION,
    Connect,
    Counters,
    Draft,
    Frame,
    Link,
    Message,
    Output,
    Tokens,
    decode,
    encode,
)
from pipespec.transport import ZmqTransport

FUZZ = settings(max_examples=150, deadline=None, derandomize=True, database=None)
SEED_AND_ID = st.integers(0, (1 << 63) - 1)
TOKENS = st.lists(st.integers(0, (1 << 31) - 1), max_size=20).map(tuple)
TEXT = st.text(max_size=20)
PLAIN = st.none() | st.booleans() | SEED_AND_ID | st.floats(allow_nan=False) | TEXT
OF_TYPE: dict[Any, st.SearchStrategy[Any]] = {
    "int": SEED_AND_ID,
    "bool": st.booleans(),
    "str": TEXT,
    "float": st.floats(0, 1e6),
    "Tokens": TOKENS,
    "tuple[str, ...]": st.lists(TEXT, max_size=4).map(tuple),
    "Counters": st.dictionaries(TEXT, PLAIN | st.lists(PLAIN, max_size=3), max_size=4),
    "SamplingParams": st.builds(
        SamplingParams,
        st.floats(0, 1e4),
        st.floats(0.001, 1),
        st.integers(0, (1 << 31) - 1),
        st.floats(0, 0.999),
        SEED_AND_ID,
    ),
}
IN_RANGE = {  # fields that do not take every integer
    "stage": st.integers(LAUNCHER, 1023),
    "number": st.integers(1, (1 << 63) - 1),
    "start": st.integers(0, 1 << 40),
    "max_new_tokens": st.integers(1, 1 << 22),
}
ANYTHING = st.recursive(
    PLAIN | st.binary(max_size=8) | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=12,
)


VERIFICATIONS = st.lists(
    st.integers(0, 9).flatmap(
        lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(0, 1)).map(
            lambda v: (v[0], v[1], v[1] + v[2])
        )
    ),
    max_size=4,
).map(lambda steps: tuple(number for step in steps for number in step))


def messages_of(kind: type) -> st.SearchStrategy[Message]:
    values = {item.name: IN_RANGE.get(item.name, OF_TYPE[item.type]) for item in fields(kind)}
    if kind is Output:
        values["verifications"] = VERIFICATIONS
    if kind is not Draft:
        return st.builds(kind, **values)
    return TOKENS.flatmap(
        lambda tokens: st.builds(
            kind, **values | {"tokens": st.just(tokens), "parents": parents_of(len(tokens))}
        )
    )


def parents_of(num_tokens: int) -> st.SearchStrategy[Tokens]:
    """Of the last tokens, or of all, or of none: each after an earlier one."""
    return st.integers(0, num_tokens).flatmap(
        lambda num_own: st.tuples(
            *(st.integers(-1, index - 1) for index in range(num_own, num_tokens))
        )
    )


FRAMES = st.builds(
    Frame,
    sender=st.integers(LAUNCHER, 1023),
    incarnation=SEED_AND_ID,
    receiver_incarnation=SEED_AND_ID,
    sequence=SEED_AND_ID,
    message=st.one_of([messages_of(kind) for kind in KINDS]),
)


def decode_or_refuse(data: bytes) -> Frame | None:
    with contextlib.suppress(ProtocolError):
        return decode(data)
    return None


def packed(*parts: Any) -> bytes:
    data = msgpack.packb(list(parts))
    assert isinstance(data, bytes)
    return data


@FUZZ
@given(FRAMES)
def test_what_is_encoded_is_decoded_unchanged(frame: Frame) -> None:
    assert decode(encode(frame)) == frame


@FUZZ
@given(st.binary(max_size=200))
def test_random_bytes_are_refused(data: bytes) -> None:
    assert decode_or_refuse(data) is None


@FUZZ
@given(ANYTHING)
def test_random_msgpack_is_refused(value: Any) -> None:
    assert decode_or_refuse(msgpack.packb(value)) is None


@FUZZ
@given(st.integers(0, len(KINDS) - 1), st.lists(ANYTHING, max_size=8))
def test_random_fields_in_a_valid_envelope_are_refused_or_valid(
    kind: int, values: list[Any]
) -> None:
    frame = decode_or_refuse(packed(VERSION, kind, 0, 1, 1, 0, *values))
    if frame is not None:
        decode(encode(frame))


@FUZZ
@given(FRAMES, st.data())
def test_a_frame_with_one_part_replaced_is_refused_or_valid(
    frame: Frame, data: st.DataObject
) -> None:
    parts = msgpack.unpackb(encode(frame), strict_map_key=False)
    parts[data.draw(st.integers(0, len(parts) - 1))] = data.draw(ANYTHING)
    changed = decode_or_refuse(packed(*parts))
    if changed is not None:
        decode(encode(changed))


@FUZZ
@given(FRAMES, st.data())
def test_a_frame_with_one_byte_changed_is_refused_or_valid(
    frame: Frame, data: st.DataObject
) -> None:
    damaged = bytearray(encode(frame))
    damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= data.draw(st.integers(1, 255))
    changed = decode_or_refuse(bytes(damaged))
    if changed is not None:
        decode(encode(changed))


@FUZZ
@given(FRAMES, st.data())
def test_a_frame_cut_short_or_with_something_after_it_is_refused(
    frame: Frame, data: st.DataObject
) -> None:
    encoded = encode(frame)
    assert decode_or_refuse(encoded[: data.draw(st.integers(0, len(encoded) - 1))]) is None
    assert decode_or_refuse(encoded + data.draw(st.binary(min_size=1, max_size=9))) is None


@FUZZ
@given(FRAMES)
def test_a_field_too_few_or_too_many_is_refused(frame: Frame) -> None:
    parts = msgpack.unpackb(encode(frame), strict_map_key=False)
    for changed in (parts[:-1], [*parts, 0]):
        with pytest.raises(ProtocolError, match=r"field|six items"):
            decode(packed(*changed))


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (packed(VERSION + 1, 12, 0, 1, 1, 0), "version"),
        (packed(True, 12, 0, 1, 1, 0), "version"),
        (packed(VERSION, len(KINDS), 0, 1, 1, 0), "kind"),
        (packed(VERSION, -1, 0, 1, 1, 0), "kind"),
        (packed(VERSION, True, 0, 1, 1, 0), "kind"),
        (packed(VERSION, 12, 1024, 1, 1, 0), "sender"),
        (packed(VERSION, 12, 0, -1, 1, 0), "incarnation"),
        (packed(VERSION, 12, 0, 1, 1.0, 0), "receiver_incarnation"),
        (packed(VERSION, 3, 0, 1, 1, 0, 1, 0, [7], "", [1, 1]), "verifications"),
        (packed(VERSION, 3, 0, 1, 1, 0, 1, 0, [7], "", [1, 2, 2]), "verifications"),
        (packed(VERSION, 3, 0, 1, 1, 0, 1, 0, [7], "", [3, 1, 3]), "verifications"),
        (packed(VERSION, 1, 0, 1, 1, 0, 1, 1 << 63, 0, [1 << 31], False, []), "tokens"),
        (packed(VERSION, 1, 0, 1, 1, 0, 1, 1 << 63, 0, [True], False, []), "tokens"),
        (packed(VERSION, 1, 0, 1, 1, 0, 1, 1 << 63, (1 << 40) + 1, [], False, []), "start"),
        (packed(VERSION, 1, 0, 1, 1, 0, 1, 1 << 63, 0, [], 1, []), "last"),
        (packed(VERSION, 1, 0, 1, 1, 0, 1, 1 << 63, 0, [4, 5], False, [-1, 1]), "parents"),
        (packed(VERSION, 1, 0, 1, 1, 0, 1, 1 << 63, 0, [4, 5], False, [-2, 0]), "parents"),
        (packed(VERSION, 1, 0, 1, 1, 0, 1, 1 << 63, 0, [4, 5], False, [1]), "parents"),
        (packed(VERSION, 1, 0, 1, 1, 0, 1, 1 << 63, 0, [4, 5], False, [-1] * 3), "parents"),
        (packed(VERSION, 2, 0, 1, 1, 0, 1, 0, 0, [], False), "number"),
        (packed(VERSION, 10, 0, 1, 1, 0, 1, {1: 2}), "values"),
        (b"\xc1", "msgpack"),
        (b"\xdd\xff\xff\xff\xff", "msgpack"),  # an array of four billion items, it says
        (b"\x81\x90\x00", "msgpack"),  # a map whose key is a list
        (b"\x91" * 100_000, "msgpack"),  # nested deeper than any stack
        (b"\xc7\x00\xff", "frame"),  # an empty timestamp
        (b"\xd6\xff\x00\x00\x00\x00", "frame"),  # a timestamp
    ],
)
def test_a_refusal_says_what_is_wrong(data: bytes, complaint: str) -> None:
    with pytest.raises(ProtocolError, match=complaint):
        decode(data)


@pytest.mark.parametrize(
    "sampling",
    [
        [0.0, 1.0, 0, 0.0],
        [-1.0, 1.0, 0, 0.0, 0],
        [float("nan"), 1.0, 0, 0.0, 0],
        [float("inf"), 1.0, 0, 0.0, 0],
        [0.0, 0.0, 0, 0.0, 0],
        [0.0, 1.0, -1, 0.0, 0],
        [0.0, 1.0, 0.5, 0.0, 0],
        [0.0, 1.0, 0, 1.0, 0],
        [0.0, 1.0, 0, 0.0, -1],
        [0.0, 1.0, 0, 0.0, 1 << 63],
        [True, 1.0, 0, 0.0, 0],
        "01234",
        None,
    ],
)
def test_sampling_parameters_out_of_range_are_refused(sampling: Any) -> None:
    with pytest.raises(ProtocolError, match="sampling"):
        decode(packed(VERSION, 0, LAUNCHER, 1, 1, 0, 1, [1], [], sampling, 5, [], []))


def test_a_frame_beyond_the_limit_is_refused_unread() -> None:
    with pytest.raises(ProtocolError, match="limit"):
        decode(bytes(MAX_FRAME_BYTES + 1))


def test_the_types_of_all_message_fields_are_known_to_these_tests() -> None:
    assert {item.type for kind in KINDS for item in fields(kind)} <= set(OF_TYPE)
    assert Tokens == tuple[int, ...] and Counters == dict[str, Any]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20.0
    while not condition():
        assert time.monotonic() < deadline, "took too long"


def test_a_live_link_survives_a_storm_of_damaged_frames(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Every way to damage a frame by one byte, at a stage's socket; each good frame between them
    arrives, and every damaged one is either counted or still a valid frame."""
    good = Frame(1, 1, 1, 0, Connect("tcp://127.0.0.1:5000"))
    encoded = encode(good)
    storm = [
        encoded[:place] + bytes([encoded[place] ^ change]) + encoded[place + 1 :]
        for place in range(len(encoded))
        for change in (0x01, 0x40, 0x80, 0xFF)
    ]
    expected = [frame for data in storm for frame in (decode_or_refuse(data), good) if frame]
    num_refused = sum(decode_or_refuse(data) is None for data in storm)
    with ZmqTransport[Link]() as stage, zmq.Context() as context:
        endpoint = stage.bind(Link.UP, f"ipc://{tmp_path_factory.mktemp('s')}/link")
        with context.socket(zmq.DEALER) as peer:
            peer.connect(endpoint)
            for data in storm:
                peer.send(data)
                peer.send(encoded)
            received: list[Frame] = []

            def all_arrived() -> bool:
                received.extend(frame for _, frame in stage.receive(0.1))
                return len(received) >= len(expected)

            wait_until(all_arrived)
            assert received == expected
            assert stage.num_malformed == num_refused > 0
