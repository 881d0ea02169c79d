"""Processes of a race: programs of users, checked line by line; nothing runs while others do."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from processes import is_gone, python, wait_until

from pipespec.commands.inputs import Prompt
from pipespec.comparison.process import ContestantFailed, Group
from pipespec.comparison.user_command import (
    CommandAnswer,
    parse_command,
    read_answer,
    run_command,
    write_prompts,
)
from pipespec.config import SamplingParams
from pipespec.errors import UsageError

LIMITS = {3: 8, 5: 8}
ANSWERS = """
import json, sys
for line in open(sys.argv[1]):
    prompt = json.loads(line)
    ids = prompt["token_ids"][: prompt["max_new_tokens"]]
    print(json.dumps({"index": prompt["index"], "num_tokens": len(ids), "seconds": 1e-4,
                      "first_token_s": 1e-5, "token_ids": ids, "text": prompt["prompt"]}))
"""


@pytest.fixture
def group(tmp_path: Path) -> Iterator[Group]:
    with Group(tmp_path / "program.log") as group:
        yield group


def run(group: Group, program: str, timeout_s: float = 30.0) -> list[CommandAnswer]:
    """A turn of a Python program over two prompts."""
    path = group.log_path.parent / "prompts.jsonl"
    prompts = [Prompt(index, f"text {index}", (1, 2, 3)) for index in LIMITS]
    write_prompts(path, prompts, LIMITS, SamplingParams())
    (group.log_path.parent / "program.py").write_text(program)
    script = shlex.quote(str(group.log_path.parent / "program.py"))
    return run_command(
        group,
        f"{sys.executable} {script} {{prompts}}",
        path,
        LIMITS,
        environment=os.environ,
        cores=(),
        timeout_s=timeout_s,
    )


# -- programs of users --------------------------------------------------------------------------


def test_a_program_gets_the_prompts_and_is_believed_what_it_tells_of_each(group: Group) -> None:
    first, second = run(group, ANSWERS)
    assert first == CommandAnswer(3, 3, 1e-4, 1e-5, "text 3", (1, 2, 3))
    assert second.index == 5


def test_answers_may_come_in_any_order(group: Group) -> None:
    backwards = ANSWERS.replace("open(sys.argv[1])", "reversed(list(open(sys.argv[1])))")
    assert [answer.index for answer in run(group, backwards)] == [3, 5]


@pytest.mark.parametrize(
    ("program", "complaint"),
    [
        ("import sys; sys.exit('no such model')", "ended with exit status 1: no such model"),
        (ANSWERS + "sys.exit(3)", "ended with exit status 3"),
        ("import os; os.kill(os.getpid(), 9)", "was killed by signal 9, perhaps for want"),
        ("print('loading the model')", "printed a line that is no JSON object: loading the"),
        (ANSWERS + "print('{\"index\": 3}')", 'printed "num_tokens": null for prompt 3'),
        (ANSWERS.replace("1e-4", "1e4"), "tells of 2e.04 s, but ran for"),
        (ANSWERS.replace("in open(sys.argv[1])", "in [*open(sys.argv[1])] * 2"), "3 twice"),
        (ANSWERS.replace("in open(sys.argv[1])", "in [*open(sys.argv[1])][:1]"), "1 of 2 prompts"),
    ],
)
def test_what_is_wrong_with_a_program_is_told_in_one_clause(
    program: str, complaint: str, group: Group
) -> None:
    with pytest.raises(ContestantFailed, match=complaint) as failure:
        run(group, program)
    assert "\n" not in str(failure.value)


def test_a_silent_program_is_given_up_with_all_its_processes(group: Group) -> None:
    program = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', "
    program += "'import time; time.sleep(600)']); time.sleep(600)"
    with pytest.raises(ContestantFailed, match=r"^was silent for 1 s; see --timeout"):
        run(group, program, timeout_s=1.0)
    members = [psutil.Process(group.pid), *psutil.Process(group.pid).children()]
    group.close()
    wait_until(lambda: all(is_gone(member.pid) for member in members), "processes are left")


def test_there_may_be_no_such_program(group: Group) -> None:
    with pytest.raises(ContestantFailed, match=r"^/nowhere/llama cannot be started: No such file"):
        group.start(["/nowhere/llama"], os.environ)


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"index": 9}, '"index": 9, which no prompt has'),
        ({"index": "3"}, '"index": "3", which no prompt has'),
        ({"num_tokens": 0}, "must be an integer from 1 to 8"),
        ({"num_tokens": 9}, "must be an integer from 1 to 8"),
        ({"num_tokens": True}, "must be an integer from 1 to 8"),
        ({"seconds": 0}, '"seconds": 0 for prompt 3; it must be above 0'),
        ({"seconds": "1"}, "must be above 0"),
        ({"seconds": float("inf")}, "must be above 0"),
        ({"token_ids": [1]}, '"token_ids" for prompt 3'),
        ({"token_ids": [1, -2]}, '"token_ids" for prompt 3'),
        ({"token_ids": "ab"}, '"token_ids" for prompt 3'),
    ],
)
def test_a_wrong_line_is_refused(values: dict[str, Any], complaint: str) -> None:
    line = json.dumps({"index": 3, "num_tokens": 2, "seconds": 0.5, **values}).encode()
    with pytest.raises(ContestantFailed, match=complaint):
        read_answer(line, LIMITS)


def test_what_a_program_need_not_tell_may_be_missing() -> None:
    answer = read_answer(b'{"index": 3, "num_tokens": 2, "seconds": 0.5, "other": 1}', LIMITS)
    assert answer == CommandAnswer(3, 2, 0.5, None, None, None)


def test_a_command_has_a_name_and_a_place_for_the_prompts() -> None:
    assert parse_command("llama.cpp=run --in {prompts}") == ("llama.cpp", "run --in {prompts}")
    assert parse_command("x=run --file={prompts} a=b") == ("x", "run --file={prompts} a=b")
    for text, complaint in (
        ("run {prompts}", "must be NAME="),
        ("=run {prompts}", "must be NAME="),
        ("x=", "must be NAME="),
        ("a/b=run {prompts}", "may have letters"),
        ("x=run 'a {prompts}", "No closing quotation"),
        ("x=run", r"has no \{prompts\}"),
    ):
        with pytest.raises(UsageError, match=complaint):
            parse_command(text)


# -- pausing and ending -------------------------------------------------------------------------


def test_a_paused_group_computes_nothing(group: Group) -> None:
    group.start([sys.executable, "-c", "import time\nwhile True: pass"], os.environ)
    process = psutil.Process(group.pid)
    wait_until(lambda: process.cpu_times().user > 0.02, "it never ran")
    group.pause()
    wait_until(lambda: process.status() == psutil.STATUS_STOPPED)
    before = process.cpu_times().user
    time.sleep(0.2)
    assert process.cpu_times().user == before
    group.resume()
    wait_until(lambda: process.cpu_times().user > before, "it never went on")


def test_what_is_started_begins_on_its_cores(group: Group) -> None:
    core = min(os.sched_getaffinity(0))
    before = os.sched_getaffinity(0)
    code = "import os; print(sorted(os.sched_getaffinity(0)))"
    group.start([sys.executable, "-c", code], os.environ, (core,))
    assert group.read(30.0) == f"[{core}]".encode()
    assert os.sched_getaffinity(0) == before


def test_lines_come_as_they_are_written_and_the_last_needs_no_end(group: Group) -> None:
    code = "print('one'); print(); print('three', end='')"
    group.start([sys.executable, "-c", code], os.environ)
    assert [group.read(30.0) for _ in range(4)] == [b"one", b"", b"three", None]


def test_a_process_that_does_not_read_is_given_up(group: Group) -> None:
    group.start([sys.executable, "-c", "import time; time.sleep(600)"], os.environ)
    with pytest.raises(ContestantFailed, match=r"^did not read for 0\.2 s"):
        group.send(b"x" * (1 << 20), 0.2)


def test_paused_groups_do_not_outlive_a_killed_race(tmp_path: Path) -> None:
    """Nobody cleans up after SIGKILL but the kernel."""
    code = f"""
import os, sys, time
from pathlib import Path
from pipespec.comparison.process import Group
group = Group(Path({str(tmp_path)!r}) / "log")
waits = "import sys; print('ready', flush=True); sys.stdin.read()"
group.start([sys.executable, "-c", waits], os.environ)
group.read(30.0)
group.pause()
print(group.pid, flush=True)
time.sleep(600)
"""
    with python("-c", code) as race:
        assert race.stdout is not None
        pid = int(race.stdout.readline())
        wait_until(lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED)
        race.send_signal(signal.SIGKILL)
        wait_until(lambda: is_gone(pid), "the stopped process is left")
