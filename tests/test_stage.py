"""The loop of one stage, alone in a scripted world: what it waits for, sends, keeps and lets go.

Its clock moves only while it waits or computes; what reaches it, and when, is in the script.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from pipespec.config import SamplingParams, Schedule
from pipespec.hashing import hash_tokens
from pipespec.messages import (
    LAUNCHER,
    Abort,
    Draft,
    Finish,
    Frame,
    Heartbeat,
    Link,
    Message,
    Output,
    Shutdown,
    Stats,
    Submit,
    Verdict,
)
from pipespec.runners.base import Row, RunnerInfo
from pipespec.runners.emulated import EmulatedRunner
from pipespec.stage import StageLoop
from pipespec.transport import MemoryTransport, connect_in_memory

PROMPT = (1, 2, 3, 4)
END_OF_TIME_S = 1000.0


class World:
    """A stage's clock, its transport, and its neighbours' ends of the links."""

    def __init__(self, index: int, num_stages: int, high_water: int = 1024) -> None:
        self.now_s = 0.0
        self.num_malformed = 0
        self.waits_s: list[float] = []
        self.sent: list[tuple[float, Link, Message]] = []
        self._index = index
        self._links: MemoryTransport[Link]
        stages, self._launcher = connect_in_memory(num_stages, high_water)
        self._links, self._upper = stages[index], stages[index - 1] if index > 0 else None
        self._lower = stages[index + 1] if index + 1 < num_stages else None
        self._script: list[tuple[float, int, Callable[[], object]]] = []
        self._count = itertools.count(1)

    # what the test does

    def at(self, time_s: float, action: Callable[[], object]) -> None:
        heapq.heappush(self._script, (time_s, next(self._count), action))

    def tell(self, time_s: float, link: Link, message: Message, receiver: int = 1) -> None:
        """At `time_s`, a neighbour sends a message over the link."""
        sender = {Link.LAUNCHER: LAUNCHER, Link.UP: self._index - 1, Link.DOWN: self._index + 1}
        frame = Frame(sender[link], 1, receiver, next(self._count), message)
        if link is Link.LAUNCHER:
            self.at(time_s, lambda: self._launcher.send(self._index, frame))
        elif link is Link.UP:
            assert self._upper is not None
            upper = self._upper
            self.at(time_s, lambda: upper.send(Link.DOWN, frame))
        else:
            assert self._lower is not None
            lower = self._lower
            self.at(time_s, lambda: lower.send(Link.UP, frame))

    def read(self, link: Link) -> list[Message]:
        """What lies at the other end of a link; it has room again."""
        if link is Link.LAUNCHER:
            return [frame.message for _, frame in self._launcher.receive()]
        end = self._upper if link is Link.UP else self._lower
        assert end is not None
        return [frame.message for _, frame in end.receive()]

    # what the stage does: the `Transport` protocol, and the time that a forward takes

    def send(self, link: Link, frame: Frame) -> bool:
        taken = self._links.send(link, frame)
        if taken:
            self.sent.append((self.now_s, link, frame.message))
        return taken

    def receive(self, timeout_s: float) -> list[tuple[Link, Frame]]:
        self._play()
        arrived = self._links.receive()
        if arrived or timeout_s == 0.0:
            return arrived
        start_s, until_s = self.now_s, self.now_s + timeout_s
        while not arrived and self.now_s < until_s:
            next_s = self._script[0][0] if self._script else END_OF_TIME_S
            self.now_s = min(until_s, next_s)
            assert self.now_s < END_OF_TIME_S, "nothing ended the stage"
            self._play()
            arrived = self._links.receive()
        self.waits_s.append(self.now_s - start_s)
        return arrived

    @property
    def descriptors(self) -> Sequence[int]:
        return ()

    def has_frames(self) -> bool:
        self._play()
        return self._links.has_frames()

    def close(self) -> None:
        self._links.close()

    def pass_time(self, seconds: float) -> None:
        self.now_s += seconds

    def _play(self) -> None:
        while self._script and self._script[0][0] <= self.now_s:
            heapq.heappop(self._script)[2]()


class TimedRunner:
    """An emulated model on the world's clock that remembers what it was asked."""

    def __init__(self, world: World, step_s: float, agreement: float | None) -> None:
        values = {"step_ms": {"1": 0}, "agreement": agreement, "eos_token_id": 99}
        self._model = EmulatedRunner(values, name="model", vocab_size=100)
        self._world = world
        self._step_s = step_s
        self.steps: list[tuple[float, Row]] = []
        self.released: list[int] = []

    @property
    def info(self) -> RunnerInfo:
        return replace(self._model.info, num_tail_rows=0, frees_processor=False)

    def forward(self, rows: Sequence[Row]) -> list[list[int]]:
        self.steps += [(self._world.now_s, row) for row in rows]
        self._world.pass_time(self._step_s)
        return self._model.forward(rows)

    def release(self, slot: int) -> None:
        self.released.append(slot)
        self._model.release(slot)

    def close(self) -> None:
        self._model.close()


