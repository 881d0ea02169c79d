"""Links between processes: every message survives the wire, none is lost without notice."""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import zmq

from pipespec.config import SamplingParams
from pipespec.errors import ProtocolError
from pipespec.messages import (
    KINDS,
    LAUNCHER,
    MAX_FRAME_BYTES,
    Abort,
    Connect,
    Draft,
    Fault,
    Finish,
    Frame,
    Heartbeat,
    Hello,
    Link,
    Message,
    Output,
    Ready,
    Shutdown,
    Stats,
    Submit,
    Verdict,
    encode,
)
from pipespec.transport import Keys, MemoryTransport, Transport, ZmqTransport, connect_in_memory

DEADLINE_S = 20.0
ONE_OF_EACH: tuple[Message, ...] = (
    Submit(1, (5, 6), (7,), SamplingParams(0.7, 0.9, 40, 0.05, (1 << 63) - 1), 9, (2, 3), ("\n",)),
    Draft(1, (1 << 64) - 1, 2, (7, 8, 9), True),
    Verdict(1, 4, 2, (7, 8), False),
    Output(1, 2, (7, 8), "eos"),
    Finish(1),
    Abort((1 << 63) - 1),
    Hello(0, 4711, "digest", "", "ipc:///somewhere/0-1"),
    Connect("tcp://127.0.0.1:5000"),
    Ready(1.5, {"device": "cpu", "vocab_size": 4096}),
    Heartbeat("serving", {"num_malformed": 0}),
    Stats(1, {"step_s": [0.1, 0.2], "accepted": 3}),
    Fault("RuntimeError", "no", "Traceback ..."),
    Shutdown(),
)


def frame_of(message: Message, sequence: int = 0) -> Frame:
    return Frame(LAUNCHER, 1, 2, sequence, message)


def numbered(count: int) -> list[Frame]:
    return [frame_of(Finish(number), number) for number in range(count)]


def receive(transport: ZmqTransport[Link], count: int, wait_s: float = 0.2) -> list[Frame]:
    """Exactly `count` frames, however long they take within reason."""
    frames: list[Frame] = []
    deadline = time.monotonic() + DEADLINE_S
    while len(frames) < count and time.monotonic() < deadline:
        frames += [frame for _, frame in transport.receive(wait_s)]
    assert len(frames) == count
    return frames


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "took too long"
        time.sleep(0.01)


@contextmanager
def linked(
    endpoint: str, high_water: int = 1024, keys: Keys | None = None
) -> Iterator[tuple[ZmqTransport[Link], ZmqTransport[Link], str]]:
    """The two ends of one link, as the stages on either side of it see it."""
    with (
        ZmqTransport[Link](high_water=high_water, keys=keys) as lower,
        ZmqTransport[Link](high_water=high_water, keys=keys) as upper,
    ):
        bound = lower.bind(Link.UP, endpoint)
        upper.connect(Link.DOWN, bound)
        upper.send(Link.DOWN, frame_of(Shutdown()))
        receive(lower, 1)  # the connection stands: from here on both ends may send
        yield lower, upper, bound


@pytest.fixture(params=["ipc", "tcp"])
def endpoint(request: pytest.FixtureRequest, socket_dir: Path) -> str:
    return "tcp://127.0.0.1:*" if request.param == "tcp" else f"ipc://{socket_dir}/link"


@pytest.fixture
def socket_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """pytest's own folders have names too long for unix sockets on some systems."""
    return tmp_path_factory.mktemp("s")


def test_there_is_an_example_of_every_message_kind() -> None:
    assert {type(message) for message in ONE_OF_EACH} == set(KINDS)


def test_every_message_kind_arrives_unchanged_and_in_order_in_both_directions(
    endpoint: str,
) -> None:
    frames = [frame_of(message, number) for number, message in enumerate(ONE_OF_EACH)]
    with linked(endpoint) as (lower, upper, _):
        for frame in frames:
            assert upper.send(Link.DOWN, frame)
            assert lower.send(Link.UP, frame)
        assert receive(lower, len(frames)) == frames
        assert receive(upper, len(frames)) == frames
        assert lower.num_malformed == upper.num_malformed == 0


