"""What every script here shares: command line, reading, style, saving.

A script is `python viz/NAME.py RESULTS_FOLDER [--output-dir figures] [--format pdf,png]`, or
`python -m viz.NAME`. It keeps of each sample what it draws (`read`), draws in one style (`style`)
at the width of a column or of a page, and writes every format that was asked for (`Output.save`).
What a run is called and how it looks comes from its metadata (`results.labels`). No torch.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

from pipespec.commands.arguments import Parser
from pipespec.config import STRATEGIES
from pipespec.errors import DataError, NothingLeftError, UsageError
from pipespec.results import ensure_writable, ensure_writable_file
from pipespec.results.labels import Metadata, comparison_key, model_names, run_color, run_order
from pipespec.results.streaming import MISFITS, iterate_results, misfit, read_runs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

T = TypeVar("T")

FORMATS: Final = ("png", "pdf", "svg")
DPI: Final = 200
COLUMN_WIDTH: Final = 3.3  # inches, of a page with two columns
PAGE_WIDTH: Final = 6.9

_FONTS: Final[Any] = {"pdf.fonttype": 42}  # TrueType, which publishers accept and editors can edit
_STYLE: Final[Any] = {  # keys of rcParams
    "figure.constrained_layout.use": True,
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.title_fontsize": 8,
    "legend.frameon": False,
    "legend.handlelength": 2.4,
    "figure.titlesize": 8,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
    "hatch.linewidth": 0.5,
    "text.parse_math": False,  # names of models may have any character
    "savefig.dpi": DPI,
    **_FONTS,
}
_TITLE_CHARACTERS: Final = 56  # that are as wide as a column
_LABEL_CHARACTERS: Final = 50
_MOST_PIXELS: Final = 60_000  # that Agg draws in one direction
_LINES: Final = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
_MARKERS: Final = ("o", "s", "^", "D", "v", "P", "X")
_HATCHES: Final = ("", "////", "....", "xxxx", "\\\\\\\\", "++++", "oo")


# -- command line ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Output:
    """Where pictures go, and in which formats."""

    folder: Path
    formats: tuple[str, ...]

    def save(self, figure: Figure, name: str) -> None:
        """Writes `name` in every format and prints a line for each file.

        Raises:
            UsageError: it cannot be written.
        """
        with style():  # ticks are made when a figure is written
            for form in self.formats:
                path = self.folder / f"{name}.{form}"
                save(figure, path, "--output-dir")
                print(path)


def make_parser(name: str, description: str, *, needs_paths: bool = True) -> Parser:
    """A parser of the arguments that all scripts have; a script adds its own. needs_paths: not if
    what is drawn may come from elsewhere."""
    parser = Parser(prog=f"python viz/{name}.py", description=description)
    parser.add_argument(
        "paths",
        nargs="+" if needs_paths else "*",
        type=Path,
        metavar="RESULTS_FOLDER",
        help="folders of result files, or such files",
    )
    add_output_arguments(parser)
    return parser


def add_output_arguments(parser: Parser) -> None:
    """Where to write what; `open_output` reads it."""
    parser.add_argument(
        "--output-dir", type=Path, default=Path("figures"), metavar="DIR", help="for the pictures"
    )
    parser.add_argument(
        "--format",
        default="pdf,png",
        metavar="LIST",
        help=f"of {', '.join(FORMATS)}, separated by commas",
    )


def open_output(options: argparse.Namespace) -> Output:
    """Where `options` want the pictures; refused before any work is done if they cannot go there.

    Raises:
        UsageError: an unknown format, or a folder that cannot be written to.
    """
    formats = tuple(dict.fromkeys(str(options.format).replace(" ", "").split(",")))
    for form in formats:
        if form not in FORMATS:
            raise UsageError(f"--format is {options.format}; it may name {', '.join(FORMATS)}")
    ensure_writable(options.output_dir)
    return Output(options.output_dir, formats)


def check_output(output: Path) -> None:
    """Refuse a single file that no picture can be written to, before any work is done.

    Raises:
        UsageError: another ending than those of `FORMATS`, or it cannot be written.
    """
    if output.suffix.removeprefix(".") not in FORMATS:
        endings = ", ".join(f".{form}" for form in FORMATS)
        raise UsageError(f"--output is {output}; it must end in {endings}")
    ensure_writable_file(output, "--output")


def save(figure: Figure, output: Path, flag: str = "--output") -> None:
    """Writes a figure to one file; `flag` is to blame if that fails.

    Raises:
        UsageError: it cannot be written.
    """
    import matplotlib

    dpi = min(DPI, _MOST_PIXELS / max(figure.get_size_inches()))
    try:
        with matplotlib.rc_context(_FONTS):
            figure.savefig(output, dpi=dpi)
    except OSError as error:
        raise UsageError(f"{flag}: cannot write {output} ({error.strerror})") from error


# -- reading --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Run(Generic[T]):
    """What is kept of a run. samples: what `keep` gave for each; num_tokens: of all of them, at
    least 1; total_time_s: above 0."""

    path: Path
    metadata: Metadata
    samples: tuple[T, ...]
    num_tokens: int
    total_time_s: float

    @property
    def ms_per_token(self) -> float:
        return self.total_time_s / self.num_tokens * 1000


def read(paths: Iterable[Path], keep: Callable[[Mapping[str, Any]], T]) -> list[Run[T]]:
    """The runs in files and folders, sorted by data set, strategy, models and lookahead. Files that
    cannot be used, and runs without a token, are passed over, each with a line on stderr.

    Args:
        keep: what is kept of a sample, as for `results.streaming.read_runs`.

    Raises:
        NothingLeftError: no file could be used.
        DataError: a path does not exist.
    """
    extracts = read_runs(paths, lambda result: (*_totals(result), keep(result)), pass_over)
    runs = [
        Run(
            extract.path,
            extract.metadata,
            tuple(kept for _, _, kept in extract.samples),
            sum(num_tokens for num_tokens, _, _ in extract.samples),
            sum(seconds for _, seconds, _ in extract.samples),
        )
        for extract in extracts
    ]
    runs.sort(key=lambda run: run_order(run.metadata))
    return usable(runs, lambda run: None if run.num_tokens and run.total_time_s else "has no token")


def usable(runs: Iterable[Run[T]], problem: Callable[[Run[T]], str | None]) -> list[Run[T]]:
    """The runs that have no `problem`; the others are passed over, each with a line on stderr.

    Raises:
        NothingLeftError: none is left.
    """
    left: list[Run[T]] = []
    for run in runs:
        try:
            reason = problem(run)
        except MISFITS as error:
            reason = misfit(error)
        if reason is None:
            left.append(run)
        else:
            pass_over(f"passed over: {run.path} {reason}")
    if not left:
        raise NothingLeftError("none of these runs has what this picture shows")
    return left


def fastest(runs: Iterable[Run[T]], key: Callable[[Metadata], Any]) -> list[Run[T]]:
    """Of the runs of each data set and target that are alike in `key`, the one with the fewest
    milliseconds a token."""
    alike = groups(runs, lambda run: (comparison_key(run.metadata), key(run.metadata)))
    return [min(found, key=lambda run: run.ms_per_token) for found in alike.values()]


def read_sample(
    runs: Sequence[Run[int]], wanted: int | None, keep: Callable[[Mapping[str, Any]], T]
) -> tuple[int, list[tuple[Run[int], T]]]:
    """One sample of runs that can be compared, read again from their files: its index, and what is
    kept of it of each run that has it. The others are passed over.

    Args:
        runs: with the indexes of their samples (`read` with `sample_index`).
        wanted: None is the first of those that most of the runs have.
        keep: as of `read`; a DataError says why a sample cannot be drawn.
    """
    counts = Counter(index for run in runs for index in set(run.samples))
    if wanted is None:
        wanted = min(counts, key=lambda index: (-counts[index], index))
    found: list[tuple[Run[int], T]] = []
    for run in runs:
        try:
            results = (r for r in iterate_results(run.path) if r["sample_index"] == wanted)
            result = next(results, None)
            if result is None:
                raise DataError(f"has no sample {wanted}")
            found.append((run, keep(result)))
        except DataError as error:
            pass_over(f"passed over: {run.path} {error}")
        except MISFITS as error:
            pass_over(f"passed over: {run.path} sample {wanted} {misfit(error)}")
    return wanted, found


def sample_index(result: Mapping[str, Any]) -> int:
    """What `read_sample` needs to know of a sample."""
    return int(result["sample_index"])


def strategy_and_models(metadata: Metadata) -> tuple[str, tuple[str, ...]]:
    """What a run is, whatever its schedule."""
    return metadata["strategy"], model_names(metadata)


def by_target(runs: Iterable[Run[T]]) -> dict[str, list[Run[T]]]:
    """Runs that can be compared, by the title of the panel that has them."""
    return groups(runs, lambda run: "{}, target {}".format(*comparison_key(run.metadata)))


def _totals(result: Mapping[str, Any]) -> tuple[int, float]:
    """Output tokens and seconds of a sample."""
    metrics = result["metrics"]
    return int(metrics["tokens_generated"]), float(metrics["total_time"])


def pass_over(line: str) -> None:
    """Says on stderr what is left out, and why."""
    print(line, file=sys.stderr)


# -- style ----------------------------------------------------------------------------------


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Figures that are made in this context have the style of all pictures."""
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        yield


