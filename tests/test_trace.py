"""Traces: what they say is what the result files say, they are whole however a run ends, and the
check finds what is wrong with one."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from emulated import write_emulated, write_prompts

from pipespec import benchmark, run_example
from pipespec.commands.tracing import TraceRecorder
from pipespec.config import SamplingParams, Schedule
from pipespec.results import load_results, partial_path
from pipespec.results.reading import read_partial
from pipespec.runners.base import Row
from pipespec.runners.emulated import EmulatedRunner
from pipespec.runners.ranges import RangedRunner, with_ranges
from pipespec.stage import StageLoop
from pipespec.state import StageState
from pipespec.trace import StrategyTrace, TracedState, TracedTransport, Tracer
from pipespec.trace.__main__ import main as check_command
from pipespec.trace.check import check_trace, find_problems, read_trace
from pipespec.trace.events import read_events
from pipespec.trace.summary import StrategySummary, summarise
from pipespec.transport import connect_in_memory

DEADLINE_S = 30.0
NAMES = {
    "greedy": ["target"],
    "chain": ["draft", "middle", "target"],
    "async-chain": ["draft", "middle", "target"],
}
Item = dict[str, Any]


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of all strategies: `trace.json` beside the result files. With a
    lookahead, the target uses its drafts however busy the machine is."""
    folder = tmp_path_factory.mktemp("traced")
    flags = flags_of(folder, 3, ["one two three", "four five"], target_ms=2.0)
    flags += ["--strategy", "all", "--max-new-tokens", "40", "--lookahead", "2"]
    assert benchmark.main(flags) == 0
    return folder


def flags_of(folder: Path, num_models: int, texts: list[str], **emulated: Any) -> list[str]:
    config = write_emulated(folder, num_models, **emulated)
    flags = ["--models-config-path", config, "--dataset", write_prompts(folder, texts)]
    return [*flags, "--output-dir", str(folder / "out"), "--trace", str(folder / "trace.json")]


def summaries(path: Path) -> dict[str, StrategySummary]:
    assert check_trace(path) == []
    return {summary.strategy: summary for summary in summarise(read_trace(path))}


# -- what a trace says ------------------------------------------------------------------------


def test_every_strategy_has_a_row_a_model_and_one_for_its_samples(traced: Path) -> None:
    events = read_trace(traced / "trace.json")["traceEvents"]
    names = [event["args"]["name"] for event in events if event["name"] == "process_name"]
    assert names == [
        name
        for strategy, models in NAMES.items()
        for name in (
            f"{strategy}: samples",
            *(f"{strategy}, stage {index}: {model}" for index, model in enumerate(models)),
        )
    ]
    samples = [event["name"] for event in events if event.get("cat") == "samples"]
    assert samples == ["warm-up", "sample 0", "sample 1"] * 3


def test_its_counts_are_those_of_the_result_files(traced: Path) -> None:
    found = summaries(traced / "trace.json")
    for path in (traced / "out").iterdir():
        run = load_results(path)
        metrics = [result["metrics"] for result in run.results]
        stages = found[run.metadata["strategy"]].stages
        assert [stage.name for stage in stages] == NAMES[run.metadata["strategy"]]
        assert stages[-1].num_emitted == sum(m["tokens_generated"] for m in metrics)
        for index, stage in enumerate(stages):
            steps = sum(m["num_steps"][index] for m in metrics)
            assert stage.num_forwards == steps + len(metrics)  # a prefill each
            assert stage.num_rolled_back == sum(m["num_rolled_back"][index] for m in metrics)
            assert stage.num_rollbacks == sum(m["num_rollbacks"][index] for m in metrics)
        for index, stage in enumerate(stages[1:]):
            assert stage.num_offered == sum(m["num_offered"][index] for m in metrics)
            assert stage.num_accepted == sum(m["num_accepted"][index] for m in metrics)


