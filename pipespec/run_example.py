"""`python -m pipespec.run_example`: writes one sample's text to the terminal as it is generated.

Standard output gets the prompt and the text, stderr everything else.
"""

from __future__ import annotations

import contextlib
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace

from pipespec.commands.arguments import (
    Parser,
    add_engine_arguments,
    add_generation_arguments,
    add_input_arguments,
    add_trace_argument,
)
from pipespec.commands.display import Display, make_console
from pipespec.commands.entry import configure_logging, library_errors, run_command
from pipespec.commands.inputs import Prompt, check_length, read_inputs
from pipespec.commands.settings import (
    DEFAULT_READY_TIMEOUT_S,
    Settings,
    open_decoder,
    open_models,
    read_settings,
)
from pipespec.commands.tracing import noted, tracing
from pipespec.config import STRATEGIES
from pipespec.decoding import Generation, Hierarchy
from pipespec.errors import DataError, UsageError
from pipespec.metrics import StageCounts
from pipespec.metrics.definitions import acceptance_rate


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    return run_command(lambda: _run_example(make_parser().parse_args(arguments)))


def make_parser() -> Parser:
    """All flags of the command."""
    parser = Parser(
        prog="python -m pipespec.run_example",
        description="Generates one text and shows it as it comes. Every flag may be written with "
        "hyphens or underscores.",
    )
    add_input_arguments(parser, STRATEGIES, "async-chain")
    group = parser.add_argument_group("the prompt")
    group.add_argument(
        "--sample-index", type=int, metavar="N", default=0, help="of the data set, from 0"
    )
    group.add_argument("--prompt", metavar="TEXT", help="this text instead of a sample")
    add_generation_arguments(parser)
    add_engine_arguments(parser, DEFAULT_READY_TIMEOUT_S)
    add_trace_argument(parser)
    return parser


def _run_example(options: Namespace) -> int:
    configure_logging(options.verbose)
    settings = read_settings(options)
    display = Display(make_console(stderr=True))
    hierarchy, prompt = _read_prompt(options, settings, display)
    (strategy,) = settings.strategies
    with contextlib.ExitStack() as models:
        models.enter_context(library_errors(strategy))
        trace = models.enter_context(tracing(options.trace, display))
        settings = replace(settings, trace=trace)
        with display.loading(strategy, settings.models) as on_progress:
            decoder = open_decoder(strategy, hierarchy, settings, on_progress)
            models.callback(decoder.close)
        make_console().print(prompt.text, style="dim", end="", markup=False, soft_wrap=True)
        with noted(trace, f"sample {prompt.index}"):
            output = decoder.generate(prompt.ids, settings.generation, _write)
        _write("\n")
    display.line("")
    display.line(describe(strategy, output))
    return 0


def _read_prompt(
    options: Namespace, settings: Settings, display: Display
) -> tuple[Hierarchy, Prompt]:
    """The user's own text, else a sample of the data set, with notes on it.

    Raises:
        UsageError: there is no such sample, or it does not fit.
    """
    if options.prompt is not None:
        if settings.is_dataset_given:
            raise UsageError("--prompt and --dataset exclude each other; pass one of them")
        hierarchy = open_models(settings)
        ids = hierarchy.tokenizer.encode(options.prompt)
        check_length("--prompt", ids, hierarchy)
        return hierarchy, Prompt(0, options.prompt, tuple(ids))
    index: int = options.sample_index
    if index < 0:
        raise UsageError(f"--sample-index is {index}; it must be 0 or more")
    inputs = read_inputs(settings, index + 1)
    if index >= len(inputs.prompts):
        raise DataError(
            f"--sample-index is {index}, but {inputs.dataset.source} has only "
            f"{len(inputs.prompts)} samples"
        )
    for warning in inputs.warnings:
        display.line(f"note: {warning}")
    return inputs.hierarchy, inputs.prompts[index]


def describe(strategy: str, output: Generation) -> str:
    """One line on a finished text: tokens, speed and, of a hierarchy, acceptance by pair."""
    num_tokens = len(output.token_ids)
    parts = [
        f"{strategy}: {num_tokens} tokens ({output.finish_reason})",
        f"{output.ms_per_token:.2f} ms/token",
        f"{1000 / output.ms_per_token:,.1f} tokens/s",
    ]
    counts = [StageCounts.from_values(values) for values in output.counts]
    rates = [acceptance_rate(stage.num_accepted, stage.num_offered) for stage in counts[1:]]
    if rates:
        shown = " ".join("-" if rate is None else f"{rate:.3f}" for rate in rates)
        parts.append(f"acceptance rate {shown}")
    return ", ".join(parts)


def _write(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
