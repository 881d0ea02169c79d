"""The picture of a race: the tables' numbers, side by side."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from processes import assert_draws_without_torch
from test_comparison_measures import entrant, record, turn

from pipespec.comparison.record import save
from viz.race import draw, main, read_tables


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Two rounds of greedy and chain in both tables."""
    names, tables = ("greedy", "chain"), ("device", "total")
    entrants = [entrant(name, table) for table in tables for name in names]
    seconds = {"greedy": 2.0, "chain": 1.0}
    turns = [turn(n, e.key, n * seconds[e.name]) for n in (1, 2) for e in entrants]
    save(record(entrants, turns), tmp_path / "race.json")
    return tmp_path / "race.json"


def test_bars_are_medians_and_whiskers_reach_from_slowest_to_fastest() -> None:
    entrants = [entrant("greedy"), entrant("chain")]
    turns = [turn(n, e.key, seconds) for e in entrants for n, seconds in ((1, 1.0), (2, 2.0))]
    race = record(entrants, turns)
    (axes,) = draw(race, read_tables(race, Path("x"))).axes
    assert [patch.get_width() for patch in axes.patches] == [15.0, 15.0]  # type: ignore[attr-defined]
    assert "20.0" in str(max(line.get_xdata()[-1] for line in axes.lines))  # type: ignore[index]
    assert [text.get_text() for text in axes.texts] == [" 1.00x (1.00-1.00)"] * 2


def test_the_command_draws_without_torch(path: Path) -> None:
    assert_draws_without_torch("viz.race", path, "4 bars")


def test_a_file_without_turns_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "race.json"
    save(record([entrant("greedy")], [turn(1, "greedy@device", 1.0)]), path)
    path.write_text(json.dumps({**json.loads(path.read_text()), "turns": []}))
    assert main([str(path)]) == 2
    assert "holds no turn of anyone" in capsys.readouterr().err
