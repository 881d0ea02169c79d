"""`python -m pipespec.compare`: the race, ours against its peers on this machine, in one run.

Contestants take turns over the same prompts in several rounds, each in a process of its own while
all others are stopped. What they did is in the file before the next turn starts; Ctrl-C keeps it
and prints the tables of it.
"""

from __future__ import annotations

import os
import sys
from argparse import ArgumentTypeError, Namespace
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Final

from pipespec.commands.arguments import (
    Parser,
    add_engine_arguments,
    add_generation_arguments,
    add_input_arguments,
)
from pipespec.commands.display import Display, make_console
from pipespec.commands.entry import configure_logging, library_errors, run_command
from pipespec.commands.inputs import Inputs, read_inputs
from pipespec.commands.plan_system import emulated
from pipespec.commands.settings import DEFAULT_READY_TIMEOUT_S, Settings, read_settings
from pipespec.comparison.contestants import (
    HEURISTIC,
    LIBRARY_DEFAULT,
    TABLES,
    Choices,
    Contestant,
    LeftOut,
    chosen,
    line_up,
)
from pipespec.comparison.description import describe, now
from pipespec.comparison.differences import difference_lines
from pipespec.comparison.race import Race, RaceSettings
from pipespec.comparison.record import Record, claim, save
from pipespec.comparison.simulated import simulate
from pipespec.comparison.tables import print_tables
from pipespec.comparison.user_command import PLACEHOLDER, parse_command
from pipespec.config import Schedule, find_models_config, load_models_config
from pipespec.decoding import Hierarchy
from pipespec.errors import PipeSpecError, UsageError
from pipespec.results import locked

DEFAULT_NUM_SAMPLES: Final = 6


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    return run_command(lambda: _compare(make_parser().parse_args(given), given))


def make_parser() -> Parser:
    """All flags of the command."""
    parser = Parser(
        prog="python -m pipespec.compare",
        description="Races greedy, chain, async-chain, transformers and any program of yours over "
        "the same prompts on the same hardware, interleaved and repeated.",
    )
    engine = Parser(add_help=False)
    add_engine_arguments(engine, DEFAULT_READY_TIMEOUT_S)
    # Each contestant has a schedule of its own; what it leaves open is as in a benchmark.
    parser.set_defaults(strategy="all", stop=None, **vars(engine.parse_args([])))
    add_input_arguments(parser)
    add_generation_arguments(parser, stop=False)
    _add_contestants(parser)
    _add_race(parser)
    return parser


def _add_contestants(parser: Parser) -> None:
    choices = Choices()
    group = parser.add_argument_group("contestants")
    group.add_argument("--only", nargs="+", metavar="NAME", help="these; a pattern names several")
    group.add_argument("--skip", nargs="+", metavar="NAME", help="all but these")
    group.add_argument(
        "--ablation",
        action="store_true",
        help="instead of the usual ones our own policies: the original's alone, with one of ours, "
        "with all of ours, without one of them",
    )
    group.add_argument(
        "--command",
        action="append",
        metavar=f"NAME='... {PLACEHOLDER} ...'",
        help="a program that reads prompts from a file of JSON lines and prints one JSON line a "
        "prompt: index, num_tokens, seconds, and text or token_ids; may be given several times",
    )
    group.add_argument(
        "--chain-lookaheads",
        nargs="+",
        type=_positive,
        default=choices.chain_lookaheads,
        metavar="N",
        help="of chain; its best one is in the tables, beside auto",
    )
    group.add_argument(
        "--outcomes",
        dest="num_outcomes",
        nargs="+",
        type=int,
        default=choices.outcomes,
        metavar="N",
        help="one more async-chain each, which prepares for so many other tokens",
    )
    group.add_argument(
        "--assistant-tokens",
        nargs="+",
        type=_assistant_tokens,
        default=choices.assistant_tokens,
        metavar="N",
        help=f"of assisted generation, by the smallest draft: {HEURISTIC}, {LIBRARY_DEFAULT} (the "
        "library's own), or a constant number; its best one is in the tables",
    )
    group.add_argument(
        "--lookup-tokens",
        nargs="+",
        type=_positive,
        default=choices.lookup_tokens,
        metavar="N",
        help="of prompt lookup; its best one is in the tables",
    )


def _add_race(parser: Parser) -> None:
    group = parser.add_argument_group("race and results")
    group.add_argument("--rounds", type=int, default=3, metavar="N", help="turns of each")
    group.add_argument(
        "--simulated",
        action="store_true",
        help="emulated models on a virtual clock, without processes: seconds for many prompts, and "
        "one round, as another one would be the same",
    )
    group.add_argument(
        "--num-samples", type=int, default=DEFAULT_NUM_SAMPLES, metavar="N", help="prompts"
    )
    group.add_argument(
        "--tables",
        nargs="+",
        choices=TABLES,
        help="device: everyone has the target's device; total: all that async-chain has (default: "
        "both; device with --ablation)",
    )
    group.add_argument(
        "--one-at-a-time",
        action="store_true",
        help="load each for its turn and unload it after, where memory does not hold all",
    )
    group.add_argument(
        "--timeout",
        dest="ready_timeout",
        type=_timeout,
        default=1800.0,
        metavar="SECONDS",
        help="for a contestant to load, or to answer one prompt",
    )
    group.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="for everything measured (default: results/compare/MODELS_TIME.json)",
    )
    group.add_argument("--force", action="store_true", help="overwrite the file")
    group.add_argument("--verbose", action="store_true", help="log to stderr what happens")