def make_stage(
    world: World,
    *,
    index: int = 1,
    num_stages: int = 2,
    step_s: float = 0.1,
    agreement: float | None = None,
    schedule: Schedule | None = None,
    num_slots: int = 1,
) -> tuple[StageLoop, TimedRunner]:
    runner = TimedRunner(world, step_s, agreement)
    loop = StageLoop(
        index=index,
        num_stages=num_stages,
        incarnations=[1] * num_stages,
        schedule=schedule or Schedule("pipespec", lookahead=4),
        runner=runner,
        transport=world,
        num_slots=num_slots,
        clock=lambda: world.now_s,
    )
    return loop, runner


def submit(request: int = 1, max_new_tokens: int = 64) -> Submit:
    return Submit(request, PROMPT, (), SamplingParams(), max_new_tokens, (99,), ())


def text_of_the_target(count: int) -> tuple[int, ...]:
    """What the emulated target writes after the prompt, computed token by token."""
    _, runner = make_stage(World(1, 2), step_s=0.0)
    ids = list(PROMPT)
    for _ in range(count):
        ids += runner.forward([Row(0, 0, tuple(ids), 1, SamplingParams())])[0]
    return tuple(ids[len(PROMPT) :])


def draft_of(prefix: Sequence[int], tokens: Sequence[int], request: int = 1) -> Draft:
    return Draft(request, hash_tokens(tuple(prefix)), len(prefix), tuple(tokens), False)


def output_of(messages: Sequence[Message]) -> tuple[int, ...]:
    tokens: list[int] = []
    for message in messages:
        if isinstance(message, Output):
            assert message.start == len(PROMPT) + len(tokens), "output has a gap"
            tokens += message.tokens
    return tuple(tokens)


def messages_on(world: World, link: Link, kind: type[Message]) -> list[Message]:
    return [m for _, where, m in world.sent if where is link and isinstance(m, kind)]


# -- waiting ------------------------------------------------------------------------------------


def test_a_target_without_drafts_steps_when_its_patience_ends_and_not_later() -> None:
    world = World(1, 2)
    loop, runner = make_stage(world)
    world.tell(0.25, Link.LAUNCHER, submit(max_new_tokens=4))
    world.tell(20.0, Link.LAUNCHER, Shutdown())
    loop.run()
    starts_s = [start_s for start_s, _ in runner.steps]
    # The prompt at once; then it waits a second for candidates, but not for one that is of no use.
    assert starts_s == pytest.approx([0.25, 1.35, 2.45, 2.55])


def test_drafts_end_the_wait_as_soon_as_there_are_enough() -> None:
    text = text_of_the_target(8)
    world = World(1, 2)
    loop, runner = make_stage(world)
    world.tell(0.0, Link.LAUNCHER, submit())
    world.tell(0.5, Link.UP, draft_of((*PROMPT, text[0]), text[1:4]))
    world.tell(0.75, Link.UP, draft_of((*PROMPT, *text[:4]), text[4:5]))
    world.tell(0.8, Link.LAUNCHER, Shutdown())
    loop.run()
    assert [(start_s, len(row.ids)) for start_s, row in runner.steps] == [(0.0, 4), (0.75, 5)]
    assert output_of(world.read(Link.LAUNCHER)) == text[:6]