def test_a_long_prompt_fits_into_one_frame(endpoint: str) -> None:
    prompt = tuple(range(1 << 18))
    submit = frame_of(Submit(1, prompt, (), SamplingParams(), 1, (), ()))
    with linked(endpoint) as (lower, upper, _):
        assert upper.send(Link.DOWN, submit)
        assert receive(lower, 1) == [submit]


def test_a_full_link_refuses_and_everything_it_accepted_arrives_in_order(endpoint: str) -> None:
    payload = "x" * 10_000  # so that the kernel's buffers fill up too
    with linked(endpoint, high_water=8) as (lower, upper, _):
        accepted: list[Frame] = []
        refused_since = None
        while refused_since is None or time.monotonic() - refused_since < 0.2:
            frame = frame_of(Connect(payload), len(accepted))
            if upper.send(Link.DOWN, frame):
                accepted.append(frame)
                refused_since = None
            else:
                refused_since = refused_since or time.monotonic()
            assert len(accepted) < 10_000, "nothing bounds the link"
        assert receive(lower, len(accepted)) == accepted
        wait_until(lambda: upper.send(Link.DOWN, frame_of(Finish(7))))
        assert receive(lower, 1) == [frame_of(Finish(7))]


def test_a_link_whose_other_end_never_came_refuses_instead_of_losing(endpoint: str) -> None:
    with ZmqTransport[Link]() as lonely:
        lonely.bind(Link.UP, endpoint)
        assert not lonely.send(Link.UP, frame_of(Shutdown()))


def test_what_is_sent_before_the_other_end_listens_arrives_later(socket_dir: Path) -> None:
    with ZmqTransport[Link]() as early, ZmqTransport[Link]() as late:
        early.connect(Link.DOWN, f"ipc://{socket_dir}/late")
        assert early.send(Link.DOWN, frame_of(Finish(1)))
        late.bind(Link.UP, f"ipc://{socket_dir}/late")
        assert receive(late, 1) == [frame_of(Finish(1))]


def test_a_link_comes_back_when_its_other_end_was_started_anew(socket_dir: Path) -> None:
    endpoint = f"ipc://{socket_dir}/link"
    with ZmqTransport[Link]() as upper:
        upper.connect(Link.DOWN, endpoint)
        for generation in range(3):
            with ZmqTransport[Link]() as lower:
                lower.bind(Link.UP, endpoint)
                wait_until(lambda: lower.send(Link.UP, frame_of(Finish(generation))))  # noqa: B023
                assert receive(upper, 1) == [frame_of(Finish(generation))]


def test_a_replaced_link_uses_only_its_new_endpoint(socket_dir: Path) -> None:
    with ZmqTransport[Link]() as old, ZmqTransport[Link]() as new, ZmqTransport[Link]() as upper:
        old.bind(Link.UP, f"ipc://{socket_dir}/old")
        new.bind(Link.UP, f"ipc://{socket_dir}/new")
        upper.connect(Link.DOWN, f"ipc://{socket_dir}/old")
        upper.connect(Link.DOWN, f"ipc://{socket_dir}/new")
        assert upper.send(Link.DOWN, frame_of(Finish(1)))
        assert receive(new, 1) == [frame_of(Finish(1))]
        assert old.receive(0.0) == []


def test_receive_returns_what_is_on_all_links_and_names_them(socket_dir: Path) -> None:
    with (
        ZmqTransport[int]() as launcher,
        ZmqTransport[Link]() as first,
        ZmqTransport[Link]() as two,
    ):
        for index, stage in enumerate((first, two)):
            stage.connect(Link.LAUNCHER, launcher.bind(index, f"ipc://{socket_dir}/{index}"))
            for frame in numbered(3):
                assert stage.send(Link.LAUNCHER, frame)
        received: list[tuple[int, Frame]] = []
        wait_until(lambda: received.extend(launcher.receive(0.1)) or len(received) == 6)
        for index in (0, 1):
            assert [frame for link, frame in received if link == index] == numbered(3)


