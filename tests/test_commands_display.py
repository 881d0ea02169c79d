"""What a person sees: a table that fits, a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import io
import itertools
from typing import Any

import pytest
from rich.console import Console

from pipespec.commands import display as display_module
from pipespec.commands.display import Display
from pipespec.commands.tables import TableRow, summary_table
from pipespec.config import ModelConfig
from pipespec.stage_process import StageStatus

MODELS = (ModelConfig("org/small", ("cpu",)), ModelConfig("org/large", ("cpu",)))


def console(*, is_terminal: bool, width: int = 80) -> tuple[Console, io.StringIO]:
    written = io.StringIO()
    made = Console(file=written, force_terminal=is_terminal, width=width, highlight=False)
    return made, written


def result(strategy: str, num_pairs: int, total_time_s: float) -> dict[str, Any]:
    """A sample of 100 tokens, at speeds that take as much room as they ever do."""
    counts = {
        "accepted_tokens": [[4] * 9] * num_pairs,
        "num_offered": [200] * num_pairs,
        "num_accepted": [99] * num_pairs,
        "model_times": [[total_time_s]] * (num_pairs + 1),
    }
    metrics = {
        "total_time": total_time_s,
        "tokens_generated": 100,
        "time_to_first_token_s": 0.1234,
        **(counts if num_pairs else {"token_times": [total_time_s]}),
    }
    return {
        "sample_index": 0,
        "strategy": strategy,
        "metrics": metrics,
        "input_text": "prompt",
        "output_text": "text",
        "gpustats": [],
    }


@pytest.mark.parametrize(("num_pairs", "width"), [(1, 80), (2, 80), (1, 120), (3, 120)])
def test_the_table_fits_its_terminal(num_pairs: int, width: int) -> None:
    greedy = [result("greedy", 0, 0.01)]
    rows = [
        TableRow("greedy", greedy, greedy, frozenset()),
        TableRow("chain", [result("chain", num_pairs, 0.02)], greedy, frozenset()),
        TableRow("async-chain", [result("async", num_pairs, 0.005)], greedy, frozenset({0})),
    ]
    made, written = console(is_terminal=False, width=width)
    made.print(summary_table(rows, made.width))
    text = written.getvalue()
    lines = text.splitlines()
    assert "…" not in text
    assert max(map(len, lines)) <= width
    rates = ["0.495"] * num_pairs
    greedy_cells = "greedy 10,000.0 0.10 123.4 ms 1.00x - - -"
    assert lines[-3].split() == greedy_cells.split()
    chain = ["chain", "5,000.0", "0.20", "123.4", "ms", "0.50x", *rates, *["4.00"] * num_pairs]
    assert lines[-2].split() == [*chain, "yes"]
    assert lines[-1].split()[-2:] == ["no,", "0/1"]


def test_what_is_unknown_is_a_dash() -> None:
    run = [result("chain", 1, 0.02)]
    run[0]["metrics"] |= {"num_offered": [0], "num_accepted": [0]}
    cells = TableRow("chain", run, (), frozenset()).cells()
    for header in ("speed-up", "acceptance\nrate", "same text\nas greedy"):
        assert cells[header] == "-"


def with_devices(run: dict[str, Any], *utilizations: float) -> dict[str, Any]:
    run["metrics"] |= {"energy_j": 123.4, "mean_utilization": list(utilizations)}
    return run


@pytest.mark.parametrize("num_models", [2, 3])
@pytest.mark.parametrize("width", [80, 100, 140])
def test_energy_and_utilization_have_columns_where_they_are_known(
    num_models: int, width: int
) -> None:
    greedy = [with_devices(result("greedy", 0, 4.56), 99.4)]
    run = [with_devices(result("chain", num_models - 1, 2.34), *[100.0, 9.6, 55.0][:num_models])]
    rows = [
        TableRow("greedy", greedy, greedy, frozenset()),
        TableRow("async-chain", run, greedy, frozenset()),
    ]
    made, written = console(is_terminal=False, width=width)
    made.print(summary_table(rows, made.width))
    lines = written.getvalue().splitlines()
    assert "…" not in written.getvalue()
    assert max(map(len, lines)) <= width
    words = " ".join(lines).split()
    for word in ("tokens/s", "42.7", "1.95x", "0.495", "4.00", "1.23", "99", "100", "10", "yes"):
        assert word in words, word
    assert ("23.40" in words) == (num_models == 2 or width > 80)  # ms/token says it again


def test_stages_that_share_their_device_have_one_utilization() -> None:
    cells = TableRow(
        "chain", [with_devices(result("chain", 1, 0.1), 98.7, 98.7)], (), frozenset()
    ).cells()
    assert cells["utilization\n(%)"] == "99"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every look at the clock finds it ten seconds later, so that everything is redrawn."""
    ticks = itertools.count(0.0, 10.0)
    monkeypatch.setattr(display_module.time, "monotonic", lambda: next(ticks))