def test_an_idle_stage_wakes_up_once_a_second_to_say_that_it_lives() -> None:
    world = World(1, 2)
    loop, runner = make_stage(world)
    world.tell(60.5, Link.LAUNCHER, Shutdown())
    loop.run()
    assert len(world.waits_s) <= 61 + 1
    assert max(world.waits_s) <= 1.0
    assert len(messages_on(world, Link.LAUNCHER, Heartbeat)) == 61
    assert runner.steps == []


def test_a_stage_that_computes_does_not_say_that_it_is_idle() -> None:
    world = World(0, 2)
    loop, _ = make_stage(world, index=0, step_s=3.0)
    world.tell(0.5, Link.DOWN, submit())
    world.tell(30.0, Link.LAUNCHER, Shutdown())
    loop.run()
    reports = [at_s for at_s, _, message in world.sent if isinstance(message, Heartbeat)]
    assert [at_s for at_s in reports if 0.5 < at_s < 30.0] == []


class WaitingTimedRunner(TimedRunner):
    """One that leaves the processor free while it computes."""

    @property
    def info(self) -> RunnerInfo:
        return replace(super().info, frees_processor=True)

    def while_computing(self, do: Callable[[float], None]) -> None:
        self._do = do

    def forward(self, rows: Sequence[Row]) -> list[list[int]]:
        self.steps += [(self._world.now_s, row) for row in rows]
        self._do(self._step_s)
        return self._model.forward(rows)


@pytest.mark.parametrize(("kind", "at_s"), [(TimedRunner, 1.0), (WaitingTimedRunner, 0.4)])
def test_what_arrives_while_a_device_computes_is_read_at_once(
    kind: type[TimedRunner], at_s: float
) -> None:
    """A verdict reaches a stage between two others in the middle of its first forward."""
    world = World(1, 3)
    runner = kind(world, 1.0, None)
    loop = StageLoop(
        index=1, num_stages=3, incarnations=[1] * 3, schedule=Schedule("pipespec", lookahead=4),
        runner=runner, transport=world, clock=lambda: world.now_s,
    )  # fmt: skip
    world.tell(0.0, Link.DOWN, submit())
    world.tell(0.4, Link.DOWN, Verdict(1, 1, len(PROMPT), (7, 8), False))
    world.tell(1.5, Link.LAUNCHER, Shutdown())
    loop.run()
    passed_on = [
        (sent_s, message.tokens)
        for sent_s, link, message in world.sent
        if link is Link.UP and isinstance(message, Verdict) and message.tokens
    ]
    assert passed_on[0] == (pytest.approx(at_s), (7, 8))


# -- sending ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("step_s", "most_frames"), [(100e-6, 7), (5e-3, 17)])
def test_a_fast_draft_sends_its_tokens_in_batches(step_s: float, most_frames: int) -> None:
    world = World(0, 2)
    loop, _ = make_stage(world, index=0, step_s=step_s, schedule=Schedule())
    world.tell(0.0, Link.DOWN, submit())
    world.tell(5.0, Link.LAUNCHER, Shutdown())
    loop.run()
    drafts = messages_on(world, Link.DOWN, Draft)
    tokens = [token for draft in drafts if isinstance(draft, Draft) for token in draft.tokens]
    assert tuple(tokens) == text_of_the_target(17), "as far ahead as may be of use, and no further"
    assert len(drafts) == most_frames if most_frames == 17 else len(drafts) <= most_frames


