"""Our policies one by one: which schedules race, what is told of drafts, the simulated twin."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from emulated import write_emulated, write_prompts
from test_comparison_measures import printed, record, turn

from pipespec import compare
from pipespec.comparison.ablation import POLICIES, schedules
from pipespec.comparison.drafting import DraftRates, StageSums, draft_rates
from pipespec.comparison.record import Entrant, PromptResult, Record, Turn, load, save
from pipespec.config import Schedule
from pipespec.emulation import parse_emulation
from pipespec.simulate.prediction import Workload, predict
from pipespec.state import Role

# -- schedules --------------------------------------------------------------------------------


def active(schedule: Schedule) -> set[str]:
    """The policies that a schedule has, asked of the schedule itself."""
    has = {
        "wait": schedule.policy == "adaptive" and schedule.lookahead is None,
        "confidence": schedule.stops_where_dead,
        "outcomes": schedule.outcomes > 0,
        "tree": schedule.tree > 0,
    }
    return {name for name, is_on in has.items() if is_on}


def test_each_contestant_has_the_policies_of_its_name() -> None:
    found = {name: active(Schedule(**values)) for name, values in schedules().items()}
    assert found.pop("original") == set()
    assert found.pop("all") == {*POLICIES}
    assert found.pop("original+tree") == {"tree", "outcomes"}, "a tree is made of outcomes"
    assert found.pop("all-outcomes") == {"wait", "confidence"}
    assert found == {
        **{f"original+{name}": {name} for name in POLICIES if name != "tree"},
        **{f"all-{name}": {*POLICIES} - {name} for name in POLICIES if name != "outcomes"},
    }


def test_the_ends_are_the_original_and_our_default() -> None:
    shown = {name: Schedule(**values) for name, values in schedules().items()}
    for name, same in (("original", Schedule("pipespec", 0)), ("all-tree", Schedule())):
        for index in range(3):
            roles = [Role.of(schedule, index, 3, 1000, 192) for schedule in (shown[name], same)]
            assert roles[0] == roles[1], name


@pytest.mark.parametrize("policy", ["adaptive", "pipespec"])
def test_confidence_is_the_policy_s_unless_it_is_given(policy: str) -> None:
    assert Schedule(policy).stops_where_dead == (policy == "adaptive")
    for given in (True, False):
        assert Schedule(policy, confidence=given).stops_where_dead == given


def test_a_confident_draft_does_not_go_on_with_a_dead_text() -> None:
    """It is right in three of ten cases and could draft 40 tokens a verification."""
    draft = parse_emulation({"step_ms": {"1": 1}, "agreement": 0.3}, "draft")
    models = [("draft", draft), ("target", parse_emulation({"step_ms": {"1": 40}}, "target"))]
    drafted = {}
    for confidence in (False, True):
        schedule = Schedule("pipespec", 0, confidence=confidence)
        prediction = predict(models, "async-chain", schedule, Workload(1, 5, 60))
        drafted[confidence] = sum(text.num_drafted for text in prediction.stages[0])
    assert drafted[True] < drafted[False] / 3


# -- rates ------------------------------------------------------------------------------------

TARGET = StageSums(10, 35, 35, 0, 0, 0, 0)
DRAFT = StageSums(0, 0, 50, 20, 5, 8, 6)


def test_rates_are_sums_over_sums_of_all_texts() -> None:
    idle = StageSums(0, 0, 50, 0, 0, 0, 0)
    found = draft_rates([(DRAFT, TARGET), (idle, StageSums(10, 10, 10, 0, 0, 0, 0))])
    assert found == DraftRates(45 / 20, (6 / 8,), (25 / 100,))


def test_what_was_not_counted_is_none() -> None:
    assert draft_rates([(TARGET,)]) is None, "greedy has no draft"
    assert draft_rates([(), ()]) is None, "transformers tells nothing"
    empty = StageSums(0, 0, 0, 0, 0, 0, 0)
    assert draft_rates([(empty, empty)]) == DraftRates(None, (None,), (None,))


def ablation_record() -> Record:
    """Greedy, and two async-chains of three stages of which only the second prepares outcomes."""
    schedule = {name: schedules()[name] for name in ("original", "all")}
    entrants = [Entrant("greedy", "greedy", "own", ("device",), (), (), {"strategy": "greedy"})]
    for name, values in schedule.items():
        settings = {"strategy": "async-chain", "schedule": values}
        entrants.append(Entrant(name, name, "own", ("device",), (), (), settings))
    other = StageSums(0, 0, 100, 30, 0, 4, 1)
    texts = (PromptResult(0, 10, 1.0, stages=(other, DRAFT, TARGET)),)
    turns = [turn(1, "greedy", 4.0), *(Turn(1, name, "", texts) for name in schedule)]
    return record(entrants, turns, ablation=True, simulated=True, emulated=True)


def test_the_table_has_a_number_for_each_draft() -> None:
    lines = printed(ablation_record()).splitlines()
    assert lines[0].startswith("SIMULATED, EMULATED: Same device for the target")
    assert lines[1] == "Small > Large, 2 prompts of set, at most 10 new tokens"
    rows = {words[0]: words[1:] for line in lines if (words := line.split())}
    assert rows["greedy"] == ["5.0", "1.00x", "-", "-", "-", "-"]
    assert rows["original"] == ["10.0", "2.00x", "3.50", "-", "0.30", "0.50", "-"]
    assert rows["all"] == ["10.0", "2.00x", "3.50", "0.25", "0.75", "0.30", "0.50", "-"]


def test_what_stages_counted_comes_back_from_the_file(tmp_path: Path) -> None:
    path, race = tmp_path / "race.json", ablation_record()
    save(race, path)
    assert load(path) == race
    content = json.loads(path.read_text())
    for each in content["turns"]:
        for prompt in each["prompts"]:
            del prompt["stages"]
    path.write_text(json.dumps(content))
    assert load(path).turns[1].prompts[0].stages == (), "as in files of before"


# -- the command ------------------------------------------------------------------------------


def flags(folder: Path, *more: str) -> list[str]:
    dataset = write_prompts(folder, ("def add(a, b):", "for x in"))
    found = ["--models-config-path", write_emulated(folder, 3), "--dataset", dataset]
    found += ["--num-samples", "2", "--max-new-tokens", "24", "--ablation"]
    return [*found, "--chain-lookaheads", "2", *more, "--output", str(folder / "race.json")]


def test_processes_tell_what_their_stages_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = ["greedy", "chain", "original", "all"]
    assert compare.main(flags(tmp_path, "--only", *chosen, "--rounds", "1")) == 0
    out = capsys.readouterr().out
    assert "SIMULATED" not in out
    found = load(tmp_path / "race.json")
    assert {each.contestant for each in found.turns} == {*chosen}
    for each in found.turns:
        for prompt in each.prompts:
            assert len(prompt.stages) == (1 if each.contestant == "greedy" else 3)
            target = prompt.stages[-1]
            assert target.num_emitted == prompt.num_tokens - 1, "all but the prefill's"
    hits = {each.contestant: _num_hits(each) for each in found.turns}
    assert hits["chain"] == hits["original"] == 0


def _num_hits(each: Turn) -> int:
    return sum(stage.num_outcome_hits for prompt in each.prompts for stage in prompt.stages)


def test_the_simulated_race_writes_the_text_of_the_real_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare.main(flags(tmp_path, "--only", "greedy", "--rounds", "1")) == 0
    real = load(tmp_path / "race.json")
    capsys.readouterr()
    assert compare.main(flags(tmp_path, "--simulated", "--force")) == 0
    out = capsys.readouterr().out
    assert out.startswith("SIMULATED, EMULATED: ")
    found = load(tmp_path / "race.json")
    assert [each.round for each in found.turns] == [1] * (len(found.entrants) + 1), "chain has two"
    for each in found.turns:
        assert [p.output for p in each.prompts] == [p.output for p in real.turns[0].prompts]
    assert sum(line.endswith(" yes") for line in out.splitlines()) == len(found.entrants) - 1
    assert any(_num_hits(each) for each in found.turns if each.contestant == "all")


def test_a_simulation_comes_out_the_same_every_time(tmp_path: Path) -> None:
    turns = []
    for _ in range(2):
        assert compare.main(flags(tmp_path, "--simulated", "--only", "all", "--force")) == 0
        turns.append(load(tmp_path / "race.json").turns)
    assert turns[0] == turns[1]


def test_the_usual_contestants_can_be_simulated_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [flag for flag in flags(tmp_path, "--simulated") if flag != "--ablation"]
    assert compare.main(given) == 0
    out = capsys.readouterr().out
    assert all(f"\n{name} " in out for name in ("greedy", "chain-auto", "async-chain"))
    assert "left out: transformers: emulated models have no weights" in out
    assert "wasted" not in out


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        (["--command", "x=run {prompts}"], "--simulated cannot simulate a --command"),
        (
            ["--models-config-path", "configs/models/demo.json"],
            "--simulated is for emulated models, and draft-1M is not one",
        ),
        (["--only", "transformers"], "--only: nobody is called transformers; there are greedy,"),
    ],
)
def test_what_cannot_be_simulated_is_one_line(
    given: list[str], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare.main(flags(tmp_path, "--simulated", *given)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert complaint in line
    assert not (tmp_path / "race.json").exists()