@pytest.mark.usefixtures("clock")
def test_on_a_terminal_a_bar_counts_samples() -> None:
    made, written = console(is_terminal=True)
    with Display(made).samples("chain", num_done=2, num_samples=6) as progress:
        progress.on_text("abcd")
        progress.on_sample(num_tokens=10, seconds=0.5)
    text = written.getvalue()
    assert "2/6" in text
    assert "4 characters of the next" in text
    assert "3/6" in text
    assert "20.0 tokens/s" in text


@pytest.mark.usefixtures("clock")
def test_elsewhere_progress_is_a_line_now_and_then() -> None:
    made, written = console(is_terminal=False)
    with Display(made).samples("chain", num_done=2, num_samples=6) as progress:
        progress.on_text("abcd")
        progress.on_sample(num_tokens=10, seconds=0.5)
    assert written.getvalue().splitlines() == [
        "chain: 2/6 samples, 4 characters of the next",
        "chain: 3/6 samples, 20.0 tokens/s",
    ]


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("is_terminal", [True, False])
def test_every_stage_says_where_it_stands_while_models_load(is_terminal: bool) -> None:
    made, written = console(is_terminal=is_terminal)
    with Display(made).loading("async-chain", MODELS) as on_progress:
        for phases in (("starting", "loading"), ("ready", "loading")):
            on_progress(
                tuple(
                    StageStatus(index, model.name, 1, phase, 1.5)
                    for index, (model, phase) in enumerate(zip(MODELS, phases, strict=True))
                )
            )
    text = written.getvalue()
    assert "async-chain: loading small large" in text
    for part in ("stage 0 (small): starting", "stage 0 (small): ready", "stage 1 (large): loading"):
        assert part in text
    if not is_terminal:
        assert text.count("stage 1 (large): loading") == 1


def test_a_model_that_loads_for_long_is_mentioned_again() -> None:
    made, written = console(is_terminal=False)
    with Display(made).loading("async-chain", MODELS) as on_progress:
        for elapsed_s in (1.0, 2.0, 40.0):
            on_progress((StageStatus(0, "small", 1, "loading", elapsed_s),))
    assert written.getvalue().splitlines()[1:] == [
        "async-chain: stage 0 (small): loading, 1.0 s",
        "async-chain: stage 0 (small): loading, 40.0 s",
    ]


def test_a_terminal_gets_prose_between_words_and_paths_and_commands_whole() -> None:
    path = "/results/" + 30 * "x"
    prose = f"draft does not pay: it is slow, see {path}"
    made, written = console(is_terminal=True, width=24)
    Display(made).line(prose)
    lines = written.getvalue().splitlines()
    assert lines == ["draft does not pay: it", "is slow, see", path]
    made, written = console(is_terminal=True, width=24)
    Display(made).command("python -m pipespec.benchmark --dataset stdlib")
    assert written.getvalue() == "python -m pipespec.benchmark --dataset stdlib\n"


def test_elsewhere_a_line_is_a_line() -> None:
    made, written = console(is_terminal=False, width=24)
    Display(made).line("draft does not pay: without it it would be faster")
    assert written.getvalue() == "draft does not pay: without it it would be faster\n"