def test_a_verdict_that_overtakes_a_forward_keeps_its_dead_drafts_from_being_sent() -> None:
    text = text_of_the_target(2)
    wrong = (text[0] + 1) % 99
    world = World(0, 2)
    loop, runner = make_stage(world, index=0, step_s=0.1)
    world.tell(0.0, Link.DOWN, submit())
    # During the second forward, on the prompt and text[0]:
    world.tell(0.15, Link.DOWN, Verdict(1, 1, len(PROMPT), (wrong,), False))
    world.tell(0.25, Link.LAUNCHER, Shutdown())
    loop.run()
    assert [start_s for start_s, _ in runner.steps] == pytest.approx([0.0, 0.1, 0.2])
    drafts = messages_on(world, Link.DOWN, Draft)
    assert [d.parent for d in drafts if isinstance(d, Draft)] == [
        hash_tokens(PROMPT),
        hash_tokens((*PROMPT, wrong)),
    ]


def test_a_verdict_ends_a_burst() -> None:
    text = text_of_the_target(3)
    wrong = (text[2] + 1) % 99
    world = World(0, 2)
    loop, runner = make_stage(world, index=0, step_s=1e-4, schedule=Schedule())
    world.tell(0.0, Link.DOWN, submit())
    world.tell(3.5e-4, Link.DOWN, Verdict(1, 1, len(PROMPT), (*text[:2], wrong), False))
    world.tell(4.5e-4, Link.LAUNCHER, Shutdown())
    loop.run()
    starts = [(round(start_s * 1e4), row.start) for start_s, row in runner.steps]
    # The prompt, one token to learn the time of a step, two of a burst of four; what follows
    # was fed after the verdict.
    assert starts[:4] == [(0, 0), (1, 4), (2, 5), (3, 6)]
    assert starts[4][0] == 4 and starts[4][1] <= 6


def test_a_launcher_that_reads_nothing_for_long_loses_no_output() -> None:
    world = World(1, 2, high_water=4)
    loop, _ = make_stage(world, step_s=0.01, schedule=Schedule("pipespec", lookahead=0))
    received: list[Message] = []
    world.tell(0.0, Link.LAUNCHER, submit(max_new_tokens=50))
    for tick in range(60):
        world.at(30.0 + tick / 10, lambda: received.extend(world.read(Link.LAUNCHER)))
    world.tell(40.0, Link.LAUNCHER, Shutdown())
    loop.run()
    received += world.read(Link.LAUNCHER)
    assert output_of(received) == text_of_the_target(50)
    assert sum(isinstance(message, Heartbeat) for message in received) <= 16


def test_a_full_link_to_the_next_stage_loses_drafts_and_stops_nobody() -> None:
    world = World(0, 2, high_water=4)
    loop, runner = make_stage(world, index=0, step_s=0.01)
    world.tell(0.0, Link.DOWN, submit())
    for tick in range(8):
        world.at(0.5 + tick / 2, lambda: world.read(Link.LAUNCHER))
    world.tell(5.0, Link.LAUNCHER, Shutdown())
    loop.run()
    assert len(runner.steps) == 64, "it drafts as far as it may run ahead"
    assert len(messages_on(world, Link.DOWN, Draft)) == 4


def test_verdicts_that_a_full_link_lost_are_made_up_for_by_a_full_one() -> None:
    text = text_of_the_target(30)
    world = World(1, 2, high_water=4)
    loop, _ = make_stage(world, step_s=0.01, schedule=Schedule("pipespec", lookahead=0))
    world.tell(0.0, Link.LAUNCHER, submit(max_new_tokens=30))
    for tick in range(1, 40):
        world.at(tick / 100, lambda: world.read(Link.LAUNCHER))
    late: list[Message] = []
    world.at(3.5, lambda: late.extend(world.read(Link.UP)))  # the stage above was away until here
    world.tell(6.5, Link.LAUNCHER, Shutdown())
    loop.run()
    lost = [message for message in late if isinstance(message, Verdict)]
    assert sum(len(verdict.tokens) for verdict in lost) < 30
    made_up = [message for message in world.read(Link.UP) if isinstance(message, Verdict)]
    assert made_up[0].full and made_up[0].tokens == text


