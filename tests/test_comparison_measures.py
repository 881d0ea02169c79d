"""What a race's tables are made of: rates, ratios within a round, spreads, the same text or not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pipespec.comparison.measures import (
    Spread,
    ratios,
    sameness,
    table_rows,
)
from pipespec.comparison.record import Entrant, PromptResult, Record, Turn, claim, load, save
from pipespec.comparison.tables import print_tables
from pipespec.errors import DataError, UsageError


def turn(
    number: int, contestant: str, seconds: float, variant: str = "", outputs: Sequence[str] = ()
) -> Turn:
    """Two prompts of 10 tokens each, in so many seconds together."""
    keys = [*outputs, None, None]
    results = [PromptResult(i, 10, seconds / 2, output=keys[i]) for i in range(2)]
    return Turn(number, contestant, variant, tuple(results))


def entrant(
    name: str, table: str = "device", kind: str = "own", variants: tuple[str, ...] = ("",)
) -> Entrant:
    settings = {"strategy": name} if kind == "own" else {}
    return Entrant(f"{name}@{table}", name, kind, (table,), (), (), settings, variants)


def record(entrants: list[Entrant], turns: list[Turn], **metadata: Any) -> Record:
    values = {
        "emulated": False,
        "models": [{"path": "meta/Small"}, {"path": "meta/Large"}],
        "dataset": "set",
        "num_samples": 2,
        "max_new_tokens": 10,
        "sampling": {"temperature": 0.0},
        "load_average_before": [0.2, 0.5, 3.0],
        "tables": {"device": "core 1", "total": "everyone has cores 0, 1"},
        **metadata,
    }
    return Record(values, entrants, turns)


def printed(race: Record) -> str:
    out = StringIO()
    print_tables(race, Console(file=out, width=100))
    return out.getvalue()


# -- rates ------------------------------------------------------------------------------------


def test_a_rate_is_all_tokens_by_all_time() -> None:
    prompts = (PromptResult(0, 30, 1.0), PromptResult(1, 10, 3.0))
    assert Turn(1, "x", "", prompts).tokens_per_s == pytest.approx(10.0)


def test_decode_leaves_out_the_first_tokens_and_their_time() -> None:
    prompts = (
        PromptResult(0, 21, 3.0, first_token_s=1.0, num_first_tokens=1),
        PromptResult(1, 14, 2.0, first_token_s=1.0, num_first_tokens=4),
    )
    assert Turn(1, "x", "", prompts).decode_tokens_per_s == pytest.approx(30 / 3)


def test_who_does_not_tell_of_the_first_token_has_no_decode_rate() -> None:
    known = PromptResult(0, 21, 3.0, first_token_s=1.0, num_first_tokens=1)
    assert Turn(1, "x", "", (known, PromptResult(1, 21, 3.0))).decode_tokens_per_s is None


def test_all_in_one_token_has_no_decode_rate() -> None:
    only = PromptResult(0, 1, 0.5, first_token_s=0.5, num_first_tokens=1)
    assert Turn(1, "x", "", (only,)).decode_tokens_per_s is None


# -- ratios -----------------------------------------------------------------------------------


def test_a_ratio_compares_turns_of_the_same_round() -> None:
    """The machine was twice as slow in round 2, for both."""
    greedy = [turn(1, "g", 2.0), turn(2, "g", 4.0)]
    assert ratios([turn(1, "x", 1.0), turn(2, "x", 2.0)], greedy) == pytest.approx([2.0, 2.0])


def test_a_round_without_greedy_has_no_ratio() -> None:
    assert ratios([turn(1, "x", 1.0), turn(2, "x", 1.0)], [turn(2, "g", 3.0)]) == pytest.approx([3])


def test_the_median_is_of_ratios_and_not_a_ratio_of_medians() -> None:
    greedy = [turn(1, "greedy@device", 1.0), turn(2, "greedy@device", 2.0)]
    greedy += [turn(3, "greedy@device", 8.0)]
    other = [turn(1, "chain@device", 1.0), turn(2, "chain@device", 1.0)]
    other += [turn(3, "chain@device", 2.0)]
    race = record([entrant("greedy"), entrant("chain")], [*greedy, *other])
    row = table_rows(race, "device")[1]
    assert row.ratio == Spread(2.0, 1.0, 4.0)
    assert row.tokens_per_s == Spread(20.0, 10.0, 20.0)


def test_without_greedy_there_are_speeds_and_no_ratios() -> None:
    race = record([entrant("chain")], [turn(1, "chain@device", 2.0)])
    (row,) = table_rows(race, "device")
    assert (row.ratio, row.sameness) == (None, None)
    assert "10.0" in printed(race)


def test_each_table_has_its_own_greedy() -> None:
    entrants = [entrant("greedy"), entrant("greedy", "total")]
    entrants += [Entrant("async-chain", "async-chain", "own", ("device", "total"), (), (), {})]
    turns = [turn(1, "greedy@device", 4.0), turn(1, "greedy@total", 2.0)]
    race = record(entrants, [*turns, turn(1, "async-chain", 1.0)])
    found = {table: table_rows(race, table)[1].ratio for table in ("device", "total")}
    assert found == {"device": Spread(4.0, 4.0, 4.0), "total": Spread(2.0, 2.0, 2.0)}


def test_the_best_variant_is_in_the_table_and_all_are_told_below() -> None:
    rates = ((4, 1.0), (2, 2.0))
    turns = [turn(n, "chain@device", s, f"lookahead {k}") for n in (1, 2) for k, s in rates]
    race = record([entrant("chain", variants=("lookahead 2", "lookahead 4"))], turns)
    (row,) = table_rows(race, "device")
    assert (row.variant, row.tokens_per_s) == ("lookahead 4", Spread(20.0, 20.0, 20.0))
    text = printed(race)
    assert "chain, lookahead 4" in text
    assert "chain@device: the best of lookahead 2: 10.0, lookahead 4: 20.0 tokens/s" in text


def test_who_is_faster_with_less_hardware_is_told() -> None:
    entrants = [entrant("chain"), entrant("chain", "total")]
    turns = [turn(1, "chain@device", 1.0), turn(1, "chain@total", 2.0)]
    lines = printed(record(entrants, turns)).splitlines()
    assert "chain@total: faster with the target's device alone, 20.0" in lines


def test_who_has_no_turn_has_a_line_instead_of_a_row() -> None:
    gone = entrant("transformers", kind="transformers")
    gone.left_out = "emulated models have no weights that transformers could load"
    race = record([entrant("greedy"), gone], [turn(1, "greedy@device", 1.0)])
    assert [row.entrant.name for row in table_rows(race, "device")] == ["greedy"]
    text = printed(race)
    assert "left out: transformers@device: emulated models have no weights" in text
    assert "Same total hardware" not in text


def test_tables_of_emulated_models_say_so() -> None:
    turns = [turn(1, "greedy@device", 1.0)]
    title = printed(record([entrant("greedy")], turns, emulated=True)).splitlines()[0]
    assert title == "EMULATED: Same device for the target: core 1"


def test_a_busy_machine_is_told() -> None:
    turns = [turn(1, "greedy@device", 1.0)]
    assert "busy" not in printed(record([entrant("greedy")], turns))
    text = printed(record([entrant("greedy")], turns, load_average_before=[2.14, 1.0, 1.0]))
    assert "a busy machine: load average 2.1 before the race; repeat it on an idle one" in text


# -- the same text ----------------------------------------------------------------------------

OUTPUTS: dict[str, dict[str, Any]] = {
    "a": {"token_ids": [1, 2, 3], "text": "abc"},
    "b": {"token_ids": [1, 2, 9], "text": "abz"},
    "ids": {"token_ids": [1, 2, 3]},
    "text": {"text": "abc"},
    "typo": {"text": "axc"},
    "short": {"token_ids": [1]},
}


@pytest.mark.parametrize("other", ["a", "ids", "text"])
def test_the_same_text_is_the_same_ids_or_where_there_are_none_the_same_characters(
    other: str,
) -> None:
    greedy = [turn(1, "g", 1.0, outputs=("a", "b"))]
    found = sameness([turn(1, "x", 1.0, outputs=(other, "b"))], greedy, OUTPUTS)
    assert found is not None
    assert (found.num_compared, found.num_equal, found.first) == (2, 2, None)


@pytest.mark.parametrize(
    ("other", "position", "unit"),
    [("b", 2, "token"), ("short", 1, "token"), ("typo", 1, "char")],
)
def test_a_difference_is_told_with_its_first_place(other: str, position: int, unit: str) -> None:
    greedy = [turn(1, "g", 1.0, outputs=("a", "a"))]
    found = sameness([turn(1, "x", 1.0, outputs=("a", other))], greedy, OUTPUTS)
    assert found is not None
    assert (found.num_compared, found.num_equal) == (2, 1)
    assert found.first is not None
    assert (found.first.index, found.first.position, found.first.unit) == (1, position, unit)


def test_one_differing_round_is_enough() -> None:
    turns = [turn(1, "x", 1.0, outputs=("a", "a")), turn(2, "x", 1.0, outputs=("a", "b"))]
    found = sameness(turns, [turn(1, "g", 1.0, outputs=("a", "a"))], OUTPUTS)
    assert found is not None
    assert found.num_equal == 1


def test_a_slow_variant_must_write_the_same_text_too() -> None:
    greedy = turn(1, "greedy@device", 1.0, outputs=("a", "a"))
    fast = turn(1, "chain@device", 1.0, "lookahead 4", outputs=("a", "a"))
    slow = turn(1, "chain@device", 9.0, "lookahead 8", outputs=("a", "b"))
    chain = entrant("chain", variants=("lookahead 4", "lookahead 8"))
    race = record([entrant("greedy"), chain], [greedy, fast, slow])
    race.outputs = OUTPUTS
    assert "1/2, token 2" in printed(race)


def test_who_draws_other_noise_is_not_compared() -> None:
    entrants = [entrant("greedy"), entrant("chain"), entrant("transformers", kind="transformers")]
    turns = [turn(1, e.key, 1.0, outputs=("a", "b")) for e in entrants]
    race = record(entrants, turns, sampling={"temperature": 0.8})
    race.outputs = OUTPUTS
    found = [row.sameness is not None for row in table_rows(race, "device")]
    assert found == [True, True, False]


# -- the file ---------------------------------------------------------------------------------


def test_a_race_comes_back_from_its_file_as_it_was(tmp_path: Path) -> None:
    race = record([entrant("greedy")], [turn(1, "greedy@device", 1.0)])
    key = race.store([1, 2], "ab")
    assert race.store([1, 2], "ab") == key
    assert race.store(None, None) is None
    save(race, tmp_path / "race.json")
    assert load(tmp_path / "race.json") == race
    (stored,) = json.loads((tmp_path / "race.json").read_text())["turns"]
    assert (stored["tokens_per_s"], stored["decode_tokens_per_s"]) == (20.0, None)
    assert [path.name for path in tmp_path.iterdir()] == ["race.json"]


@pytest.mark.parametrize("key", ["tables", "models", "sampling", "dataset"])
def test_a_file_whose_metadata_lack_a_key_is_refused(key: str, tmp_path: Path) -> None:
    path = tmp_path / "race.json"
    save(record([entrant("greedy")], [turn(1, "greedy@device", 1.0)]), path)
    content = json.loads(path.read_text())
    del content["metadata"][key]
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=f"not a whole file of a race .*{key}"):
        load(path)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{", "is not JSON"),
        ("[]", "is not the file of a race"),
        ('{"metadata": {}, "results": []}', "is not the file of a race"),
        ('{"kind": "race", "schema_version": 99}', "has another schema version"),
        ('{"kind": "race", "schema_version": 1, "metadata": {}}', "is not a whole file"),
    ],
)
def test_another_file_is_refused(content: str, complaint: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(DataError, match=complaint):
        load(tmp_path / "x.json")


def test_a_turn_that_lacks_a_key_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "race.json"
    save(record([entrant("greedy")], [turn(1, "greedy@device", 1.0)]), path)
    content = json.loads(path.read_text())
    del content["turns"][0]["prompts"][0]["seconds"]
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match="not a whole file of a race"):
        load(path)


def test_a_file_is_claimed_before_any_time_is_spent(tmp_path: Path) -> None:
    there, blocked = tmp_path / "there.json", tmp_path / "there.json" / "below.json"
    there.write_text("precious")
    with pytest.raises(UsageError, match="is there already; name another, or pass --force"):
        claim(there, force=False)
    claim(there, force=True)
    assert there.read_text() == "precious"
    with pytest.raises(UsageError, match=r"^--output: cannot write "):
        claim(blocked, force=False)
    claim(tmp_path / "new" / "race.json", force=False)
