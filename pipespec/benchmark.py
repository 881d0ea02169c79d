"""`python -m pipespec.benchmark`: runs decoding strategies over the same prompts and compares them.

Every strategy writes one result file; a finished sample is on the disk at once. Given again, the
command skips what is there, `--resume` goes on after an interruption, `--force` starts over.
"""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipespec.commands.arguments import (
    Parser,
    add_engine_arguments,
    add_generation_arguments,
    add_input_arguments,
    add_trace_argument,
    add_tracking_arguments,
)
from pipespec.commands.display import Display, make_console
from pipespec.commands.entry import configure_logging, run_command
from pipespec.commands.inputs import Inputs, read_inputs
from pipespec.commands.monitoring import check_interval
from pipespec.commands.payoff import payoff_line
from pipespec.commands.runs import (
    Result,
    Run,
    describe_run,
    find_divergences,
    plan_run,
    run_strategy,
)
from pipespec.commands.settings import DEFAULT_READY_TIMEOUT_S, Settings, read_settings
from pipespec.commands.tables import TableRow, summary_table
from pipespec.commands.tracing import tracing
from pipespec.commands.tracking import open_tracker, tracking_folder
from pipespec.config import STRATEGIES
from pipespec.errors import DataError, UsageError
from pipespec.gpu_monitor import DEFAULT_INTERVAL_S
from pipespec.results import (
    OutputPlan,
    describe_environment,
    load_results,
    metadata_differences,
)
from pipespec.tracking import RunTracker, Tracker


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    return run_command(lambda: _benchmark(make_parser().parse_args(arguments)))


def make_parser() -> Parser:
    """All flags of the command."""
    parser = Parser(
        prog="python -m pipespec.benchmark",
        description="Compares greedy, chain and async-chain decoding on the same prompts. Every "
        "flag may be written with hyphens or underscores.",
    )
    add_input_arguments(parser, (*STRATEGIES, "all"), "all")
    add_generation_arguments(parser)
    add_engine_arguments(parser, DEFAULT_READY_TIMEOUT_S)
    add_trace_argument(parser)
    group = parser.add_argument_group("samples and results")
    group.add_argument(
        "--num-samples",
        type=int,
        metavar="N",
        help="the first N of the data set (default: all, except 6 of stdlib, arithmetic)",
    )
    group.add_argument(
        "--output-dir",
        type=Path,
        metavar="DIR",
        help="for the result files (default: results/DATASET)",
    )
    group.add_argument("--force", action="store_true", help="overwrite result files")
    group.add_argument(
        "--resume", action="store_true", help="go on after the samples of an interrupted run"
    )
    group.add_argument(
        "--drop-stages",
        action="store_true",
        help="of async-chain: go on without the stages that do not pay on the first samples",
    )
    group.add_argument(
        "--monitor-interval",
        type=float,
        metavar="SECONDS",
        default=DEFAULT_INTERVAL_S,
        help="between two readings of what the devices do; 0: no monitor",
    )
    group.add_argument(
        "--dry-run",
        action="store_true",
        help="print memory and placement from config.json files alone, and stop",
    )
    add_tracking_arguments(parser)
    return parser


def _benchmark(options: Namespace) -> int:
    configure_logging(options.verbose)
    if options.force and options.resume:
        raise UsageError("--force and --resume contradict each other; pass one of them")
    check_interval(options.monitor_interval)
    settings = read_settings(options)
    if options.drop_stages and "async-chain" not in settings.strategies:
        raise UsageError(
            f"--drop-stages is for async-chain, and --strategy is {options.strategy}; use "
            "--strategy async-chain or all, or leave the flag out"
        )
    display = Display(make_console())
    if options.dry_run:
        return _dry_run(settings, display)
    with open_tracker(options, settings.strategies, display.line) as tracker:
        _run_all(options, settings, tracker, display)
    return 0


