"""`python -m pipespec.run_example`: writes one sample's text to the terminal as it is generated.

Standard output gets the prompt and the text (with `--show-acceptance`, a legend before them),
stderr everything else.
"""

from __future__ import annotations

import contextlib
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Final

from pipespec.commands.acceptance import AcceptanceView, painter
from pipespec.commands.arguments import (
    Parser,
    add_engine_arguments,
    add_generation_arguments,
    add_input_arguments,
    add_trace_argument,
)
from pipespec.commands.display import Display, make_console
from pipespec.commands.entry import configure_logging, library_errors, run_command
from pipespec.commands.inputs import Prompt, make_prompt, prefill_notes, prefill_of, read_inputs
from pipespec.commands.settings import (
    DEFAULT_READY_TIMEOUT_S,
    Settings,
    open_decoder,
    open_models,
    read_settings,
)
from pipespec.commands.tracing import noted, tracing
from pipespec.config import STRATEGIES
from pipespec.data import Sample
from pipespec.decoding import Generation, Hierarchy
from pipespec.errors import UsageError
from pipespec.metrics import StageCounts
from pipespec.metrics.definitions import acceptance_rate

DEFAULT_PREFILL: Final = 4096  # the original's


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
    add_input_arguments(
        parser,
        STRATEGIES,
        "async-chain",
        default_prefill=f"of samples {DEFAULT_PREFILL}, or what the context has room for",
    )
    group = parser.add_argument_group("the prompt")
    group.add_argument(
        "--sample-index", type=int, metavar="N", default=0, help="of the data set, from 0"
    )
    group.add_argument("--prompt", metavar="TEXT", help="this text instead of a sample")
    group.add_argument(
        "--use-basic-template",
        action="store_true",
        help="write a conversation as USER: and ASSISTANT: instead of with the chat template",
    )
    group = parser.add_argument_group("what is shown")
    group.add_argument(
        "--show-acceptance",
        action="store_true",
        help="tell drafted tokens, corrections and bonus tokens apart: by colours on a terminal, "
        "by marks elsewhere and with NO_COLOR",
    )
    add_generation_arguments(parser)
    add_engine_arguments(parser, DEFAULT_READY_TIMEOUT_S)
    add_trace_argument(parser)
    return parser


def _run_example(options: Namespace) -> int:
    configure_logging(options.verbose)
    settings = replace(
        read_settings(options),
        default_prefill=DEFAULT_PREFILL if options.prompt is None else None,
        is_basic_template=options.use_basic_template,
    )
    _check_flags(options, settings)
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
        console, view = make_console(), None
        listeners: dict[str, Callable[..., Any]] = {"on_text": _write}
        if options.show_acceptance:
            view = AcceptanceView(hierarchy.tokenizer, painter(console), _write)
            listeners = {"on_text": view.on_text, "on_tokens": view.on_tokens}
            _write(f"{view.legend}\n\n")
        console.print(prompt.text, style="dim", end="", markup=False, soft_wrap=True)
        with noted(trace, f"sample {prompt.index}"):
            output = decoder.generate(prompt.ids, settings.generation, **listeners)
        _write("\n")
    display.line("")
    display.line(describe(strategy, output))
    if view is not None:
        display.line(view.summary)
    return 0


def _check_flags(options: Namespace, settings: Settings) -> None:
    """Flags against each other.

    Raises:
        UsageError: naming two that exclude each other.
    """
    if options.show_acceptance and settings.strategies == ("greedy",):
        raise UsageError(
            "--show-acceptance is for chain and async-chain: greedy has no draft to accept; "
            "leave the flag out, or pass another --strategy"
        )
    if options.prompt is not None and settings.is_dataset_given:
        raise UsageError("--prompt and --dataset exclude each other; pass one of them")
    if options.prompt is not None and options.use_basic_template:
        raise UsageError(
            "--use-basic-template is for conversations, and --prompt is fed as it stands; pass "
            "one of them"
        )
    if options.sample_index < 0:
        raise UsageError(f"--sample-index is {options.sample_index}; it must be 0 or more")


def _read_prompt(
    options: Namespace, settings: Settings, display: Display
) -> tuple[Hierarchy, Prompt]:
    """The user's own text, else a sample of the data set, with notes on it.

    Raises:
        UsageError: there is no such sample, or it does not fit.
    """
    if options.prompt is not None:
        hierarchy = open_models(settings)
        sample = Sample(0, text=options.prompt)
        prompt = make_prompt(sample, "--prompt", hierarchy, settings)
        for note in prefill_notes([prompt], prefill_of(settings, hierarchy)):
            display.line(f"note: {note}")
        return hierarchy, prompt
    index: int = options.sample_index
    inputs = read_inputs(settings, index + 1, sample_index=index)
    for warning in inputs.warnings:
        display.line(f"note: {warning}")
    return inputs.hierarchy, inputs.prompts[0]


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