def test_its_times_are_those_of_the_result_files(traced: Path) -> None:
    found = summaries(traced / "trace.json")
    for path in (traced / "out").iterdir():
        run = load_results(path)
        for index, stage in enumerate(found[run.metadata["strategy"]].stages):
            metrics = [result["metrics"] for result in run.results]
            forward_s = sum(m["forward_times_s"][index] for m in metrics)
            kinds = ("prefill", "decode", "draft", "prepare", "verify")
            assert sum(stage.seconds[kind] for kind in kinds) == pytest.approx(forward_s, rel=0.1)
            assert stage.seconds["wait"] <= sum(m["wait_times_s"][index] for m in metrics) + 1e-6
            assert sum(stage.seconds.values()) == pytest.approx(stage.total_s)


def test_messages_lead_from_each_stage_to_its_neighbours(traced: Path) -> None:
    events = read_trace(traced / "trace.json")["traceEvents"]
    ends: dict[str, dict[str, int]] = {}
    for event in events:
        if event["ph"] in "sf":
            ends.setdefault(event["id"], {"name": event["name"]})[event["ph"]] = event["pid"]
    for first in (1001, 2001):  # chain, async-chain
        for name, sender, receiver in (
            *(("Draft", first + stage, first + stage + 1) for stage in (0, 1)),
            *(("Verdict", first + stage + 1, first + stage) for stage in (0, 1)),
        ):
            pair = {"name": name, "s": sender, "f": receiver}
            assert list(ends.values()).count(pair) >= 5, pair
    num_processes = {end["f"] - end["s"] for end in ends.values()}
    assert num_processes == {1, -1}


def test_prepared_outcomes_are_counted(traced: Path) -> None:
    stages = summaries(traced / "trace.json")["async-chain"].stages
    assert stages[0].num_prepared > 0
    assert stages[2].num_prepared == 0


