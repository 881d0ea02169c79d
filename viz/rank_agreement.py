"""Draws what outcomes and trees gain, by how often a correction is the draft's second choice.

    python -m viz.rank_agreement --models-config-path configs/models/emulated-h100-70b.json

For emulated models: published runs do not tell which rank a draft gives to the token that corrects
it, so that their configs have the shape of the demo family. Here the share of the second rank goes
over a range, and the ranks below it keep their proportions. Everything is simulated. No torch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

if not __package__:  # run as a file: imports start at the repository
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipespec.commands.arguments import Parser
from pipespec.commands.display import Display, make_console
from pipespec.commands.entry import run_command
from pipespec.comparison.ablation import TREE
from pipespec.config import ModelConfig, Schedule, find_models_config, load_models_config
from pipespec.emulation.oracle import DEMO_RANK_EXPONENT
from pipespec.errors import UsageError
from pipespec.planning.search import CHAIN_LOOKAHEADS
from pipespec.planning.system import Choice, System, emulated_system
from pipespec.results.labels import COLORS
from pipespec.simulate.prediction import Prediction, Workload, emulations_of
from viz.utils import check_output, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHARES: Final = tuple(tenths / 10 for tenths in range(1, 10))
DEMO_SHARE: Final = 1.0 - 2.0**-DEMO_RANK_EXPONENT
NO_OUTCOMES: Final = Schedule(outcomes=0)
SCHEDULES: Final = {
    "2 outcomes": Schedule(outcomes=2),
    f"{Schedule().outcomes} outcomes, the default": Schedule(),
    f"{Schedule().outcomes} outcomes and a tree of {TREE}": Schedule(tree=TREE),
}
_COLORS: Final = ("#92c5de", "#2166ac", "#4d9221")
_DEMO_COLOR: Final = "#666666"
_VOCAB_SIZE: Final = 4096


@dataclass(frozen=True, slots=True)
class Point:
    """speed_up: over greedy. hit_rate: of the draft before the target; None if it was never
    corrected."""

    share: float
    speed_up: float
    hit_rate: float | None


@dataclass(frozen=True, slots=True)
class Panel:
    """One config. chain, no_outcomes: speed-up over greedy of the best chain, and of async-chain
    without outcomes, which no rank matters to. curves: by label."""

    name: str
    chain: float
    no_outcomes: float
    curves: dict[str, tuple[Point, ...]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    return run_command(lambda: _main(arguments))


def _main(arguments: Sequence[str] | None) -> int:
    options = make_parser().parse_args(arguments)
    for flag, value in (("num-texts", options.num_texts), ("new-tokens", options.new_tokens)):
        if value < 1:
            raise UsageError(f"--{flag} is {value}; it must be a positive integer")
    check_output(options.output)
    paths = [find_models_config(text) for text in options.models_config_path]
    configs = [(path.stem, load_models_config(path)) for path in paths]
    for name, models in configs:  # all of them, before the first takes its time
        _check(name, models)
    workload = Workload(options.num_texts, new_tokens=options.new_tokens)
    with Display(make_console(stderr=True)).news() as news:
        panels = [simulate(name, models, workload, news) for name, models in configs]
    save(draw(panels, workload), options.output)
    names = ", ".join(panel.name for panel in panels)
    print(f"{names}, emulated and simulated: {options.output}")
    return 0


def make_parser() -> Parser:
    """All flags of the command."""
    parser = Parser(
        prog="python -m viz.rank_agreement",
        description="Draws the simulated speed of emulated models by the share of corrections that "
        "the draft ranks second.",
    )
    parser.add_argument(
        "--models-config-path", nargs="+", required=True, metavar="FILE", help="a panel each"
    )
    parser.add_argument("--num-texts", type=int, default=4, metavar="N", help="to write")
    parser.add_argument("--new-tokens", type=int, default=200, metavar="N", help="of each text")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("rank-agreement.png"),
        help="the picture: .png, .pdf or .svg",
    )
    return parser


# -- simulation -----------------------------------------------------------------------------


def simulate(
    name: str,
    models: Sequence[ModelConfig],
    workload: Workload,
    on_progress: Callable[[str], None] = lambda _what: None,
) -> Panel:
    """Everything that a panel shows."""
    on_progress(f"simulating {name}: greedy and chain")
    system = _system(models, workload)
    greedy = system.predict(Choice((system.target,), "greedy")).tokens_per_s
    chains = [_predict(system, "chain", Schedule(lookahead=n)) for n in CHAIN_LOOKAHEADS]
    without = _predict(system, "async-chain", NO_OUTCOMES)
    curves: dict[str, list[Point]] = {label: [] for label in SCHEDULES}
    for share in SHARES:
        on_progress(f"simulating {name}: {share:.0%} of corrections ranked second")
        system = _system([_with_share(model, share) for model in models], workload)
        for label, schedule in SCHEDULES.items():
            found = _predict(system, "async-chain", schedule)
            curves[label].append(Point(share, found.tokens_per_s / greedy, found.outcome_hit_rate))
    return Panel(
        name,
        max(chain.tokens_per_s for chain in chains) / greedy,
        without.tokens_per_s / greedy,
        {label: tuple(points) for label, points in curves.items()},
    )


def _check(name: str, models: Sequence[ModelConfig]) -> None:
    """Whether a config has what its panel shows.

    Raises:
        UsageError: there is no draft.
        ConfigError: a model is not emulated, or its emulation is wrong.
    """
    if len(models) < 2:
        raise UsageError(f"--models-config-path: {name} has no draft, so nothing is corrected")
    emulations_of(models)


def _system(models: Sequence[ModelConfig], workload: Workload) -> System:
    return emulated_system(models, workload.submits(), _VOCAB_SIZE)


def _with_share(model: ModelConfig, share: float) -> ModelConfig:
    """The target has no second choice that matters; it may have the key like its drafts."""
    assert model.emulated is not None, "the system was made of emulated models"
    return replace(model, emulated={**model.emulated, "second_share": share})


def _predict(system: System, strategy: str, schedule: Schedule) -> Prediction:
    return system.predict(Choice(tuple(range(len(system.models))), strategy, schedule))


# -- picture --------------------------------------------------------------------------------


def draw(panels: Sequence[Panel], workload: Workload) -> Figure:
    """Speed-up above, hit rate below, a column a config."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.6 + 3.8 * len(panels), 6.4), layout="constrained")
    grid = figure.subplots(2, len(panels), squeeze=False, sharex=True, height_ratios=(3, 2))
    for column, panel in enumerate(panels):
        _draw_speeds(grid[0][column], panel)
        _draw_hit_rates(grid[1][column], panel)
    grid[0][0].set_ylabel("tokens/s over greedy's")
    grid[1][0].set_ylabel("hit rate")
    handles, labels = grid[0][0].get_legend_handles_labels()
    num_columns = len(labels) if len(panels) > 2 else 2
    figure.legend(handles, labels, loc="outside lower center", ncols=num_columns, frameon=False)
    figure.suptitle(
        "SIMULATED, EMULATED: what prepared outcomes gain\n"
        f"{workload.num_texts} texts of {workload.new_tokens} tokens",
        fontsize=11,
    )
    return figure


