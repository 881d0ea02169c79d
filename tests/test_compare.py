"""The race as a user starts it: real processes, real tiny models, transformers as a peer."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from emulated import write_emulated, write_prompts
from processes import DEADLINE_S, nothing_left_in, python, wait_until
from tiny import make_tiny_pair

from pipespec import compare
from pipespec.comparison.measures import table_rows
from pipespec.comparison.record import Record, load
from pipespec.results import locked

PROMPTS = ("The quick brown fox", "def add(a, b):")
OWN = ("greedy", "chain", "async-chain")
PEERS = ("transformers", "transformers-assisted", "transformers-lookup")
PARROT = """
import json, sys
for line in open(sys.argv[1]):
    prompt = json.loads(line)
    print(json.dumps({"index": prompt["index"], "num_tokens": 4, "seconds": 1e-3,
                      "text": "no text of the target"}))
"""


def program(folder: Path, name: str, code: str) -> list[str]:
    """The flags that let a Python program take part."""
    path = folder / f"{name}.py"
    path.write_text(code)
    return ["--command", f"{name}={sys.executable} {shlex.quote(str(path))} {{prompts}}"]


def column(text: str, name: str) -> list[str]:
    """The words of each row of a contestant, in the order of the tables."""
    rows = [line.split() for line in text.splitlines()]
    return [" ".join(words) for words in rows if words and words[0].strip(",") == name]


# -- real models --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def race(tmp_path_factory: pytest.TempPathFactory) -> tuple[Record, str]:
    """One round of two prompts, on the target's device, and what was printed of it."""
    folder = tmp_path_factory.mktemp("race")
    flags = ["--models-config-path", str(make_tiny_pair(folder)), "--rounds", "1"]
    flags += ["--dataset", write_prompts(folder, PROMPTS), "--max-new-tokens", "12"]
    flags += [
        "--num-samples",
        "2",
        "--tables",
        "device",
        "--chain-lookaheads",
        "2",
        "4",
        "--timeout",
        "60",
    ]
    flags += ["--assistant-tokens", "heuristic", "default", "3"]
    flags += ["--only", *OWN, *PEERS, "parrot", "broken", "silent", "chatty"]
    flags += program(folder, "parrot", PARROT)
    flags += program(folder, "broken", "raise SystemExit('no such model')")
    flags += program(folder, "silent", "")
    flags += program(folder, "chatty", "print('loading')")
    output = folder / "race.json"
    with nothing_left_in(tmp_path_factory.mktemp("temporary")):
        run = subprocess.run(
            [sys.executable, "-m", "pipespec.compare", *flags, "--output", str(output)],
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
    assert run.returncode == 0, run.stderr
    return load(output), run.stdout


def test_every_contestant_has_its_turn_over_all_prompts(race: tuple[Record, str]) -> None:
    record, printed = race
    assert {turn.round for turn in record.turns} == {1}
    ran = {turn.contestant for turn in record.turns}
    assert {name.partition("@")[0] for name in ran} == {*OWN, *PEERS, "parrot"}
    assert all([p.index for p in turn.prompts] == [0, 1] for turn in record.turns)
    for name in (*OWN, *PEERS, "parrot"):
        assert len(column(printed, name)) == 1, printed


def test_in_float32_peers_and_drafts_write_greedy_s_text(race: tuple[Record, str]) -> None:
    record, printed = race
    for row in table_rows(record, "device"):
        assert row.sameness is not None
        if row.entrant.name != "parrot":
            assert row.sameness.num_equal == row.sameness.num_compared == 2, printed
    assert {turn.variant for turn in record.turns if "assisted" in turn.contestant} == {
        *("heuristic", "default", "3 tokens")
    }


def test_a_program_s_other_text_is_told(race: tuple[Record, str]) -> None:
    (row,) = column(race[1], "parrot")
    assert row.endswith("0/2, char 0")


def test_failing_programs_are_one_line_each(race: tuple[Record, str]) -> None:
    lines = [line for line in race[1].splitlines() if line.startswith("left out: ")]
    assert lines == [
        "left out: broken: ended with exit status 1: no such model",
        "left out: silent: answered 0 of 2 prompts",
        "left out: chatty: printed a line that is no JSON object: loading",
    ]


def test_times_are_of_the_text_and_its_first_token(race: tuple[Record, str]) -> None:
    for turn in race[0].turns:
        for prompt in turn.prompts:
            assert 1 <= prompt.num_tokens <= 12
            assert prompt.seconds > 0.0
            if not turn.contestant.startswith("parrot"):
                assert prompt.first_token_s is not None
                assert 0.0 < prompt.first_token_s <= prompt.seconds


def test_the_file_says_what_ran_where(race: tuple[Record, str]) -> None:
    metadata = race[0].metadata
    assert metadata["command"][:3] == ["python", "-m", "pipespec.compare"]
    assert {"torch", "transformers"} <= set(metadata["versions"])
    assert metadata["machine"]["cores"]
    assert metadata["finished_at"]
    greedy = race[0].entrants[0]
    assert greedy.info["load_s"] > 0
    assert greedy.places[0]["device"] == "cpu"


# -- the command, with models that need no torch ------------------------------------------------


def emulated_flags(folder: Path, num_models: int = 2, **values: float) -> list[str]:
    config = write_emulated(folder, num_models, **values)
    flags = ["--models-config-path", config, "--dataset", write_prompts(folder, PROMPTS)]
    flags += ["--num-samples", "2", "--max-new-tokens", "8"]
    return [*flags, "--output", str(folder / "race.json")]


@pytest.mark.parametrize("extra", [[], ["--one-at-a-time"]])
def test_emulated_models_race_without_peers(
    extra: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = [*OWN, "async-chain-pipespec", "async-chain-outcomes-0"]
    flags = [*emulated_flags(tmp_path), *extra, "--rounds", "2", "--only", *own, *PEERS]
    assert compare.main([*flags, "--chain-lookaheads", "2", "3"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("EMULATED: Same device for the target: async-chain has")
    assert "Same total hardware" not in printed
    assert all(len(column(printed, name)) == 1 for name in own)
    for name in PEERS:
        why = "emulated models have no weights that transformers could load"
        assert f"left out: {name}: {why}" in printed
    record = load(tmp_path / "race.json")
    assert [turn.round for turn in record.turns] == [1] * 6 + [2] * 6
    for number in (1, 2):
        ran = [turn.contestant for turn in record.turns if turn.round == number]
        assert sorted(ran) == sorted([*own, "chain"]), "chain has two variants"


def test_nobody_to_race_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*emulated_flags(tmp_path), "--only", "transformers"]
    assert compare.main(flags) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: nobody could race: transformers: emulated models have no")
    assert not (tmp_path / "race.json").exists()


@pytest.mark.parametrize(
    ("number", "exit_code", "says"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "stopped by a signal")],
)
def test_an_interrupted_race_keeps_its_turns_and_prints_their_tables(
    number: signal.Signals, exit_code: int, says: str, tmp_path: Path
) -> None:
    flags = [*emulated_flags(tmp_path, target_ms=10.0), "--rounds", "500"]
    flags += ["--only", "greedy", "async-chain"]
    path = tmp_path / "race.json"
    with nothing_left_in(tmp_path), python("-m", "pipespec.compare", *flags) as process:
        wait_until(lambda: path.exists() and len(load(path).turns) >= 3, "no turn came")
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) == 4
        process.send_signal(number)
        out, errors = process.communicate(timeout=DEADLINE_S)
        assert process.returncode == exit_code
    assert len(column(out, "greedy")) == len(column(out, "async-chain")) == 1
    assert errors.splitlines()[-1] == f"{says}; what was measured is in {path}"
    assert len(load(path).turns) >= 3
    assert load(path).metadata["finished_at"] is None
    wait_until(lambda: not any(member.is_running() for member in family), "processes are left")


def test_a_killed_race_leaves_nothing_behind(tmp_path: Path) -> None:
    flags = [*emulated_flags(tmp_path, target_ms=10.0), "--rounds", "500"]
    path = tmp_path / "race.json"
    flags += ["--only", "greedy", "async-chain"]
    with nothing_left_in(tmp_path), python("-m", "pipespec.compare", *flags) as process:
        wait_until(lambda: path.exists() and len(load(path).turns) >= 3, "no turn came")
        family = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        wait_until(lambda: not any(map(psutil.Process.is_running, family)), "processes are left")
    assert len(load(path).turns) >= 3


def test_a_killed_contestant_leaves_nothing_behind(tmp_path: Path) -> None:
    flags = [*emulated_flags(tmp_path, target_ms=10.0), "--rounds", "8"]
    path = tmp_path / "race.json"
    flags += ["--only", "greedy", "async-chain"]
    with nothing_left_in(tmp_path), python("-m", "pipespec.compare", *flags) as process:
        wait_until(lambda: path.exists() and len(load(path).turns) >= 3, "no turn came")
        racers = [c for c in psutil.Process(process.pid).children() if c.children()]
        assert len(racers) == 1, "async-chain alone has processes of its own"
        racers[0].kill()
        out, _ = process.communicate(timeout=DEADLINE_S)
        assert process.returncode == 0
    assert "left out: async-chain: was killed by signal 9" in out


def test_a_race_that_had_no_turn_leaves_the_former_file(tmp_path: Path) -> None:
    path = tmp_path / "race.json"
    path.write_text("precious")
    flags = [*emulated_flags(tmp_path), "--only", "transformers", "--force"]
    assert compare.main(flags) == 1
    assert path.read_text() == "precious"


def test_a_file_that_another_race_writes_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with locked(tmp_path / "race.json", "--output"):
        assert compare.main([*emulated_flags(tmp_path), "--only", "greedy"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "race.json; wait for it or name another --output" in line
    assert not list(tmp_path.glob("race.json*"))


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--rounds", "0"], "--rounds is 0; it must be a positive integer"),
        (["--timeout", "-1"], "--timeout: -1 is not a number of seconds above 0"),
        (["--only", "vllm"], "--only: nobody is called vllm"),
        (["--command", "x=run"], "--command x has no {prompts}"),
        (["--command", "chain=run {prompts}"], "--command: the name chain is taken"),
        (["--assistant-tokens", "many"], "--assistant-tokens: many is not an integer"),
        (["--chain-lookaheads", "0"], "--chain-lookaheads: 0 is not an integer from 1 to 1024"),
        (["--outcomes", "99"], "--outcomes is 99; it must be from 0 to 16"),
        (["--num-samples", "0"], "--num-samples is 0"),
        (["--output", "."], "--output: . is a folder; name a file"),
        (["--output", ".", "--force"], "--output: . is a folder; name a file"),
    ],
)
def test_wrong_flags_are_one_line(
    flags: list[str], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare.main([*emulated_flags(tmp_path), *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert complaint in line
    assert not (tmp_path / "race.json").exists()


def test_a_file_is_not_overwritten_by_accident(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "race.json"
    path.write_text(json.dumps("precious"))
    flags = [*emulated_flags(tmp_path), "--only", "greedy", "--rounds", "1"]
    assert compare.main(flags) == 2
    assert "is there already" in capsys.readouterr().err
    assert compare.main([*flags, "--force"]) == 0
    assert len(load(path).turns) == 1