def test_receive_from_one_link_leaves_the_others_alone(socket_dir: Path) -> None:
    with ZmqTransport[Link]() as stage, ZmqTransport[Link]() as upper, ZmqTransport[int]() as top:
        upper.connect(Link.DOWN, stage.bind(Link.UP, f"ipc://{socket_dir}/up"))
        stage.connect(Link.LAUNCHER, top.bind(0, f"ipc://{socket_dir}/control"))
        assert upper.send(Link.DOWN, frame_of(Finish(1)))
        wait_until(lambda: top.send(0, frame_of(Connect("x"))))
        assert stage.receive_from(Link.LAUNCHER, DEADLINE_S) == [frame_of(Connect("x"))]
        assert stage.receive_from(Link.LAUNCHER, 0.0) == []
        assert receive(stage, 1) == [frame_of(Finish(1))]


@pytest.mark.parametrize("timeout_s", [0.0, 0.0005, 0.003, 0.05])
def test_an_empty_receive_returns_after_its_timeout(endpoint: str, timeout_s: float) -> None:
    with linked(endpoint) as (lower, _, _):
        start = time.perf_counter()
        assert lower.receive(timeout_s) == []
        waited_s = time.perf_counter() - start
        assert timeout_s <= waited_s < timeout_s + 2.0


@pytest.mark.parametrize("wait_s", [0.004, 5.0])
def test_a_wait_ends_when_a_frame_comes(endpoint: str, wait_s: float) -> None:
    """Both kinds of waiting (see `ZmqTransport._wait`) are woken up, hundreds of times."""
    with linked(endpoint) as (lower, upper, _):
        for frame in numbered(200):
            assert upper.send(Link.DOWN, frame)
            assert receive(lower, 1, wait_s) == [frame]
            assert lower.send(Link.UP, frame)
            assert receive(upper, 1, wait_s) == [frame]


def test_malformed_bytes_are_counted_and_the_next_frame_still_works(
    socket_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = frame_of(Finish(1))
    garbage = [b"", b"\x00", b"\xff" * 300, encode(good)[:-1], encode(good) + b"\x00", b"\x93abc"]
    with ZmqTransport[Link]() as stage, zmq.Context() as context:
        endpoint = stage.bind(Link.UP, f"ipc://{socket_dir}/link")
        with context.socket(zmq.DEALER) as peer:
            peer.setsockopt(zmq.LINGER, 0)
            peer.connect(endpoint)
            for data in garbage:
                peer.send(data)
                peer.send(encode(good))
            peer.send_multipart([encode(good), encode(good)])
            peer.send(encode(good))
            assert receive(stage, len(garbage) + 3) == [good] * (len(garbage) + 3)
            assert stage.num_malformed == len(garbage)
            num_logged = len(caplog.records)
            assert 1 <= num_logged <= len(garbage)
            for _ in range(50):
                peer.send(b"\x00")
            wait_until(
                lambda: stage.receive(0.1) == [] and stage.num_malformed == len(garbage) + 50
            )
            assert len(caplog.records) == num_logged, "an error seen before is not logged again"


def test_bytes_that_are_not_even_zmq_disturb_nobody() -> None:
    """Without keys, libzmq takes almost any bytes for an ancient peer and gives it every other
    frame."""
    with linked("tcp://127.0.0.1:*", keys=Keys.generate()) as (lower, upper, bound):
        port = int(bound.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port), timeout=5.0) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n" * 10)
            for frame in numbered(20):
                assert upper.send(Link.DOWN, frame)
                assert lower.send(Link.UP, frame)
            assert receive(lower, 20) == numbered(20)
            assert receive(upper, 20) == numbered(20)