@pytest.mark.parametrize("strategy", list(NAMES))
def test_an_example_is_traced_too(
    strategy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "trace.json"
    flags = ["--strategy", strategy, "--models-config-path", write_emulated(tmp_path, 3)]
    text = ["--prompt", "def", "--max-new-tokens", "12", "--trace", str(path)]
    assert run_example.main([*flags, *text]) == 0
    assert f"events in {path}" in capsys.readouterr().err
    (summary,) = summaries(path).values()
    assert summary.strategy == strategy
    assert summary.num_samples == 1
    assert summary.stages[-1].num_emitted == 12


def test_the_command_says_where_the_time_went(
    traced: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check_command([str(traced / "trace.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "trace.json: ok, " in lines[0]
    assert lines[2] == "greedy, 2 samples"
    assert lines[3].split()[4:6] == ["prefill", "decode"]
    name, _, decode, *_ = lines[4].split()
    assert name == "target" and float(decode) > 30.0


def test_a_loop_that_is_not_traced_is_as_it_was() -> None:
    def loop(tracer: Tracer | None) -> StageLoop:
        values = {"step_ms": {"1": 1.0}}
        runner = EmulatedRunner(values, name="target", vocab_size=64, context_length=64)
        return StageLoop(
            index=1,
            num_stages=2,
            incarnations=[1, 1],
            schedule=Schedule(),
            runner=runner,
            transport=connect_in_memory(2)[0][1],
            tracer=tracer,
        )

    assert type(loop(None).state) is StageState
    assert not isinstance(loop(None)._transport, TracedTransport)
    assert type(loop(Tracer()).state) is TracedState


# -- keeping events ---------------------------------------------------------------------------


def test_what_a_tracer_has_no_room_for_is_counted(tmp_path: Path) -> None:
    tracer = Tracer(limit=2)
    for index in range(5):
        tracer.add("verify", index, index + 1, emitted=1)
    assert len(tracer.events) == 2
    assert tracer.trace("target").num_dropped == 3


def test_events_are_appended_to_a_file_and_a_torn_end_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "stage-0.trace"
    assert read_events(path, "draft").events == []
    tracer = Tracer(path, limit=3)
    tracer.add("draft", 1.0, 2.0, emitted=3)
    tracer.flush()
    whole = path.stat().st_size
    tracer.add("send Draft", 2.0, 2.5, "0>1.7", tokens=3)
    tracer.add("rollback", 3.0, 3.0, tokens=1)
    tracer.add("draft", 4.0, 5.0)
    tracer.flush()
    tracer.flush()
    found = read_events(path, "draft")
    assert [event.name for event in found.events] == ["draft", "send Draft", "rollback"]
    assert found.events[1].flow == "0>1.7" and found.events[1].args == {"tokens": 3}
    assert found.num_dropped == 1
    content = path.read_bytes()
    path.write_bytes(content[: (whole + len(content)) // 2])
    assert [event.name for event in read_events(path, "draft").events] == ["draft"]


def test_what_was_left_out_is_said_and_the_rest_is_a_good_trace(tmp_path: Path) -> None:
    """A message whose arrival no stage had room for has no arrow."""
    tracers = [Tracer(limit=3), Tracer(limit=1)]
    for tracer in tracers:
        tracer.add("draft", 10.0, 10.5, emitted=1, ahead=1)
    tracers[0].add("send Draft", 10.5, 10.6, "0>1.1", tokens=1)
    tracers[1].add("receive Draft", 10.7, 10.8, "0>1.1", tokens=1)
    path = tmp_path / "trace.json"
    with TraceRecorder(path) as recorder:
        recorder.add(StrategyTrace("chain", tuple(tracer.trace("same") for tracer in tracers)))
    assert recorder.describe() == (
        f"trace: 3 events in {path}; 1 later ones are left out, a stage keeps 200,000"
    )
    assert check_trace(path) == []
    content = read_trace(path)
    assert not [event for event in content["traceEvents"] if event["ph"] in "sf"]
    assert content["otherData"]["num_dropped_events"] == 1
    assert min(event["ts"] for event in content["traceEvents"] if event["ph"] == "X") == 0.0


def test_a_command_that_ran_nothing_leaves_an_empty_trace(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    with pytest.raises(ValueError, match="broken") as raised, TraceRecorder(path):
        raise ValueError("broken")
    assert raised.value.__notes__ == [f"what happened until then is in {path}"]
    assert check_trace(path) == []
    assert summarise(read_trace(path)) == []


def test_a_full_disk_costs_events_and_not_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracer = Tracer(tmp_path / "nowhere" / "stage-0.trace")
    tracer.add("draft", 1.0, 2.0)
    tracer.flush()
    assert tracer.num_dropped == 1
    assert "1 events are lost" in caplog.text


# -- however a run ends -----------------------------------------------------------------------


@contextmanager
def started(flags: list[str]) -> Iterator[subprocess.Popen[str]]:
    """The benchmark as a process; it has ended when the block has."""
    process = subprocess.Popen(
        [sys.executable, "-m", "pipespec.benchmark", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=DEADLINE_S)


def wait_for_samples(path: Path, count: int, process: subprocess.Popen[str]) -> list[int]:
    """Until so many are on the disk; returns the ids of the stages' processes."""
    deadline = time.monotonic() + DEADLINE_S
    partial = partial_path(path)
    while not partial.exists() or len(read_partial(partial).results) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "samples took too long"
        time.sleep(0.01)
    return list((read_partial(partial).metadata or {})["pids"])


@pytest.mark.parametrize("strategy", ["greedy", "async-chain"])
def test_ctrl_c_leaves_a_whole_trace(strategy: str, tmp_path: Path) -> None:
    texts = [f"prompt {index}" for index in range(100)]
    flags = [*flags_of(tmp_path, 2, texts, target_ms=5.0), "--max-new-tokens", "8"]
    name = {"greedy": "greedy_target.json", "async-chain": "async-chain_draft-target_auto.json"}
    with started([*flags, "--strategy", strategy]) as process:
        wait_for_samples(tmp_path / "out" / name[strategy], 2, process)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 130, stderr
    assert f"what happened until then is in {tmp_path / 'trace.json'}" in stderr
    (summary,) = summaries(tmp_path / "trace.json").values()
    assert summary.num_samples >= 2
    assert all(stage.num_forwards >= 2 * 2 for stage in summary.stages)


def test_a_stage_that_is_killed_leaves_what_it_did_before(tmp_path: Path) -> None:
    texts = [f"prompt {index}" for index in range(100)]
    flags = [*flags_of(tmp_path, 2, texts, target_ms=5.0), "--max-new-tokens", "8"]
    with started([*flags, "--strategy", "async-chain"]) as process:
        path = tmp_path / "out" / "async-chain_draft-target_auto.json"
        draft, _ = wait_for_samples(path, 2, process)
        os.kill(draft, signal.SIGKILL)
        _, stderr = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 1
    assert "killed by signal 9" in stderr
    (summary,) = summaries(tmp_path / "trace.json").values()
    assert summary.num_samples >= 2
    assert all(stage.num_forwards >= 2 * 2 for stage in summary.stages)


def test_what_cannot_be_traced_is_said_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*flags_of(tmp_path, 1, ["one"]), "--strategy", "greedy", "--max-new-tokens", "2"]
    assert benchmark.main([*flags, "--trace", str(tmp_path / "nowhere" / "trace.json")]) == 2
    assert "error: --trace: there is no folder" in capsys.readouterr().err
    assert benchmark.main(flags) == 0
    capsys.readouterr()
    assert benchmark.main(flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --trace: everything is in ")
    assert benchmark.main([*flags, "--force"]) == 0


# -- the check --------------------------------------------------------------------------------


def is_forward(event: Item) -> bool:
    return event.get("cat") == "forward"


def is_verify(event: Item) -> bool:
    return event["name"] == "verify" and event["args"]["offered"] > 0


def is_start(event: Item) -> bool:
    return event["ph"] == "s"


def is_finish(event: Item) -> bool:
    return event["ph"] == "f"


def is_process_name(event: Item) -> bool:
    return event["name"] == "process_name" and "stage" in event["args"]["name"]


def is_thread_name(event: Item) -> bool:
    return event["name"] == "thread_name"


def change(**values: Any) -> Callable[[Item], Item]:
    return lambda event: {**event, **values}


def change_args(**values: Any) -> Callable[[Item], Item]:
    return lambda event: {**event, "args": {**event["args"], **values}}


PLANTED: dict[str, tuple[Callable[[Item], bool], Callable[[Item], Item | None], str]] = {
    "phase": (is_forward, change(ph="B"), "unknown phase 'B'"),
    "no phase": (is_forward, change(ph=None), "unknown phase None"),
    "name": (is_forward, change(name=""), "has no name"),
    "process": (is_forward, change(pid="1"), "no process number"),
    "thread": (is_forward, change(tid=None), "no thread number"),
    "time": (is_forward, change(ts=-1.0), "has the time -1.0"),
    "endless": (is_forward, change(ts=float("nan")), "has the time nan"),
    "duration": (is_forward, change(dur=-0.001), "has the duration -0.001"),
    "args": (is_forward, change(args=[1]), "args that are no object"),
    "count": (is_forward, change_args(emitted=-1), "has emitted -1"),
    "accepted": (is_verify, change_args(accepted=99), "accepted 99 of"),
    "order": (is_forward, lambda e: {**e, "ts": e["ts"] + 9e6}, "before the one before it"),
    "process name": (is_process_name, lambda _: None, "has events and no name"),
    "thread name": (is_thread_name, lambda _: None, "has events and no name"),
    "empty name": (is_process_name, change(args={"name": ""}), "process_name without a name"),
    "same name": (
        is_process_name,
        change(args={"name": "greedy: samples"}),
        "a second process called greedy: samples",
    ),
    "metadata": (is_process_name, change(name="process_color"), "unknown metadata"),
    "no start": (is_start, lambda _: None, "has 0 starts and 1 ends"),
    "no end": (is_finish, lambda _: None, "has 1 starts and 0 ends"),
    "no id": (is_start, change(id=None), "without an id"),
    "binding": (is_finish, change(bp="s"), "not bound to its slice"),
    "message": (is_start, change(name="Hello"), "is sent as Hello and received as"),
    "in no slice": (is_start, lambda e: {**e, "ts": e["ts"] - 0.001}, "its start in no slice"),
    "backwards": (is_start, lambda e: {**e, "ts": e["ts"] + 9e6}, "before it is sent"),
    "counter": (
        lambda e: e["ph"] == "C",
        change(args={"tokens": "many"}),
        "counts something that is no number",
    ),
    "instant": (lambda e: e["ph"] == "i", change(s="x"), "instant without a scope"),
}


@pytest.mark.parametrize("planted", list(PLANTED))
def test_the_check_finds_what_is_wrong(planted: str, traced: Path) -> None:
    events = read_trace(traced / "trace.json")["traceEvents"]
    assert find_problems(events) == []
    is_wanted, spoil, complaint = PLANTED[planted]
    places = [
        index for index, event in enumerate(events) if event["pid"] >= 2000 and is_wanted(event)
    ]
    place = places[len(places) // 2]
    spoilt = spoil(copy.deepcopy(events[place]))
    events[place : place + 1] = [] if spoilt is None else [spoilt]
    problems = find_problems(events)
    assert any(complaint in problem for problem in problems), problems[:3]


def test_the_check_finds_a_slice_that_outlives_the_one_around_it() -> None:
    def row(*slices: tuple[float, float]) -> list[Item]:
        names = [
            {"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "stage"}},
            {"ph": "M", "name": "thread_name", "pid": 1, "tid": 1, "args": {"name": "loop"}},
        ]
        head = {"ph": "X", "name": "verify", "pid": 1, "tid": 1}
        return [*names, *({**head, "ts": ts, "dur": dur} for ts, dur in slices)]

    assert find_problems(row((0.0, 5.0), (1.0, 4.0), (1.0, 1.0), (2.0, 3.0), (5.0, 1.0))) == []
    (problem,) = find_problems(row((0.0, 5.0), (1.0, 2.0), (4.0, 1.001)))
    assert problem == "event 4: slice verify ends after event 2, in which it begins"


def test_the_check_finds_a_message_to_oneself(traced: Path) -> None:
    events = read_trace(traced / "trace.json")["traceEvents"]
    start = next(event for event in events if is_start(event))
    finish = next(event for event in events if is_finish(event) and event["id"] == start["id"])
    finish["pid"] = start["pid"]
    expected = f"message {start['id']} is sent and received by the same process {start['pid']}"
    assert expected in find_problems(events)


def test_a_problem_is_a_line_and_exit_code_1(
    traced: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = read_trace(traced / "trace.json")
    event = next(event for event in content["traceEvents"] if event["ph"] == "X")
    event["dur"] = -1.0
    path = tmp_path / "trace.json"
    path.write_text(json.dumps(content))
    assert check_command([str(path)]) == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{path}: event ") and "has the duration -1.0" in line


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"traceEvents": 1}', "\udcff"])
def test_a_file_that_is_no_trace_is_named(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "other.json"
    path.write_bytes(content.encode(errors="surrogateescape"))
    assert check_command([str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {path}")


# -- ranges on GPUs ---------------------------------------------------------------------------


def test_ranges_enclose_forwards_also_those_that_fail() -> None:
    runner = EmulatedRunner(
        {"step_ms": {"1": 0.01}}, name="target", vocab_size=64, context_length=64
    )
    assert with_ranges(runner, 1, 2) is runner  # it is not on a GPU
    told: list[str] = []
    ranged = RangedRunner(runner, "verify", told.append, lambda: told.append("end"))
    expected = runner.forward([Row(0, 0, (1, 2, 3), 1, SamplingParams())])
    assert ranged.forward([Row(0, 0, (1, 2, 3), 1, SamplingParams())]) == expected
    ranged.forward([Row(0, 3, (4, 5), 2, SamplingParams())])
    assert told == ["prefill target, 3 tokens", "end", "verify target, 2 tokens", "end"]
    with pytest.raises(AssertionError):
        ranged.forward([Row(0, 60, (1,), 1, SamplingParams())])
    assert told[-1] == "end"
    assert ranged.info is runner.info
    ranged.release(0)
    ranged.close()


@pytest.mark.gpu
def test_a_model_on_a_gpu_has_nvtx_ranges(tmp_path: Path) -> None:
    """That the calls are there and harmless; what a profiler makes of them is for one to say."""
    from tiny import make_tiny

    from pipespec.runners.llama import LlamaRunner

    runner = LlamaRunner(
        make_tiny(tmp_path / "model"),
        name="target",
        device="cuda:0",
        dtype="float32",
        vocab_size=128,
        context_length=64,
    )
    ranged = with_ranges(runner, 1, 2)
    assert isinstance(ranged, RangedRunner)
    row = Row(0, 0, (1, 2, 3), 2, SamplingParams())
    assert ranged.forward([row]) == runner.forward([row])
    ranged.close()
