"""How long a message takes between two processes, over the sockets that stages use.

A round trip of a small Draft, in three circumstances: both peers asleep until a message comes;
both computing in short slices and looking for messages between them, as stages do; and the same on
one core. As a program (`python -m pipespec.checkup.links`) it is one of the two peers.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, Final

from pipespec.checkup.children import answer, ask
from pipespec.checkup.findings import Finding, Section, ok, problem, warning
from pipespec.errors import PipeSpecError
from pipespec.interrupts import hold_interrupts
from pipespec.messages import Draft, Frame, Link
from pipespec.placement import StagePlacement
from pipespec.transport import Keys, ZmqTransport
from pipespec.worker import pin
from pipespec.worker_spec import endpoint_in, make_run_dir

NUM_TRIPS: Final = 400  # as far as time allows
SLICE_S: Final = 100e-6  # of computing between two looks: a small draft's step
SLOW_US: Final = 500.0
_MIN_TRIPS: Final = 20
_MEASURE_S: Final = 3.0
_PEER_GONE_S: Final = 5.0
_TIMEOUT_S: Final = 60.0
_IDLE, _BUSY, _STOP = 1, 2, 3  # what a message tells the other peer to do until the next


def check_links(cores: Sequence[int], environ: Mapping[str, str]) -> Section:
    """Measures ipc and tcp on the first two cores (on one, if there is no second)."""
    findings: list[Finding] = []
    values: dict[str, Any] = {}
    pair = [cores[0], cores[1 % len(cores)]]
    for transport in ("ipc", "tcp"):
        reply = ask(
            "pipespec.checkup.links",
            {"transport": transport, "peer_core": pair[1], "num_trips": NUM_TRIPS},
            placement=StagePlacement("cpu", cores=(pair[0],)),
            inherited=environ,
            timeout_s=_TIMEOUT_S,
        )
        measured = {line["peers"]: line for line in reply.lines if "peers" in line}
        values[transport] = measured
        findings.append(link_finding(transport, measured, reply.error))
    return Section("Messages between processes", findings, values)


def link_finding(transport: str, measured: Mapping[str, Any], error: str) -> Finding:
    """measured: by what the peers do, `median_us` and `p99_us` of a round trip."""
    if error or not {"idle", "busy"} <= set(measured):
        return problem(
            f"{transport}: no round trip ({error or 'no answer'})",
            "see whether a firewall or the folder for temporary files is in the way"
            + ("" if transport == "ipc" else "; --transport ipc needs no network"),
        )
    idle, busy = measured["idle"], measured["busy"]
    text = (
        f"{transport} round trip: {idle['median_us']:.0f} us, 99 % within {idle['p99_us']:.0f}; "
        f"while both compute, {SLICE_S * 1e6:.0f} us at a time: {busy['median_us']:.0f}, "
        f"99 % within {busy['p99_us']:.0f}"
    )
    if idle["median_us"] <= SLOW_US:
        return ok(text)
    return warning(f"{text}: slow", "stop what else runs, or give each stage a core of its own")


def main() -> int:
    """One peer. Standard input says which, and what to do."""
    question = json.load(sys.stdin)
    if "endpoint" in question:
        _reply_to_peer(question)
    else:
        _measure(question)
    return 0


def _measure(question: Mapping[str, Any]) -> None:
    """Starts the other peer and times round trips to it."""
    kind, count = question["transport"], question["num_trips"]
    run_dir = make_run_dir()
    keys = Keys.generate() if kind == "tcp" else None
    try:
        with ZmqTransport[Link](keys=keys) as transport:
            endpoint = transport.bind(Link.DOWN, endpoint_in(run_dir, kind, "peer"))
            other = {
                "endpoint": endpoint,
                "keys": None if keys is None else [keys.public, keys.secret],
                "core": question["peer_core"],
            }
            with hold_interrupts():
                peer = subprocess.Popen(
                    [sys.executable, "-m", "pipespec.checkup.links"],
                    stdin=subprocess.PIPE,
                    text=True,
                )
            try:
                assert peer.stdin is not None
                peer.stdin.write(json.dumps(other))
                peer.stdin.close()
                pin(question["cores"])
                _await_peer(transport)
                for peers, mode in (("idle", _IDLE), ("busy", _BUSY)):
                    answer({"peers": peers, **_round_trips(transport, count, mode)})
                transport.send(Link.DOWN, _frame(_STOP))
                peer.wait(_PEER_GONE_S)
            finally:
                peer.kill()
                peer.wait()
    finally:
        run_dir.rmdir()


def _await_peer(transport: ZmqTransport[Link]) -> None:
    """Makes a first round trip, as soon as there is someone to send to."""
    deadline_s = time.monotonic() + _TIMEOUT_S / 2
    while not transport.send(Link.DOWN, _frame(_IDLE)):
        if time.monotonic() > deadline_s:
            raise PipeSpecError("the peer did not connect")
        time.sleep(0.01)
    _await_reply(transport, _IDLE)


def _round_trips(
    transport: ZmqTransport[Link], num_trips: int, mode: int
) -> dict[str, float | int]:
    times_us: list[float] = []
    deadline_s = time.perf_counter() + _MEASURE_S
    while len(times_us) < num_trips:
        start_s = time.perf_counter()
        if start_s > deadline_s and len(times_us) >= _MIN_TRIPS:
            break
        transport.send(Link.DOWN, _frame(mode))
        _await_reply(transport, mode)
        times_us.append(1e6 * (time.perf_counter() - start_s))
    times_us.sort()
    return {
        "median_us": median(times_us),
        "p99_us": times_us[int(0.99 * (len(times_us) - 1))],
        "num_trips": len(times_us),
    }


def _await_reply(transport: ZmqTransport[Link], mode: int) -> None:
    if _arrival(transport, mode) is None:
        raise PipeSpecError(f"the peer did not answer within {_PEER_GONE_S:g} s")


def _reply_to_peer(question: Mapping[str, Any]) -> None:
    keys = None if question["keys"] is None else Keys(*question["keys"])
    with ZmqTransport[Link](keys=keys) as transport:
        transport.connect(Link.UP, question["endpoint"])
        pin([question["core"]])
        mode = _arrival(transport, _IDLE)
        while mode in (_IDLE, _BUSY):
            transport.send(Link.UP, _frame(mode))
            mode = _arrival(transport, mode)


def _arrival(transport: ZmqTransport[Link], mode: int) -> int | None:
    """Waits for a message: asleep, or computing in slices. Returns what it tells to do; None if the
    peer must be gone."""
    deadline_s = time.perf_counter() + _PEER_GONE_S
    while time.perf_counter() < deadline_s:
        for _, frame in transport.receive(0.0 if mode == _BUSY else _PEER_GONE_S):
            assert isinstance(frame.message, Draft)
            return frame.message.request
        until_s = time.perf_counter() + (SLICE_S if mode == _BUSY else 0.0)
        while time.perf_counter() < until_s:
            pass
    return None


def _frame(mode: int) -> Frame:
    """What a draft sends after four tokens."""
    return Frame(0, 1, 1, 0, Draft(mode, 1 << 63, 0, (101, 2002, 30, 4), False))


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)