def test_an_oversized_frame_is_refused_at_both_ends(socket_dir: Path) -> None:
    too_much = "x" * (MAX_FRAME_BYTES + 1)
    with linked(f"ipc://{socket_dir}/link") as (lower, upper, endpoint):
        with pytest.raises(ProtocolError, match="limit"):
            upper.send(Link.DOWN, frame_of(Heartbeat("serving", {"text": too_much})))
        with zmq.Context() as context, context.socket(zmq.DEALER) as hostile:
            hostile.setsockopt(zmq.LINGER, 0)
            hostile.connect(endpoint)
            hostile.send(too_much.encode())
            assert upper.send(Link.DOWN, frame_of(Finish(1)))
            assert receive(lower, 1) == [frame_of(Finish(1))]
            assert lower.receive(0.2) == []


def test_on_tcp_only_who_has_the_keys_of_the_run_can_talk() -> None:
    with (
        linked("tcp://127.0.0.1:*", keys=Keys.generate()) as (lower, upper, endpoint),
        ZmqTransport[Link](keys=Keys.generate()) as other_run,
        ZmqTransport[Link]() as stranger,
    ):
        for intruder in (other_run, stranger):
            intruder.connect(Link.DOWN, endpoint)
            assert intruder.send(Link.DOWN, frame_of(Abort(1)))
        for frame in numbered(20):
            assert upper.send(Link.DOWN, frame)
            assert lower.send(Link.UP, frame)
        assert receive(lower, 20) == numbered(20)
        assert receive(upper, 20) == numbered(20), "no frame went to an intruder"
        assert lower.receive(0.3) == []


def test_the_secret_key_is_not_shown() -> None:
    keys = Keys.generate()
    assert keys.secret not in repr(keys)


def test_closing_twice_leaves_no_socket_file(socket_dir: Path) -> None:
    transport = ZmqTransport[Link]()
    transport.bind(Link.UP, f"ipc://{socket_dir}/link")
    assert list(socket_dir.iterdir())
    transport.close()
    transport.close()
    assert not list(socket_dir.iterdir())


def test_closing_delivers_the_last_frames_but_waits_for_nobody(socket_dir: Path) -> None:
    with ZmqTransport[Link]() as lower:
        bound = lower.bind(Link.UP, f"ipc://{socket_dir}/link")
        with ZmqTransport[Link](linger_s=DEADLINE_S) as upper:
            upper.connect(Link.DOWN, bound)
            assert upper.send(Link.DOWN, frame_of(Fault("E", "m", "t")))
        assert receive(lower, 1) == [frame_of(Fault("E", "m", "t"))]
    start = time.monotonic()
    with ZmqTransport[Link](linger_s=0.1) as upper:
        upper.connect(Link.DOWN, f"ipc://{socket_dir}/nobody")
        assert upper.send(Link.DOWN, frame_of(Finish(1)))
    assert time.monotonic() - start < DEADLINE_S / 2


def test_a_link_that_is_dropped_waits_for_nobody_and_leaves_the_others(socket_dir: Path) -> None:
    start = time.monotonic()
    with ZmqTransport[Link]() as lower, ZmqTransport[Link](linger_s=DEADLINE_S) as upper:
        upper.connect(Link.DOWN, f"ipc://{socket_dir}/nobody")
        upper.connect(Link.LAUNCHER, lower.bind(Link.UP, f"ipc://{socket_dir}/link"))
        for link in (Link.DOWN, Link.LAUNCHER):
            assert upper.send(link, frame_of(Finish(1)))
        upper.drop(Link.DOWN)
        upper.drop(Link.DOWN)
        assert receive(lower, 1) == [frame_of(Finish(1))]
    assert time.monotonic() - start < DEADLINE_S / 2


# -- in memory ----------------------------------------------------------------------------------


