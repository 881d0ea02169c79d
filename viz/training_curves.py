"""Draws how the loss of each model of a family fell while it was trained.

    python -m viz.training_curves DIR/training.json --output loss.png

Reads what `python -m pipespec.demo.train --out DIR` has written. Losses are means over the last
steps, in nats a token: on text, or against the target's distribution where a model is distilled.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run as a file: imports start at the repository
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipespec.commands.arguments import Parser
from pipespec.commands.entry import run_command
from pipespec.errors import DataError, UsageError
from viz.utils import check_output, save

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, slots=True)
class Curve:
    """One model's training: tokens seen, in millions, and the loss at each."""

    name: str
    tokens: tuple[float, ...]
    losses: tuple[float, ...]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    return run_command(lambda: _main(arguments))


def _main(arguments: Sequence[str] | None) -> int:
    parser = Parser(
        prog="python -m viz.training_curves",
        description="Draws the loss of each model of a family over the tokens it was trained on.",
    )
    parser.add_argument("path", type=Path, help="training.json of a training run")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("training-curves.png"),
        help="the picture: .png, .pdf or .svg",
    )
    options = parser.parse_args(arguments)
    check_output(options.output)
    curves = read_curves(options.path)
    save(draw(curves), options.output)
    print(f"{len(curves)} models: {options.output}")
    return 0


def read_curves(path: Path) -> list[Curve]:
    """The curves in a `training.json`, largest model first.

    Raises:
        UsageError: no such file.
        DataError: a file of another kind.
    """
    try:
        records = json.loads(path.read_text(encoding="utf-8"))["models"]
        curves = [
            Curve(
                str(record["name"]),
                tuple(float(tokens) / 1e6 for tokens, _ in record["curve"]),
                tuple(float(loss) for _, loss in record["curve"]),
            )
            for record in records
        ]
        _check(curves)
        return curves
    except OSError as error:
        raise UsageError(f"cannot read {path} ({error.strerror})") from error
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise DataError(f"{path} is not the training.json of a training run") from error


def _check(curves: Sequence[Curve]) -> None:
    """Whether there is something to draw, and where logarithmic axes have a place for it.

    Raises:
        ValueError: there is not.
    """
    if not curves or not all(curve.tokens for curve in curves):
        raise ValueError("no curve, or one without a point")
    if not all(0 < x < math.inf for curve in curves for x in (*curve.tokens, *curve.losses)):
        raise ValueError("a point that is not above 0")


def draw(curves: Sequence[Curve]) -> Figure:
    """One line a model, both axes logarithmic: a power law is straight."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure = Figure(figsize=(7.0, 4.0), layout="constrained")
    axes = figure.subplots()
    for curve in curves:
        axes.plot(curve.tokens, curve.losses, label=curve.name)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("million tokens")
    axes.set_ylabel("loss, nats a token")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


if __name__ == "__main__":
    sys.exit(main())
