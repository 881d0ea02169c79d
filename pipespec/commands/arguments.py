"""Command-line flags, each defined once for all commands; defaults come from the dataclasses.

A flag may be written with hyphens or underscores: `Parser` turns `--num_samples` into
`--num-samples` before it looks at it, and leaves values alone.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NoReturn

from pipespec.config import POLICIES, RUNNERS, GenerationParams, SamplingParams, Schedule
from pipespec.data import BUILT_IN
from pipespec.errors import UsageError
from pipespec.tracking.wandb_runs import DEFAULT_WANDB_PROJECT

DEFAULT_MODELS_CONFIG: Final = "configs/models/demo.json"
HUB_MAX_NEW_TOKENS: Final = 4096  # the original's, for models that write real answers
TRANSPORTS: Final = ("ipc", "tcp")


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` for which hyphen and underscore are the same in the name of a flag, and
    for which a wrong flag is a `UsageError`, one line like every other error."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=_HelpFormatter, allow_abbrev=False, **options)

    def parse_known_args(  # type: ignore[override]
        self,
        args: Sequence[str] | None = None,
        namespace: argparse.Namespace | None = None,
    ) -> tuple[argparse.Namespace, list[str]]:
        given = sys.argv[1:] if args is None else args
        return super().parse_known_args([_with_hyphens(text) for text in given], namespace)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message.removeprefix('argument ')}; see --help")


def add_input_arguments(
    parser: Parser,
    strategies: Sequence[str] = (),
    default: str = "",
    *,
    default_prefill: str = "whole prompts",
) -> None:
    """What runs on what: strategy (unless there is nothing to choose), models, data set.
    default_prefill: what the command does without `--prefill`."""
    group = parser.add_argument_group("what to run")
    if strategies:
        group.add_argument(
            "--strategy",
            choices=strategies,
            default=default,
            help="greedy: the target alone; chain: synchronous; async-chain: a process per model",
        )
    group.add_argument(
        "--models-config-path",
        metavar="FILE",
        default=DEFAULT_MODELS_CONFIG,
        help="JSON array of models, smallest draft first, target last",
    )
    group.add_argument(
        "--dataset",
        metavar="NAME",
        help=f"built-in name ({', '.join(BUILT_IN)}), NAME=PATH for a copy of one of them, hub "
        "name, folder saved by datasets, .jsonl or .json file (default: stdlib for models shipped "
        "with PipeSpec and emulated ones, else humaneval)",
    )
    group.add_argument(
        "--no-generation-prompt",
        action="store_true",
        help="end a conversation without the reply's header, as the original did",
    )
    group.add_argument(
        "--prefill",
        type=int,
        metavar="N",
        help="cut prompts to at most N tokens: documents lose their end, instructions nothing "
        f"(default: {default_prefill})",
    )


def add_generation_arguments(parser: Parser, *, stop: bool = True) -> None:
    """What the target writes: nothing outside this group changes the text. stop: with `--stop`."""
    sampling, generation = SamplingParams(), GenerationParams()
    group = parser.add_argument_group("the text")
    group.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help=f"limit of each output (default: {generation.max_new_tokens} for models shipped with "
        f"PipeSpec and emulated ones, else {HUB_MAX_NEW_TOKENS})",
    )
    group.add_argument(
        "--temperature",
        type=float,
        metavar="T",
        default=sampling.temperature,
        help="0 takes the most likely token",
    )
    group.add_argument(
        "--top-k", type=int, metavar="K", default=sampling.top_k, help="0 keeps all tokens"
    )
    group.add_argument(
        "--top-p", type=float, metavar="P", default=sampling.top_p, help="1 keeps all tokens"
    )
    group.add_argument(
        "--min-p", type=float, metavar="P", default=sampling.min_p, help="0 keeps all tokens"
    )
    group.add_argument(
        "--seed",
        type=int,
        metavar="N",
        default=sampling.seed,
        help="of the noise that all models share",
    )
    if stop:
        group.add_argument(
            "--stop",
            action="append",
            metavar="TEXT",
            help="end an output before this text; may be given several times",
        )


def add_engine_arguments(parser: Parser, ready_timeout_s: float) -> None:
    """How the text is made: schedule and processes."""
    schedule = Schedule()
    group = parser.add_argument_group("schedule and processes")
    group.add_argument(
        "--lookahead",
        type=_lookahead,
        default="auto",
        metavar="auto|N",
        help="draft tokens to wait for before a verification: from 0 for async-chain, from 1 for "
        "chain",
    )
    group.add_argument(
        "--policy",
        choices=POLICIES,
        default=schedule.policy,
        help="of async-chain: wait as long as it pays, or the original's verify-what-is-there",
    )
    group.add_argument(
        "--run-ahead",
        type=int,
        default=schedule.run_ahead,
        metavar="N",
        help="tokens that a stage may be ahead of the last verdict",
    )
    group.add_argument(
        "--outcomes",
        type=int,
        default=-1,
        metavar="N",
        help=f"of async-chain: other tokens a position whose rejection a draft prepares for "
        f"(default: {schedule.outcomes}, and 0 with --policy pipespec)",
    )
    group.add_argument(
        "--tree",
        type=int,
        default=schedule.tree,
        metavar="N",
        help="of async-chain: candidates of prepared outcomes verified beside the main path",
    )
    add_process_arguments(group, ready_timeout_s)


def add_process_arguments(group: argparse._ArgumentGroup, ready_timeout_s: float) -> None:
    """What runs the models and joins them, and how much is said of it."""
    group.add_argument(
        "--runner",
        choices=RUNNERS,
        default="auto",
        help="runs every model with it; auto leaves it to the models config",
    )
    group.add_argument(
        "--deterministic",
        action="store_true",
        help="no bit of the target may depend on how many tokens a step has: all strategies agree, "
        "in bfloat16 too; costs time with the llama runner",
    )
    group.add_argument(
        "--transport",
        choices=TRANSPORTS,
        default="ipc",
        help="between processes; tcp is the loopback interface",
    )
    group.add_argument(
        "--ready-timeout",
        type=float,
        default=ready_timeout_s,
        metavar="SECONDS",
        help="for all models of a pipeline to load",
    )
    group.add_argument("--verbose", action="store_true", help="log to stderr what happens")


def add_tracking_arguments(parser: Parser) -> None:
    """Where numbers go besides the result files; see `commands.tracking`."""
    group = parser.add_argument_group("tracking")
    group.add_argument(
        "--use-wandb",
        action="store_true",
        help="log to Weights & Biases, one run a strategy; WANDB_MODE=offline logs to files",
    )
    group.add_argument(
        "--wandb-project",
        metavar="NAME",
        help=f"(default: WANDB_PROJECT, else {DEFAULT_WANDB_PROJECT})",
    )
    group.add_argument(
        "--wandb-entity", metavar="NAME", help="a user or a team (default: W&B's own)"
    )
    group.add_argument(
        "--wandb-run",
        metavar="NAME",
        help="name of the run; with several strategies, of their group (default: W&B makes one)",
    )


def add_trace_argument(parser: Parser) -> None:
    """Where what happens is written."""
    parser.add_argument(
        "--trace",
        type=Path,
        metavar="FILE.json",
        help="write what every stage did when, for ui.perfetto.dev and viz/pipeline_timeline.py",
    )


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds a flag's default to its help, where it has one to show."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


def _with_hyphens(text: str) -> str:
    """`--num_samples=x_y` as `--num-samples=x_y`; what is no long flag as it is."""
    if not text.startswith("--"):
        return text
    name, equals, value = text.partition("=")
    return name.replace("_", "-") + equals + value


def _lookahead(text: str) -> int | None:
    if text == "auto":
        return None
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is neither auto nor an integer") from None