def test_memory_links_join_neighbours_and_launcher() -> None:
    stages, launcher = connect_in_memory(3)
    draft, middle, target = stages
    assert draft.send(Link.DOWN, frame_of(Finish(1)))
    assert target.send(Link.UP, frame_of(Finish(2)))
    launcher.send(1, frame_of(Finish(3)))
    assert dict(middle.receive(0.0)) == {
        Link.UP: frame_of(Finish(1)),
        Link.DOWN: frame_of(Finish(2)),
        Link.LAUNCHER: frame_of(Finish(3)),
    }
    assert middle.receive(0.0) == []
    assert target.send(Link.LAUNCHER, frame_of(Output(1, 0, (1,), "")))
    assert launcher.receive(0.0) == [(2, frame_of(Output(1, 0, (1,), "")))]


def test_memory_links_end_at_the_ends_of_the_hierarchy() -> None:
    stages, _ = connect_in_memory(2)
    with pytest.raises(KeyError):
        stages[0].send(Link.UP, frame_of(Finish(1)))
    with pytest.raises(KeyError):
        stages[1].send(Link.DOWN, frame_of(Finish(1)))


def test_memory_links_keep_order_refuse_when_full_and_never_wait() -> None:
    stages, _ = connect_in_memory(2, high_water=3)
    sent = [stages[0].send(Link.DOWN, frame) for frame in numbered(5)]
    assert sent == [True, True, True, False, False]
    start = time.monotonic()
    assert [frame for _, frame in stages[1].receive(60.0)] == numbered(3)
    assert stages[1].receive(60.0) == []
    assert time.monotonic() - start < 30.0
    stages[1].close()
    stages[1].close()


def test_both_transports_fit_the_protocol_that_stages_use(socket_dir: Path) -> None:
    in_memory: Transport = MemoryTransport[Link]()
    with ZmqTransport[Link]() as over_zmq:
        both: list[Transport] = [in_memory, over_zmq]
        assert all(transport.num_malformed == 0 for transport in both)


# -- who computes meanwhile ---------------------------------------------------------------------


def can_be_read(transport: Transport, wait_s: float = 0.0) -> bool:
    return bool(select.select(transport.descriptors, (), (), wait_s)[0])


def test_a_descriptor_can_be_read_once_a_frame_is_there(endpoint: str) -> None:
    with linked(endpoint) as (lower, upper, _):
        assert lower.receive(0.0) == []
        assert not lower.has_frames()
        upper.send(Link.DOWN, frame_of(Finish(1)))
        assert can_be_read(lower, DEADLINE_S)
        wait_until(lower.has_frames)
        assert lower.has_frames(), "who looks takes nothing"
        assert [frame.message for _, frame in lower.receive(0.0)] == [Finish(1)]
        assert not lower.has_frames()


def test_a_look_at_a_link_silences_its_descriptor_until_something_comes(endpoint: str) -> None:
    """It tells of changes, and of more than frames; who computes must not stop for ever."""
    with linked(endpoint) as (lower, upper, _):
        for number in range(20):
            upper.send(Link.DOWN, frame_of(Finish(number)))
            assert can_be_read(lower, DEADLINE_S)
            assert receive(lower, 1) == [frame_of(Finish(number))]
            wait_until(lambda: not lower.has_frames() and not can_be_read(lower))


def test_a_transport_has_one_descriptor_for_each_open_link(socket_dir: Path) -> None:
    with ZmqTransport[Link]() as transport:
        assert list(transport.descriptors) == []
        transport.bind(Link.UP, f"ipc://{socket_dir}/up")
        transport.connect(Link.DOWN, f"ipc://{socket_dir}/down")
        transport.connect(Link.DOWN, f"ipc://{socket_dir}/elsewhere")
        assert len(set(transport.descriptors)) == 2


def test_memory_links_have_frames_and_no_descriptor() -> None:
    (first, second), _ = connect_in_memory(2)
    assert not second.has_frames()
    first.send(Link.DOWN, frame_of(Finish(1)))
    assert second.has_frames()
    assert not first.has_frames()
    assert list(second.descriptors) == []
    second.receive()
    assert not second.has_frames()
