"""`python -m pipespec.compare`: the race, ours against its peers on this machine, in one run.

Contestants take turns over the same prompts in several rounds, each in a process of its own while
all others are stopped. What they did is in the file before the next turn starts; Ctrl-C keeps it
and prints the tables of it.
"""

from __future__ import annotations

import os
import shutil
import sys
from argparse import ArgumentTypeError, Namespace
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from pipespec.commands.arguments import Parser, add_generation_arguments, add_input_arguments
from pipespec.commands.display import Display, make_console
from pipespec.commands.entry import configure_logging, library_errors, run_command
from pipespec.commands.inputs import Inputs, read_inputs
from pipespec.commands.settings import Settings, read_settings
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
from pipespec.comparison.progress import showing
from pipespec.comparison.race import MAX_TRIES, Race, RaceSettings
from pipespec.comparison.record import Record, claim, save
from pipespec.comparison.tables import print_tables
from pipespec.comparison.user_command import PLACEHOLDER, parse_command
from pipespec.config import Schedule, find_models_config, load_models_config
from pipespec.errors import PipeSpecError, UsageError
from pipespec.worker_spec import make_run_dir

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
    add_input_arguments(parser)
    add_generation_arguments(parser, stop=False)
    _add_contestants(parser)
    _add_race(parser)
    defaults = Schedule()
    parser.set_defaults(
        strategy="all",
        stop=None,
        policy=defaults.policy,
        lookahead=defaults.lookahead,
        run_ahead=defaults.run_ahead,
        outcomes=defaults.outcomes,
        runner="auto",
        transport="ipc",
    )
    return parser


def _add_contestants(parser: Parser) -> None:
    choices = Choices()
    group = parser.add_argument_group("contestants")
    group.add_argument("--only", nargs="+", metavar="NAME", help="these; a pattern names several")
    group.add_argument("--skip", nargs="+", metavar="NAME", help="all but these")
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
        metavar="N",
        help="of chain; its best one is in the tables, beside auto"
        + _told(choices.chain_lookaheads),
    )
    group.add_argument(
        "--outcomes",
        dest="num_outcomes",
        nargs="+",
        type=int,
        metavar="N",
        help="one more async-chain each, which prepares for so many other tokens; 0: none"
        + _told(choices.outcomes),
    )
    group.add_argument(
        "--assistant-tokens",
        nargs="+",
        type=_assistant_tokens,
        metavar="N",
        help=f"of assisted generation: {HEURISTIC}, {LIBRARY_DEFAULT} (the library's own), or a "
        f"constant number; its best one is in the tables{_told(choices.assistant_tokens)}",
    )
    group.add_argument(
        "--assistant", metavar="MODEL", help="the draft that assists (default: the smallest)"
    )
    group.add_argument(
        "--lookup-tokens",
        nargs="+",
        type=_positive,
        metavar="N",
        help=f"of prompt lookup; its best one is in the tables{_told(choices.lookup_tokens)}",
    )


def _add_race(parser: Parser) -> None:
    group = parser.add_argument_group("race and results")
    group.add_argument("--rounds", type=int, default=3, metavar="N", help="turns of each")
    group.add_argument(
        "--num-samples", type=int, default=DEFAULT_NUM_SAMPLES, metavar="N", help="prompts"
    )
    group.add_argument(
        "--tables",
        nargs="+",
        choices=TABLES,
        help="device: everyone has the target's device; total: all that async-chain has"
        + _told(TABLES),
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
        "--max-foreign-cores",
        type=_share,
        metavar="X",
        help="repeat a turn during which other work kept more of the race's cores busy, up to "
        f"{MAX_TRIES} times; the repeated ones stay in the file (default: repeat none)",
    )
    group.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="for everything measured (default: results/compare/MODELS_TIME.json)",
    )
    group.add_argument("--force", action="store_true", help="overwrite the file")
    group.add_argument("--verbose", action="store_true", help="log to stderr what happens")


def _told(values: Sequence[object]) -> str:
    return f" (default: {' '.join(map(str, values))})"


