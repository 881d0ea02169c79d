"""`python -m pipespec.plan`: which models of a config, in which strategy, with which flags.

Measures every model where it would run (once: `--profile` keeps what was measured), simulates
every subset, strategy and schedule on the very texts that were written meanwhile, and ranks them.
Of emulated models only what runs add to forwards is measured.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final

from pipespec.commands.arguments import (
    Parser,
    add_generation_arguments,
    add_input_arguments,
    add_process_arguments,
)
from pipespec.commands.display import Display, make_console
from pipespec.commands.entry import configure_logging, run_command
from pipespec.commands.inputs import Inputs, read_inputs
from pipespec.commands.plan_run import models_of, run_choices
from pipespec.commands.plan_system import make_system
from pipespec.commands.plan_tables import (
    Trial,
    allocation_table,
    answer_lines,
    describe,
    loss_line,
    ranking_table,
    stages_text,
    trial_table,
    useless_line,
)
from pipespec.commands.settings import DEFAULT_READY_TIMEOUT_S, Settings, read_settings
from pipespec.config import (
    ModelConfig,
    SamplingParams,
    Schedule,
    find_models_config,
    load_models_config,
    model_to_json,
)
from pipespec.errors import DataError, UsageError
from pipespec.planning.devices import Allocation, allocations, one_more, read_target_times
from pipespec.planning.search import Plan, Ranking, search, useless_stages
from pipespec.planning.system import Choice, System
from pipespec.planning.times import Times
from pipespec.results import ensure_writable, ensure_writable_file

DEFAULT_NUM_SAMPLES: Final = 6


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    return run_command(lambda: _plan(make_parser().parse_args(arguments)))


def make_parser() -> Parser:
    """All flags of the command."""
    parser = Parser(
        prog="python -m pipespec.plan",
        description="Measures the models of a config, simulates every way to run them, and says "
        "which is the fastest.",
    )
    add_input_arguments(parser)
    add_generation_arguments(parser)
    group = parser.add_argument_group("the plan")
    group.add_argument(
        "--num-samples",
        type=int,
        metavar="N",
        default=DEFAULT_NUM_SAMPLES,
        help="the first N of the data set, whose texts are written and simulated",
    )
    group.add_argument(
        "--profile",
        type=Path,
        metavar="FILE",
        help="keep what was measured in this file, and measure nothing that it holds; it is of "
        "one config, data set, machine and set of versions",
    )
    group.add_argument(
        "--write", type=Path, metavar="FILE", help="write the best plan's models config"
    )
    group.add_argument(
        "--run",
        action="store_true",
        help="then run the best plan, and greedy, on the same prompts and compare",
    )
    group.add_argument(
        "--output-dir",
        type=Path,
        metavar="DIR",
        help="for the result files of --run, which replace older ones (default: "
        "results/plan/DATASET)",
    )
    group = parser.add_argument_group(
        "a device more for the target, or for a draft?",
        "For a target that can be spread over several devices. Both flags go together.",
    )
    group.add_argument(
        "--target-step-ms",
        type=Path,
        metavar="FILE",
        help="JSON object: number of devices -> the target's milliseconds by number of tokens, "
        'as in {"1": {"1": 60, "8": 62}, "2": {"1": 33, "8": 34}}',
    )
    group.add_argument(
        "--num-devices",
        type=int,
        metavar="N",
        help="devices that target and drafts may have together; a draft has those of its config",
    )
    group = parser.add_argument_group("processes")
    add_process_arguments(group, DEFAULT_READY_TIMEOUT_S)
    parser.set_defaults(strategy="all", **asdict(Schedule()))  # read_settings wants them
    return parser


def _plan(options: Namespace) -> int:
    configure_logging(options.verbose)
    settings = _read_settings(options)
    tables = _read_tables(options)
    display, progress = Display(make_console()), Display(make_console(stderr=True))
    inputs = read_inputs(settings, options.num_samples)
    for warning in inputs.warnings:
        progress.line(f"note: {warning}")
    options.num_samples = len(inputs.prompts)  # there may be fewer than were asked for
    display.line(_title(settings, inputs))
    system, how = make_system(settings, inputs, options.profile, progress)
    _show_system(system, how, display)
    start_s = time.monotonic()
    with progress.parts("simulated") as on_part:
        ranking = search(system, on_simulated=lambda choice: on_part(stages_text(choice)))
    _show_ranking(ranking, system, time.monotonic() - start_s, display)
    _show_command(ranking.best, options, settings, system, display)
    if tables is not None:
        _show_devices(system, tables, options.num_devices, display, progress)
    if options.run:
        choices = list(dict.fromkeys((ranking.greedy.choice, ranking.best.choice)))
        trials = run_choices(
            choices, system, settings, options.num_samples, options.output_dir, progress
        )
        _show_trials(trials, display)
    return 0


# -- what is planned ------------------------------------------------------------------------


def _read_settings(options: Namespace) -> Settings:
    """As every command reads them; and there must be something to plan.

    Raises:
        UsageError: naming the flag.
    """
    path = find_models_config(options.models_config_path)
    models = load_models_config(path)
    if len(models) < 2:
        raise UsageError(f"{path} has one model: there is nothing to plan; add a draft before it")
    if (options.target_step_ms is None) != (options.num_devices is None):
        raise UsageError("--target-step-ms and --num-devices go together; pass both")
    if options.num_devices is not None and options.num_devices < 1:
        raise UsageError(f"--num-devices is {options.num_devices}; it must be a positive integer")
    for flag, path in (("--profile", options.profile), ("--write", options.write)):
        if path is not None:  # said now, not after the measurement
            ensure_writable_file(path, flag)
    if options.run and options.output_dir is not None:
        ensure_writable(options.output_dir)
    return read_settings(options)


def _read_tables(options: Namespace) -> dict[int, Times] | None:
    if options.target_step_ms is None:
        return None
    tables = read_target_times(options.target_step_ms)
    if min(tables) > options.num_devices:
        raise UsageError(
            f"--num-devices is {options.num_devices}; by --target-step-ms the target needs "
            f"{min(tables)} or more"
        )
    return tables


def _title(settings: Settings, inputs: Inputs) -> str:
    sampling = settings.generation.sampling
    parts = [
        f"{inputs.dataset.name}: {len(inputs.prompts)} samples",
        f"at most {settings.generation.max_new_tokens} new tokens",
    ]
    if not sampling.is_greedy:
        parts.append(f"temperature {sampling.temperature:g}")
    return ", ".join(parts)


def _show_system(system: System, how: str, display: Display) -> None:
    """Where the numbers are from, and the most important of them."""
    display.line(how)
    for index, model in enumerate(system.models):
        beside = [
            f"; {factor:.2f}x while {other} computes"
            for other, factor in enumerate(system.slow_downs[index] if system.slow_downs else ())
            if other != index
        ]
        display.line(
            f"{index}: {model.name}: {1e3 * system.step_s(index):.3f} ms for one token, "
            f"{1e3 * system.step_s(index, 8):.3f} ms for 8{''.join(beside)}"
        )
    for choice in (
        Choice((system.target,), "greedy"),
        Choice(tuple(range(system.target + 1)), "chain"),
        Choice(tuple(range(system.target + 1)), "async-chain"),
    ):
        costs = [system.overheads.at(choice, stage) for stage in choice.stages]
        display.line(
            f"in {choice.strategy} of {stages_text(choice)}: forwards "
            + ", ".join(f"{cost.slow_down:.2f}x" for cost in costs)
            + "; between them "
            + ", ".join(f"{1e3 * cost.loop_s:.2f}" for cost in costs)
            + " ms"
        )
    display.line(f"from a forward to the one that it causes: {1e3 * system.overheads.hop_s:.2f} ms")


# -- what comes out -------------------------------------------------------------------------


def _show_ranking(ranking: Ranking, system: System, seconds: float, display: Display) -> None:
    display.line(
        f"simulated {ranking.num_simulated} choices on short pieces, the best "
        f"{len(ranking.plans)} on {ranking.num_tokens} tokens of {ranking.num_texts} texts, in "
        f"{seconds:.1f} s"
    )
    display.line("")
    display.console.print(ranking_table(ranking))
    display.line("")
    for item in useless_stages(ranking):
        display.line(useless_line(item, system))


def _show_command(
    best: Plan, options: Namespace, settings: Settings, system: System, display: Display
) -> None:
    gain = f"{best.tokens_per_s:,.1f} tokens/s"
    display.line(f"best: {describe(best, system)}: {gain}")
    path = settings.config_path
    if options.write is not None:
        path = options.write
        _write_config(path, models_of(best.choice, settings.models), settings.config_path.parent)
        display.line(f"wrote {path}")
    elif len(best.choice.stages) < len(settings.models) and best.choice.strategy != "greedy":
        display.line("--write FILE writes the models config that it needs")
        return
    words = ["python", "-m", "pipespec.benchmark", "--models-config-path", str(path)]
    words += ["--strategy", best.choice.strategy]
    words += [word for name, value in best.choice.flags.items() for word in (f"--{name}", value)]
    words += _text_flags(options, settings)
    display.command(shlex.join(words))


def _write_config(path: Path, models: Sequence[ModelConfig], base: Path) -> None:
    """Writes a models config; paths that were relative to `base` are made absolute.

    Raises:
        DataError: the file cannot be written.
    """
    entries = []
    for model in models:
        entry = model_to_json(model)
        for key in ("path", "tokenizer"):
            given = entry.get(key)
            if given and not Path(given).is_dir() and (base / given).is_dir():
                entry[key] = str((base / given).resolve())
        entries.append(json.dumps(entry))
    try:
        path.write_text("[\n  " + ",\n  ".join(entries) + "\n]\n", encoding="utf-8")
    except OSError as error:
        raise DataError(f"--write: {path}: {error.strerror or error}") from error


def _text_flags(options: Namespace, settings: Settings) -> list[str]:
    """The flags of this command that say which prompts, and what is written after them."""
    words = ["--dataset", settings.dataset, "--num-samples", str(options.num_samples)]
    words += ["--max-new-tokens", str(settings.generation.max_new_tokens)]
    for name, default in (
        *((name, getattr(SamplingParams(), name)) for name in SamplingParams.__slots__),
        ("runner", "auto"),
        ("transport", "ipc"),
    ):
        if getattr(options, name) != default:
            words += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    for text in settings.generation.stop:
        words += ["--stop", text]
    if settings.prefill is not None:
        words += ["--prefill", str(settings.prefill)]
    return words + (["--no-generation-prompt"] if options.no_generation_prompt else [])


def _show_devices(
    system: System,
    tables: dict[int, Times],
    num_devices: int,
    display: Display,
    progress: Display,
) -> None:
    with progress.parts("ways to give out devices") as on_part:

        def on_allocation(item: Allocation) -> None:
            on_part(f"{item.num_target_devices} for the target")

        found = allocations(system, tables, num_devices, on_allocation)
    display.line("")
    display.line(f"at most {num_devices} devices, the target's step times by their number given:")
    display.line("")
    display.console.print(allocation_table(found))
    display.line("")
    for line in answer_lines(found[0], one_more(found, num_devices), system):
        display.line(line)


def _show_trials(trials: Sequence[Trial], display: Display) -> None:
    display.line("")
    display.console.print(trial_table(trials))
    display.line("")
    for trial in trials:
        display.line(loss_line(trial))
    for trial in trials:
        display.line(str(trial.path))


if __name__ == "__main__":
    sys.exit(main())