@dataclass(frozen=True, slots=True)
class Look:
    """How the runs of one strategy and models are drawn: never told apart by colour alone."""

    color: str
    line: Any
    marker: str
    hatch: str


def looks(
    all_metadata: Iterable[Metadata], kind: Callable[[Metadata], Hashable] = model_names
) -> Callable[[Metadata], Look]:
    """The look of each run of a picture: the colour is the strategy's, the rest says which `kind`
    of it, in the order in which they come among the runs of one data set and target."""
    seen: dict[Hashable, list[Hashable]] = {}
    for metadata in all_metadata:
        kinds = seen.setdefault((metadata["strategy"], comparison_key(metadata)), [])
        if kind(metadata) not in kinds:
            kinds.append(kind(metadata))

    def look(metadata: Metadata) -> Look:
        strategy = metadata["strategy"]
        first = STRATEGIES.index(strategy) if strategy in STRATEGIES else len(STRATEGIES)
        place = first + seen[strategy, comparison_key(metadata)].index(kind(metadata))
        return Look(
            run_color(metadata),
            _LINES[place % len(_LINES)],
            _MARKERS[place % len(_MARKERS)],
            _HATCHES[place % len(_HATCHES)],
        )

    return look


def make_panels(
    num_panels: int, panel_height: float = 2.2, **options: Any
) -> tuple[Figure, list[Axes]]:
    """A figure of one panel at the width of a column, or of several at that of a page, two beside
    each other. options: of `Figure.subplots`."""
    from matplotlib.figure import Figure

    num_columns = min(num_panels, 2)
    num_rows = -(-num_panels // 2)
    width = COLUMN_WIDTH if num_columns == 1 else PAGE_WIDTH
    figure = Figure(figsize=(width, panel_height * num_rows))
    grid = figure.subplots(num_rows, num_columns, squeeze=False, **options)
    panels = list(grid.flat)
    for unused in panels[num_panels:]:
        unused.remove()
    return figure, panels[:num_panels]


def add_head(axes: Axes, title: str, num_columns: int = 1) -> None:
    """A panel's title and, below it, its legend; both above the axes, where they hide nothing."""
    title = wrapped(title, _TITLE_CHARACTERS * num_columns)
    handles, labels = axes.get_legend_handles_labels()
    if not labels:
        axes.set_title(title)
        return
    axes.legend(
        handles,
        [wrapped(label) for label in labels],
        title=title,
        ncols=num_columns,
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        borderaxespad=0.2,
        columnspacing=1.2,
    )


def wrapped(text: str, num_characters: int = _LABEL_CHARACTERS) -> str:
    """In lines of so many characters, where there is a space to break it at."""
    return textwrap.fill(text, num_characters, break_long_words=False, break_on_hyphens=False)


def number(value: float) -> str:
    """With as many digits as a reader can use."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) >= 100:
        return f"{value:.1f}"
    return f"{value:.2f}" if abs(value) >= 1 else f"{value:.3g}"


def groups(items: Iterable[T], key: Callable[[T], Any]) -> dict[Any, list[T]]:
    """Items by key, in the order in which the keys come."""
    found: dict[Any, list[T]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return found