def _positive(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 1024:
        raise ArgumentTypeError(f"{text} is not an integer from 1 to 1024")
    return int(text)


def _timeout(text: str) -> float:
    return _above_0(text, "a number of seconds")


def _share(text: str) -> float:
    return _above_0(text, "a number of cores")


def _above_0(text: str, what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value <= 1e6:
        raise ArgumentTypeError(f"{text} is not {what} above 0")
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
    choices = _choices(options, settings)
    tables: Sequence[str] = options.tables or TABLES
    path: Path = options.output or _default_path(settings)
    claim(path, force=options.force)
    inputs = read_inputs(settings, options.num_samples)
    contestants, left_out = _starters(inputs, choices, tables, options)
    record = describe(
        settings,
        inputs,
        contestants,
        left_out,
        tables=tables,
        rounds=options.rounds,
        one_at_a_time=options.one_at_a_time,
        most_foreign_cores=options.max_foreign_cores,
        command=("python", "-m", "pipespec.compare", *given),
    )
    display = Display(make_console())
    for warning in inputs.warnings:
        display.line(f"note: {warning}")
    _race(contestants, settings, inputs, record, path, options, display)
    return 0


def _choices(options: Namespace, settings: Settings) -> Choices:
    """What the flags choose, each value once; the others have their defaults."""
    given = {
        "chain_lookaheads": options.chain_lookaheads,
        "outcomes": options.num_outcomes,
        "assistant_tokens": options.assistant_tokens,
        "lookup_tokens": options.lookup_tokens,
    }
    values: dict[str, Any] = {k: tuple(dict.fromkeys(v)) for k, v in given.items() if v}
    values["assistant"] = _assistant(options.assistant, settings)
    values["commands"] = tuple(map(parse_command, options.command or ()))
    choices = Choices(**values)
    for number in choices.outcomes:
        Schedule(outcomes=number)  # raises where the number is wrong
    return choices


def _assistant(name: str | None, settings: Settings) -> int:
    """The index of the draft that `--assistant` names."""
    drafts = [model.name for model in settings.models[:-1]]
    if name is None:
        return 0
    if name not in drafts:
        listed = ", ".join(drafts) or "none"
        raise UsageError(f"--assistant: no draft is called {name}; the config has {listed}")
    return drafts.index(name)


def _starters(
    inputs: Inputs, choices: Choices, tables: Sequence[str], options: Namespace
) -> tuple[list[Contestant], list[LeftOut]]:
    contestants, left_out = line_up(inputs.hierarchy, choices, tables)
    names = [c.name for c in contestants] + [x.name for x in left_out]
    wanted = chosen(names, options.only, options.skip)
    return (
        [c for c in contestants if c.name in wanted],
        [x for x in left_out if x.name in wanted],
    )


def _race(
    contestants: Sequence[Contestant],
    settings: Settings,
    inputs: Inputs,
    record: Record,
    path: Path,
    options: Namespace,
    display: Display,
) -> None:
    generation, room = settings.generation, inputs.hierarchy.context_length + 1
    race_settings = RaceSettings(
        rounds=options.rounds,
        order_seed=generation.sampling.seed,
        timeout_s=settings.ready_timeout_s,
        one_at_a_time=options.one_at_a_time,
        base=settings.config_path.parent,
        sampling=generation.sampling,
        limits={p.index: min(generation.max_new_tokens, room - len(p.ids)) for p in inputs.prompts},
        most_foreign_cores=options.max_foreign_cores,
        environment=os.environ,
    )
    run_dir = make_run_dir()
    try:
        save(record, path)
        with (
            showing(make_console(stderr=True)) as on_progress,
            Race(
                contestants,
                inputs.hierarchy,
                inputs.prompts,
                race_settings,
                record,
                path,
                run_dir,
                on_progress,
            ) as race,
        ):
            race.run()
        if not record.turns:
            raise PipeSpecError("nobody could race: " + "; ".join(_why_not(record)))
        with library_errors("the comparison with greedy"):
            record.metadata["differences"] = difference_lines(
                record, inputs.prompts, inputs.hierarchy, generation.sampling
            )
        record.metadata["finished_at"] = now()
        save(record, path)
    except BaseException as error:
        if record.turns:
            print_tables(record, display.console)
            error.add_note(f"what was measured is in {path}")
        else:
            path.unlink(missing_ok=True)
        raise
    finally:
        shutil.rmtree(run_dir, ignore_errors=True)
    print_tables(record, display.console)
    for line in record.metadata["differences"]:
        display.line(line)
    display.line(f"\n{path}")


def _why_not(record: Record) -> list[str]:
    return [f"{entrant.key} {entrant.left_out}" for entrant in record.entrants if entrant.left_out]


def _default_path(settings: Settings) -> Path:
    names = "-".join(model.name for model in settings.models)
    return Path("results") / "compare" / f"{names}_{datetime.now():%Y%m%d-%H%M%S}.json"


if __name__ == "__main__":
    sys.exit(main())
