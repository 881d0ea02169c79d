"""Draws how long the prompts of a data set and the texts that were written for them are.

    python viz/dataset_lengths.py RESULTS_FOLDER
    python viz/dataset_lengths.py --dataset stdlib --models-config-path configs/models/demo.json

Of result files: prompts and outputs of each data set and target, from the run with most samples.
The original's files do not say how many tokens a prompt has; it is measured in words then. Of a
data set: the prompts, in tokens of the target's tokenizer, with its chat template where it is one
of conversations.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Final

if not __package__:  # run as a file: imports start at the repository
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipespec.checkpoint.locate import locate_tokenizer
from pipespec.commands.arguments import DEFAULT_MODELS_CONFIG
from pipespec.commands.entry import run_command
from pipespec.config import find_models_config, load_models_config
from pipespec.data import load_dataset, prompt_ids
from pipespec.errors import UsageError
from pipespec.tokenizer import load_tokenizer
from viz.utils import (
    Run,
    add_head,
    by_target,
    make_panels,
    make_parser,
    open_output,
    pass_over,
    read,
    style,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_BINS: Final = 24
_COLORS: Final[Mapping[str, str]] = {"prompt": "#56b4e9", "output": "#009e73"}


@dataclass(frozen=True, slots=True)
class Lengths:
    """of: "prompt" or "output". unit: tokens or words."""

    title: str
    of: str
    unit: str
    values: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Text:
    """A sample. num_prompt_tokens: None where the file does not say."""

    num_prompt_tokens: int | None
    num_prompt_words: int
    num_tokens: int


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    return run_command(lambda: _main(arguments))


def _main(arguments: Sequence[str] | None) -> int:
    options = make_lengths_parser().parse_args(arguments)
    if bool(options.paths) == bool(options.dataset):
        raise UsageError("pass result files or --dataset, one of them; see --help")
    output = open_output(options)
    if options.dataset:
        found = [lengths_of_dataset(options)]
    else:
        found = lengths_of_runs(read(options.paths, text_of))
    with style():
        figure = draw(found)
    output.save(figure, "dataset-lengths")
    return 0


def make_lengths_parser() -> argparse.ArgumentParser:
    """All flags of the command."""
    parser = make_parser(
        "dataset_lengths",
        "Draws the lengths of prompts and outputs, of result files or of a data set.",
        needs_paths=False,
    )
    parser.add_argument(
        "--dataset", metavar="NAME", help="as for pipespec.benchmark, instead of result files"
    )
    parser.add_argument(
        "--models-config-path",
        metavar="FILE",
        default=DEFAULT_MODELS_CONFIG,
        help="whose target's tokenizer counts the tokens of --dataset",
    )
    parser.add_argument("--num-samples", type=int, metavar="N", help="of --dataset (default: all)")
    return parser


# -- numbers --------------------------------------------------------------------------------


def text_of(result: Mapping[str, Any]) -> Text:
    """The lengths of a sample."""
    num_prompt_tokens = result.get("num_prompt_tokens")
    return Text(
        None if num_prompt_tokens is None else int(num_prompt_tokens),
        len(result["input_text"].split()),
        int(result["metrics"]["tokens_generated"]),
    )


def lengths_of_runs(runs: Sequence[Run[Text]]) -> list[Lengths]:
    """Prompts and outputs of each data set and target. Strategies write the same texts, so that one
    run has them all: the one with most samples, greedy first."""
    found: list[Lengths] = []
    for title, group in by_target(runs).items():
        texts = max(group, key=lambda run: len(run.samples)).samples  # greedy is the first of all
        counted = [text.num_prompt_tokens for text in texts]
        tokens = tuple(number for number in counted if number is not None)
        if len(tokens) == len(texts):
            found.append(Lengths(title, "prompt", "tokens", tokens))
        else:
            words = tuple(text.num_prompt_words for text in texts)
            found.append(Lengths(title, "prompt", "words", words))
        outputs = tuple(text.num_tokens for text in texts)
        found.append(Lengths(title, "output", "tokens", outputs))
    return found


def lengths_of_dataset(options: argparse.Namespace) -> Lengths:
    """The prompts of a data set, as the target of a models config reads them.

    Raises:
        UsageError: there is no such config, tokenizer or data set.
    """
    config_path = find_models_config(options.models_config_path)
    target = load_models_config(config_path)[-1]
    folder = None
    if target.tokenizer is not None or target.emulated is None:
        folder = locate_tokenizer(target.tokenizer or target.path, config_path.parent)
    tokenizer = load_tokenizer(folder)
    dataset = load_dataset(options.dataset, options.num_samples)
    for warning in dataset.warnings:
        pass_over(f"warning: {warning}")
    values = tuple(len(prompt_ids(sample, tokenizer)) for sample in dataset.samples)
    return Lengths(f"{dataset.name}, tokenizer of {target.name}", "prompt", "tokens", values)


# -- picture --------------------------------------------------------------------------------


def draw(found: Sequence[Lengths]) -> Figure:
    """A histogram each, two beside each other."""
    figure, panels = make_panels(len(found), 2.0)
    for axes, lengths in zip(panels, found):
        _draw_histogram(axes, lengths)
    return figure


def _draw_histogram(axes: Axes, lengths: Lengths) -> None:
    from matplotlib.ticker import MaxNLocator

    values = lengths.values
    num_values = max(values) - min(values) + 1
    width = -(-num_values // min(_MOST_BINS, max(1, round(2 * len(values) ** 0.5))))
    edges = [edge - 0.5 for edge in range(min(values), max(values) + width + 1, width)]
    axes.hist(
        values,
        edges,
        color=_COLORS[lengths.of],
        edgecolor="black",
        linewidth=0.3,
        label=f"{len(values)} texts, median {median(values):g} (dashed), longest {max(values)}",
    )
    axes.axvline(median(values), color="black", ls="--", lw=1)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    if min(values) == max(values):
        axes.set_xlim(values[0] - 5, values[0] + 5)
    axes.set_xlabel(f"{lengths.of} ({lengths.unit})")
    axes.set_ylabel("texts")
    add_head(axes, lengths.title)


if __name__ == "__main__":
    sys.exit(main())