def _draw_speeds(axes: Axes, panel: Panel) -> None:
    for color, (label, points) in zip(_COLORS, panel.curves.items(), strict=True):
        axes.plot(
            [point.share for point in points],
            [point.speed_up for point in points],
            color=color,
            marker="o",
            ms=4,
            label=label,
        )
    axes.axhline(panel.no_outcomes, color="black", lw=1.2, ls="--", label="no outcomes")
    axes.axhline(panel.chain, color=COLORS["chain"], lw=1.2, ls="--", label="the best chain")
    axes.set_title(panel.name, fontsize=10)
    axes.set_ylim(min(1.0, panel.chain, panel.no_outcomes))
    _mark_demo(axes)


def _draw_hit_rates(axes: Axes, panel: Panel) -> None:
    for color, points in zip(_COLORS, panel.curves.values(), strict=True):
        known = [(p.share, p.hit_rate) for p in points if p.hit_rate is not None]
        axes.plot(*zip(*known), color=color, marker="o", ms=4)
    axes.set_ylim(0, 1)
    axes.set_xlabel("share of corrections ranked second")
    axes.text(DEMO_SHARE + 0.01, 0.04, "demo family", fontsize=9, color=_DEMO_COLOR)
    _mark_demo(axes)


def _mark_demo(axes: Axes) -> None:
    axes.axvline(DEMO_SHARE, color=_DEMO_COLOR, lw=1, ls=":")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    sys.exit(main())