def test_the_end_of_a_request_is_not_lost_to_a_full_link() -> None:
    world = World(1, 2, high_water=4)
    loop, _ = make_stage(world, step_s=0.01, schedule=Schedule("pipespec", lookahead=0))
    world.tell(0.0, Link.LAUNCHER, submit(max_new_tokens=30))
    world.tell(2.0, Link.LAUNCHER, Finish(1))
    for tick in range(1, 60):
        world.at(tick / 10, lambda: world.read(Link.LAUNCHER))
    world.at(4.5, lambda: world.read(Link.UP))
    world.tell(7.0, Link.LAUNCHER, Shutdown())
    loop.run()
    assert Finish(1) in world.read(Link.UP)


def test_where_only_stale_drafts_come_everything_is_said_again() -> None:
    """The stage above may have lost what would tell it that they are stale."""
    world = World(1, 2)
    loop, _ = make_stage(world, step_s=0.01)
    world.tell(0.0, Link.LAUNCHER, submit(max_new_tokens=200))
    for tick in range(1, 80):
        world.tell(tick / 4, Link.UP, draft_of((9, 9, 9, 9, 9), (7,)))
    world.tell(20.0, Link.LAUNCHER, Shutdown())
    loop.run()
    full = [m for m in messages_on(world, Link.UP, Verdict) if isinstance(m, Verdict) and m.full]
    assert len(full) >= 3


# -- ending -------------------------------------------------------------------------------------


def test_only_the_launcher_of_this_process_can_shut_it_down() -> None:
    world = World(1, 3)
    loop, _ = make_stage(world, index=1, num_stages=3)
    world.tell(1.0, Link.UP, Shutdown())
    world.tell(2.0, Link.DOWN, Shutdown())
    world.tell(3.0, Link.LAUNCHER, Shutdown(), receiver=0)
    world.tell(7.5, Link.LAUNCHER, Shutdown())
    loop.run()
    assert world.now_s == 7.5


def test_an_error_of_the_runner_ends_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_rows: Sequence[Row]) -> list[list[int]]:
        raise RuntimeError("device-side assert")

    world = World(1, 2)
    loop, runner = make_stage(world)
    monkeypatch.setattr(runner, "forward", fail)
    world.tell(0.0, Link.LAUNCHER, submit())
    with pytest.raises(RuntimeError, match="device-side assert"):
        loop.run()


@pytest.mark.parametrize("end", [Finish(1), Abort(1)])
def test_a_request_that_ends_during_a_forward_gives_its_slot_to_the_next(end: Message) -> None:
    world = World(1, 2)
    loop, runner = make_stage(world, schedule=Schedule("pipespec", lookahead=0))
    world.tell(0.0, Link.LAUNCHER, submit(1))
    world.tell(0.35, Link.LAUNCHER, end)
    world.tell(0.36, Link.LAUNCHER, submit(2))
    world.tell(0.55, Link.LAUNCHER, Shutdown())
    loop.run()
    assert runner.released == [0]
    assert [(row.slot, row.start) for _, row in runner.steps] == [
        *[(0, 0), (0, 4), (0, 5), (0, 6)],  # the first request; nobody waits for the last draw
        *[(0, 0), (0, 4)],
    ]
    messages = world.read(Link.LAUNCHER)
    outputs = [m for m in messages if isinstance(m, Output)]
    assert [output.request for output in outputs] == [1, 1, 1, 1, 2, 2]
    assert [m.request for m in messages if isinstance(m, Stats)] == [1]


def test_requests_share_the_slots_and_the_oldest_go_first() -> None:
    world = World(1, 2)
    loop, runner = make_stage(world, schedule=Schedule("pipespec", lookahead=0), num_slots=2)
    for request in (1, 2, 3):
        world.tell(0.0, Link.LAUNCHER, submit(request))
    world.tell(1.0, Link.LAUNCHER, Finish(1))
    world.tell(2.0, Link.LAUNCHER, Shutdown())
    loop.run()
    assert {row.slot for _, row in runner.steps} == {0, 1}
    assert runner.released == [0]
    served_before = {m.request for at, _, m in world.sent if at <= 1.05 and isinstance(m, Output)}
    served_after = {m.request for at, _, m in world.sent if at > 1.15 and isinstance(m, Output)}
    assert (served_before, served_after) == ({1, 2}, {2, 3})
