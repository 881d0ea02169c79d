"""The launcher's end of the control links: what the stages report, and what they are told.

It greets each stage, tells it where the next one listens, keeps what it reported with its process,
and notes the first failure of any. It starts and ends no process, and what tokens mean is not known
here.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Sequence
from typing import Final

from pipespec import errors
from pipespec.errors import PipeSpecError, StageError, UsageError
from pipespec.messages import LAUNCHER, Connect, Fault, Frame, Heartbeat, Hello, Message, Ready
from pipespec.stage_process import StageProcess
from pipespec.transport import ZmqTransport

TAIL_LINES: Final = 20  # of a failed stage's log
_LIVENESS_S: Final = 0.1  # how often the processes are looked at while waiting for messages
_FAULT_S: Final = 0.3  # how long an ended process's last words may take to arrive


class ControlLinks:
    """One link to each stage, and the watch over its process. One thread uses it.

    config_digest, tokenizer_digest: what every stage must have understood; an empty
    tokenizer_digest is not compared. The transport's links are the stage indexes; its owner closes
    it.
    """

    def __init__(
        self,
        stages: Sequence[StageProcess],
        transport: ZmqTransport[int],
        *,
        config_digest: str,
        tokenizer_digest: str,
    ) -> None:
        self.failure: PipeSpecError | None = None
        self.num_stale_frames = 0
        self._stages = tuple(stages)
        self._transport = transport
        self._config_digest = config_digest
        self._tokenizer_digest = tokenizer_digest
        self._sequence = itertools.count()
        self._waiting: deque[tuple[int, Message]] = deque()

    def post(self, index: int, message: Message) -> None:
        """Sends now, or as soon as the link takes frames again; keeps the order."""
        self._waiting.append((index, message))
        self._flush()

    def send(self, index: int, message: Message) -> bool:
        """Sends now, before what `post` keeps waiting, or returns False."""
        incarnation = self._stages[index].spec.incarnation
        frame = Frame(LAUNCHER, 1, incarnation, next(self._sequence), message)
        return self._transport.send(index, frame)

    def poll(self, timeout_s: float) -> list[tuple[int, Message]]:
        """Waits for messages or a failure, whichever comes first, at most `timeout_s`.

        Returns:
            What is not for the launcher itself, with the stage's index. A failure is in `failure`;
            what its stage sent before is returned.
        """
        self._flush()
        deadline = time.monotonic() + timeout_s
        while True:
            left_s = deadline - time.monotonic()
            messages = self._take(min(max(left_s, 0.0), _LIVENESS_S))
            ended = next((stage for stage in self._stages if stage.has_ended), None)
            if ended is not None and self.failure is None:
                messages += self._last_words(ended)
            if messages or self.failure is not None or left_s <= _LIVENESS_S:
                return messages

    def _flush(self) -> None:
        while self._waiting and self.send(*self._waiting[0]):
            self._waiting.popleft()

    def _take(self, timeout_s: float) -> list[tuple[int, Message]]:
        """Takes all frames there are; acts on those for the launcher, returns the others."""
        messages: list[tuple[int, Message]] = []
        for index, frame in self._transport.receive(timeout_s):
            stage = self._stages[index]
            if frame.sender != index or frame.incarnation != stage.spec.incarnation:
                self.num_stale_frames += 1
                continue
            match frame.message:
                case Hello() as hello:
                    self._greet(stage, hello)
                case Heartbeat() as heartbeat:
                    stage.on_heartbeat(heartbeat)
                case Ready(load_s, info):
                    stage.phase, stage.load_s, stage.info = "ready", load_s, info
                case Fault() as fault:
                    stage.fault = fault
                    self._fail(stage, stage.describe_end())
                case message:
                    messages.append((index, message))
        return messages

    def _greet(self, stage: StageProcess, hello: Hello) -> None:
        if hello.config_digest != self._config_digest:
            self._fail(stage, "understands another configuration; is its PipeSpec another version?")
        elif self._tokenizer_digest not in ("", hello.tokenizer_digest):
            self._fail(stage, "has another tokenizer than the target; see its folder's files")
        stage.endpoint = hello.endpoint
        for upper, lower in itertools.pairwise(self._stages):
            if stage in (upper, lower) and None not in (upper.endpoint, lower.endpoint):
                assert lower.endpoint is not None
                self.send(upper.index, Connect(lower.endpoint))
        if stage is self._stages[-1]:
            self.send(stage.index, Connect(""))  # nothing below, but it shall not wait

    def _last_words(self, ended: StageProcess) -> list[tuple[int, Message]]:
        """What an ended process still had to say; notes why it ended."""
        messages: list[tuple[int, Message]] = []
        deadline = time.monotonic() + _FAULT_S
        while ended.fault is None and time.monotonic() < deadline:
            messages += self._take(_FAULT_S / 10)
        self._fail(ended, ended.describe_end())
        return messages

    def _fail(self, stage: StageProcess, clause: str) -> None:
        """Notes the first failure; later ones are its consequences."""
        if self.failure is not None:
            return
        kind = getattr(errors, stage.fault.kind, None) if stage.fault is not None else None
        if isinstance(kind, type) and issubclass(kind, UsageError):
            assert stage.fault is not None
            self.failure = kind(stage.fault.message)
        else:
            trace = [] if stage.fault is None else stage.fault.traceback.splitlines()
            tail = stage.log_tail(max(TAIL_LINES, len(trace)))
            self.failure = StageError(f"{stage} {clause}", tail)