def _run_all(options: Namespace, settings: Settings, tracker: Tracker, display: Display) -> None:
    inputs = read_inputs(settings, options.num_samples)
    for warning in inputs.warnings:
        display.line(f"note: {warning}")
    output_dir: Path = options.output_dir or Path("results") / inputs.dataset.name
    environment = describe_environment()
    runs = [
        plan_run(
            strategy,
            settings,
            inputs,
            output_dir,
            environment,
            force=options.force,
            resume=options.resume,
            drop_stages=options.drop_stages,
        )
        for strategy in settings.strategies
    ]
    if options.trace is not None and all(run.plan is OutputPlan.SKIP for run in runs):
        raise UsageError(
            f"--trace: everything is in {output_dir} already, nothing would run; add --force, or "
            "name another --output-dir"
        )
    greedy: Sequence[Result] = ()
    if "greedy" not in settings.strategies:
        path, wanted = describe_run("greedy", settings, inputs, output_dir, environment)
        greedy = _stored_greedy(path, wanted, display)
    with tracing(options.trace, display) as trace:
        settings = replace(settings, trace=trace, monitor_interval_s=options.monitor_interval)
        for run in runs:
            with tracker.run(run.metadata, tracking_folder(output_dir)) as tracked:
                results = _run_tracked(run, settings, inputs, greedy, display, tracked)
            if run.strategy == "greedy":
                greedy = results
    _show_results(runs, greedy, settings, inputs, display)


def _run_tracked(
    run: Run,
    settings: Settings,
    inputs: Inputs,
    greedy: Sequence[Result],
    display: Display,
    tracked: RunTracker,
) -> Sequence[Result]:
    """What a strategy wrote, now or before; either is logged."""
    if run.plan is OutputPlan.SKIP:
        display.line(f"{run.strategy}: done before, see {run.path} (--force runs it again)")
        before = load_results(run.path)
        for result in before.results:
            tracked.log_sample(result, before.metadata)
    else:
        run_strategy(run, settings, inputs, greedy, display, tracked.log_sample)
    stored = load_results(run.path)
    tracked.log_end(stored.results, stored.metadata, greedy, inputs.decode)
    return stored.results


def _dry_run(settings: Settings, display: Display) -> int:
    from pipespec.dry_run import dry_run_report, render
    from pipespec.placement import this_machine

    report = dry_run_report(
        settings.models,
        this_machine(os.environ),
        context_length=None,
        base=settings.config_path.parent,
    )
    display.console.print(render(report))
    return 0


def _stored_greedy(path: Path, wanted: Mapping[str, Any], display: Display) -> Sequence[Result]:
    """Results of an earlier greedy run on the same prompts: what stands at `path`, if its metadata
    are the wanted ones."""
    if not path.exists():
        return ()
    try:
        stored = load_results(path)
    except DataError as error:
        display.line(f"note: no comparison with greedy: {error}")
        return ()
    if metadata_differences(stored.metadata, wanted):
        return ()
    when, host = stored.metadata.get("started_at"), stored.metadata.get("host")
    display.line(f"note: compared with greedy of {when} on {host}, in {path}")
    return stored.results


def _show_results(
    runs: Sequence[Run],
    greedy: Sequence[Result],
    settings: Settings,
    inputs: Inputs,
    display: Display,
) -> None:
    rows, notes = [], []
    for run in runs:
        stored = load_results(run.path)
        results = stored.results
        differing = find_divergences(results, greedy, inputs.prompts)
        rows.append(
            TableRow(run.strategy, results, greedy, frozenset(d.sample_index for d in differing))
        )
        if note := payoff_line(stored.metadata.get("payoff"), settings.models):
            notes += [note, ""]
    display.line("")
    display.line(_title(settings, inputs))
    display.line("")
    display.console.print(summary_table(rows, display.console.width))
    for line in ("", *notes, *(str(run.path) for run in runs)):
        display.line(line)


def _title(settings: Settings, inputs: Inputs) -> str:
    """What the table is of."""
    generation = settings.generation
    models = settings.models[-1:] if settings.strategies == ("greedy",) else settings.models
    parts = [
        " > ".join(model.name for model in models),
        f"{inputs.dataset.name}: {len(inputs.prompts)} samples",
        f"at most {generation.max_new_tokens} new tokens",
    ]
    if not generation.sampling.is_greedy:
        parts.append(f"temperature {generation.sampling.temperature:g}")
    return ", ".join(parts)


if __name__ == "__main__":
    sys.exit(main())