def _positive(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 1024:
        raise ArgumentTypeError(f"{text} is not an integer from 1 to 1024")
    return int(text)


def _timeout(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value <= 1e6:
        raise ArgumentTypeError(f"{text} is not a number of seconds above 0")
    return value


def _assistant_tokens(text: str) -> str:
    return text if text in (HEURISTIC, LIBRARY_DEFAULT) else str(_positive(text))


# -- the command ----------------------------------------------------------------------------


def _compare(options: Namespace, given: Sequence[str]) -> int:
    configure_logging(options.verbose)
    if options.rounds < 1:
        raise UsageError(f"--rounds is {options.rounds}; it must be a positive integer")
    config = load_models_config(find_models_config(options.models_config_path))
    if len(config) == 1:
        options.strategy = "greedy"  # all that a target alone can do
    settings = read_settings(options)
    if options.simulated:
        _check_simulated(options, settings)
    options.tables = options.tables or (TABLES[:1] if options.ablation else TABLES)
    choices = _choices(options)
    path: Path = options.output or _default_path(settings)
    claim(path, force=options.force)
    inputs = read_inputs(settings, options.num_samples)
    contestants, left_out = _starters(inputs.hierarchy, choices, options)
    record = describe(
        settings,
        inputs,
        contestants,
        left_out,
        options.tables,
        command=["python", "-m", "pipespec.compare", *given],
        ablation=options.ablation,
        simulated=options.simulated,
        rounds=1 if options.simulated else options.rounds,
        one_at_a_time=options.one_at_a_time,
        load_average_before=os.getloadavg(),
    )
    display = Display(make_console())
    for warning in inputs.warnings:
        display.line(f"note: {warning}")
    try:
        with locked(path, "--output"):
            _race(contestants, settings, inputs, options, record, path)
    except BaseException as error:
        if record.turns:
            error.add_note(f"what was measured is in {path}")
            print_tables(record, display.console)
        raise
    print_tables(record, display.console)
    for line in (*record.metadata["differences"], "", str(path)):
        display.line(line)
    return 0


def _check_simulated(options: Namespace, settings: Settings) -> None:
    """Whether there is nothing that a simulation does not know.

    Raises:
        UsageError: naming what it does not.
    """
    real = [model.name for model in settings.models if model.emulated is None]
    if real:
        raise UsageError(f"--simulated is for emulated models, and {real[0]} is not one")
    if options.command:
        raise UsageError("--simulated cannot simulate a --command; leave one of them out")


def _choices(options: Namespace) -> Choices:
    """What the flags choose, each value once."""
    for number in options.num_outcomes:
        Schedule(outcomes=number)  # raises where the number is wrong
    return Choices(
        tuple(dict.fromkeys(options.chain_lookaheads)),
        tuple(dict.fromkeys(options.num_outcomes)),
        tuple(dict.fromkeys(options.assistant_tokens)),
        tuple(dict.fromkeys(options.lookup_tokens)),
        tuple(map(parse_command, options.command or ())),
        options.ablation,
    )


def _starters(
    hierarchy: Hierarchy, choices: Choices, options: Namespace
) -> tuple[list[Contestant], list[LeftOut]]:
    contestants, left_out = line_up(hierarchy, choices, options.tables)
    names = [*(x.name for x in contestants), *(x.name for x in left_out)]
    wanted = chosen(names, options.only, options.skip)
    return (
        [x for x in contestants if x.name in wanted],
        [x for x in left_out if x.name in wanted],
    )


def _race(
    contestants: Sequence[Contestant],
    settings: Settings,
    inputs: Inputs,
    options: Namespace,
    record: Record,
    path: Path,
) -> None:
    """Fills the record and its file.

    Raises:
        PipeSpecError: nobody had a turn.
    """
    if not options.simulated:
        _race_processes(contestants, settings, inputs, options, record, path)
    else:
        progress = Display(make_console(stderr=True))
        system = emulated(settings, inputs)
        with progress.news() as news:
            simulate(contestants, system, inputs, record, path, news)
    if not record.turns:
        why = (f"{entrant.key}: {entrant.left_out}" for entrant in record.entrants)
        raise PipeSpecError(f"nobody could race: {'; '.join(why)}")
    with library_errors("the comparison with greedy"):
        record.metadata["differences"] = difference_lines(
            record, inputs.prompts, inputs.hierarchy, settings.generation.sampling
        )
    record.metadata["finished_at"] = now()
    save(record, path)


def _race_processes(
    contestants: Sequence[Contestant],
    settings: Settings,
    inputs: Inputs,
    options: Namespace,
    record: Record,
    path: Path,
) -> None:
    hierarchy, generation = inputs.hierarchy, settings.generation
    room = hierarchy.context_length + 1  # the last token is written and not read
    race_settings = RaceSettings(
        rounds=options.rounds,
        timeout_s=settings.ready_timeout_s,
        one_at_a_time=options.one_at_a_time,
        base=settings.config_path.parent,
        sampling=generation.sampling,
        limits={p.index: min(generation.max_new_tokens, room - len(p.ids)) for p in inputs.prompts},
    )
    with (
        Display(make_console(stderr=True)).news() as news,
        Race(contestants, inputs, race_settings, record, path, news) as race,
    ):
        race.run()


def _default_path(settings: Settings) -> Path:
    names = "-".join(model.name for model in settings.models)
    return Path("results") / "compare" / f"{names}_{datetime.now():%Y%m%d-%H%M%S}.json"


if __name__ == "__main__":
    sys.exit(main())
