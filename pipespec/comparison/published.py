"""`python -m pipespec.comparison.published`: published runs, and ours of the same configurations.

`plan` writes a models config for each set of models that was published and prints the flags of one
benchmark a line, separated by tabs; `table` prints the published numbers beside the result files
that those benchmarks have written. `launch/reproduce_paper.sh` calls both; the numbers and their
source are in a file of their own, `launch/published.json`.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rich import box
from rich.table import Table

from pipespec.commands.arguments import Parser
from pipespec.commands.display import make_console
from pipespec.commands.entry import print_line, run_command
from pipespec.config import ModelConfig, find_models_config, load_models_config, model_to_json
from pipespec.errors import DataError, PipeSpecError, UsageError
from pipespec.metrics import speed_up, summarise
from pipespec.results import RunFile, load_results, result_file_name

NOTHING: Final = "-"
EMULATED_PREFIX: Final = "emulated-"
_TABLE_WIDTH: Final = 104


@dataclass(frozen=True, slots=True)
class PublishedRun:
    """One row. models: names, smallest draft first; greedy has the target alone. flags: of our
    benchmark for the same schedule. speed_up: over greedy on the prompts that both have."""

    strategy: str
    models: tuple[str, ...]
    flags: tuple[str, ...]
    ms_per_token: float
    speed_up: float

    def flag(self, name: str) -> str | None:
        """The value of a flag, if it is set."""
        return self.flags[self.flags.index(name) + 1] if name in self.flags else None


@dataclass(frozen=True, slots=True)
class Published:
    """A group of runs with one target. config: the models config of all its models."""

    source: str
    hardware: str
    config: Path
    runs: tuple[PublishedRun, ...]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    return run_command(lambda: _main(make_parser().parse_args(arguments)))


def make_parser() -> Parser:
    """All flags of the command."""
    parser = Parser(
        prog="python -m pipespec.comparison.published",
        description="Published runs beside ours; see launch/reproduce_paper.sh.",
    )
    parser.add_argument("action", choices=("plan", "table"))
    parser.add_argument("published", type=Path, metavar="FILE", help="the published numbers")
    parser.add_argument("--group", required=True, help="of the file's groups")
    parser.add_argument("--hardware", choices=("emulated", "real"), default="emulated")
    parser.add_argument("--output-dir", type=Path, required=True, metavar="DIR", help="results")
    return parser


def _main(options: Namespace) -> int:
    published = read_published(options.published, options.group, options.hardware)
    if options.action == "plan":
        for flags in plan(published, options.output_dir):
            sys.stdout.write("\t".join(flags) + "\n")
    else:
        console = make_console()
        console.width = max(console.width, _TABLE_WIDTH)
        lines, table = comparison_table(published, options.output_dir, options.group)
        for line in lines:
            print_line(console, line)
        console.print(table)
    return 0


def read_published(path: Path, group: str, hardware: str) -> Published:
    """A group of the file.

    Raises:
        UsageError: it has no such group.
        DataError: it is missing or damaged.
    """
    try:
        content = json.loads(path.read_bytes())
        if group not in content["groups"]:
            raise UsageError(f"--group is {group}; {path} has {', '.join(content['groups'])}")
        chosen = content["groups"][group]
        return Published(
            content["source"],
            content["hardware"],
            find_models_config(chosen[hardware]),
            tuple(PublishedRun(**_tuples(run)) for run in chosen["runs"]),
        )
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is no file of published runs ({error})") from error


def plan(published: Published, output_dir: Path) -> list[list[str]]:
    """The flags of one benchmark for each published run, and one for each set of models by our own
    defaults. Writes the models configs that they name.

    Raises:
        PipeSpecError: the folder cannot be written.
    """
    models = load_models_config(published.config)
    lines: dict[tuple[str, ...], None] = {}
    for run in published.runs:
        config = _write_config(_models_of(run, models), output_dir)
        common = (
            *("--strategy", run.strategy, "--models-config-path", str(config)),
            *("--output-dir", str(output_dir)),
        )
        lines[(*common, *run.flags)] = None
        if run.strategy != "greedy":
            lines[common] = None
    return [list(line) for line in lines]


def comparison_table(published: Published, output_dir: Path, group: str) -> tuple[list[str], Table]:
    """What the table is of, and the table. What has not run yet is left open.

    Raises:
        DataError: a result file that is damaged.
    """
    models = load_models_config(published.config)
    target = _models_of(published.runs[-1], models)[-1]
    greedy = _load(output_dir / result_file_name("greedy", [target.name], None))
    table = _empty_table()
    for run in published.runs:
        names = [model.name for model in _models_of(run, models)]
        lookahead = int(run.flag("--lookahead") or 0)
        same = _load(output_dir / result_file_name(run.strategy, names, lookahead))
        auto = None
        if run.strategy != "greedy":
            auto = _load(output_dir / result_file_name(run.strategy, names, None, auto=True))
        table.add_row(
            run.strategy,
            " > ".join(map(_short, run.models)),
            _schedule(run),
            f"{run.ms_per_token:.1f}",
            f"{run.speed_up:.2f}x",
            *_cells(same, greedy),
            _cells(auto, greedy)[0],
        )
    is_emulated = target.emulated is not None
    title = f"{'EMULATED ' if is_emulated else ''}{group}: published, and ours"
    ours = f"emulated models of {published.config.name}" if is_emulated else published.config.name
    return [
        title,
        f"published: {published.source}",
        f"  on {published.hardware}",
        f"ours: {ours}",
    ], table


def _schedule(run: PublishedRun) -> str:
    """Our flags in words: "pipespec, lookahead 0"."""
    lookahead = run.flag("--lookahead")
    parts = [run.flag("--policy"), None if lookahead is None else f"lookahead {lookahead}"]
    return ", ".join(filter(None, parts)) or NOTHING


def _empty_table() -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("strategy", no_wrap=True)
    table.add_column("models", no_wrap=True)
    table.add_column("our schedule", no_wrap=True)
    for header in (
        "published\nms/token",
        "\nspeed-up",
        "ours\nms/token",
        "\nspeed-up",
        "by default\nms/token",
    ):
        table.add_column(header, justify="right", no_wrap=True)
    return table


def _cells(run: RunFile | None, greedy: RunFile | None) -> tuple[str, str]:
    """Milliseconds a token and speed-up of a run of ours."""
    if run is None:
        return NOTHING, NOTHING
    ms_per_token = summarise(run.results).ms_per_token
    gain = None if greedy is None else speed_up(run.results, greedy.results).speed_up
    return (
        NOTHING if ms_per_token is None else f"{ms_per_token:.1f}",
        NOTHING if gain is None else f"{gain:.2f}x",
    )


def _models_of(run: PublishedRun, models: Sequence[ModelConfig]) -> list[ModelConfig]:
    """The entries of a models config that a run names, emulated or not.

    Raises:
        DataError: the config lacks one.
    """
    by_name = {model.name.removeprefix(EMULATED_PREFIX): model for model in models}
    missing = [name for name in run.models if name not in by_name]
    if missing:
        raise DataError(f"the models config has no {missing[0]}, which a published run names")
    return [by_name[name] for name in run.models]


def _write_config(models: Sequence[ModelConfig], output_dir: Path) -> Path:
    path = output_dir / "configs" / f"{'-'.join(model.name for model in models)}.json"
    text = json.dumps([model_to_json(model) for model in models], indent=2) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise PipeSpecError(f"cannot write {path} ({error.strerror or error})") from error
    return path


def _load(path: Path) -> RunFile | None:
    return load_results(path) if path.is_file() else None


def _short(name: str) -> str:
    """ "1B" of "Llama-3.2-1B-Instruct"."""
    parts = [part for part in name.split("-") if part[:-1].isdigit() and part.endswith("B")]
    return parts[0] if parts else name


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
    }


if __name__ == "__main__":
    sys.exit(main())
