"""An evaluation as tables of at most 80 columns, and its samples as text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rich import box
from rich.console import Console
from rich.table import Table

from pipespec.demo.figures import PASS_AT, Evaluation, PairFigures
from pipespec.demo.measures import LOOKAHEADS, TOP, Speculation


def print_evaluation(evaluation: Evaluation, console: Console) -> None:
    """Write every table, then the samples."""
    longest = max(LOOKAHEADS)
    tables = {
        "models alone: bits per byte of held-out text, greedy text, arithmetic": _models,
        "draft -> target: agreement, accepted of k drafts, correction token in top n": _speculation,
        f"draft -> target: share of rounds of {longest} that accept draft 1, 2, ...": _by_place,
        "draft -> target on held-out library text: same likeliest token, overlap at T=1": _on_text,
    }
    for title, table_of in tables.items():
        console.print(title, style="italic", highlight=False)
        console.print(table_of(evaluation))
        console.print()
    for sample in evaluation.samples:
        console.rule(f"{sample.name}, by {evaluation.models[-1].name}", align="left")
        console.print(sample.prompt, end="", style="dim", markup=False, highlight=False)
        console.print(sample.continuation, markup=False, highlight=False)


def _models(evaluation: Evaluation) -> Table:
    table = _table(
        *("model", "parameters", "library", "other", "distinct\n4-grams", "repeated\nshare"),
        *(f"pass@{k}" for k in PASS_AT),
    )
    for model in evaluation.models:
        table.add_row(
            model.name,
            f"{model.num_parameters:,}",
            _figure(model.library_bits_per_byte, 3),
            _figure(model.other_bits_per_byte, 3),
            _figure(model.distinct_4grams),
            _figure(model.repeated_share),
            *(_figure(model.pass_at.get(k)) for k in PASS_AT),
        )
    xz = evaluation.xz
    table.add_row("xz -9e", "", _figure(xz.on_library, 3), _figure(xz.on_other, 3))
    table.add_row("xz after train", "", _figure(xz.on_library_after_train, 3))
    return table


def _speculation(evaluation: Evaluation) -> Table:
    table = _table(
        "",
        "agree (SE)",
        *(f"k={k}" for k in LOOKAHEADS),
        *(f"top {n}" for n in TOP),
    )
    for label, figures in _rows(evaluation, table):
        table.add_row(
            label,
            f"{_figure(figures.agreement, 3)} ({_figure(figures.standard_error, 3)})",
            *_figures(figures.mean_accepted),
            *_figures(figures.correction_in_top),
        )
    return table


def _by_place(evaluation: Evaluation) -> Table:
    table = _table("", *map(str, range(1, max(LOOKAHEADS) + 1)))
    for label, figures in _rows(evaluation, table):
        table.add_row(label, *_figures(figures.accepted_at))
    return table


def _on_text(evaluation: Evaluation) -> Table:
    table = _table("", "agree", "overlap", "agree,\nno repeat", "overlap,\nno repeat")
    for pair in evaluation.pairs_on_text:
        table.add_row(
            f"{pair.draft} -> {pair.target}",
            _figure(pair.agreement, 3),
            _figure(pair.overlap, 3),
            _figure(pair.clean_agreement, 3),
            _figure(pair.clean_overlap, 3),
        )
    return table


def _rows(evaluation: Evaluation, table: Table) -> Iterator[tuple[str, Speculation]]:
    """A line with each pair's name, added here, then its figures with their labels."""
    by_pair: dict[tuple[str, str], list[PairFigures]] = {}
    for figures in evaluation.pairs:
        by_pair.setdefault((figures.draft, figures.target), []).append(figures)
    for (draft, target), listed in by_pair.items():
        table.add_row(f"{draft} -> {target}")
        for figures in listed:
            kind = f"T={figures.temperature:g}" if figures.temperature else "greedy"
            yield f"  {kind}", figures.plain
            yield f"  {kind}, no repeat", figures.clean


def _table(*headings: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in headings:
        is_first = not table.columns
        table.add_column(heading, justify="left" if is_first else "right", no_wrap=is_first)
    return table


def _figures(values: Mapping[int, float | None]) -> Iterator[str]:
    return map(_figure, values.values())


def _figure(value: float | None, num_digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{num_digits}f}"
