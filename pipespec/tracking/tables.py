"""What is logged as a table: columns and rows, for any tracker."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from pipespec.metrics.verifications import acceptance_by_position, accepted_ids

Result = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class LogTable:
    """Rows of equal length, one item a column. An item that is not known is None."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]


def tables(
    results: Sequence[Result], metadata: Mapping[str, Any], decode: Callable[[Sequence[int]], str]
) -> dict[str, LogTable]:
    """The tables of a run, by key, without those that nothing is known for.

    Args:
        decode: the text of token ids.
    """
    found = {
        "token_accuracy_table": _accepted_tokens(results, decode),
        "profiling_summary_table": _time_shares(results, metadata),
        "pipespec/acceptance_by_position": _positions(results, metadata),
    }
    return {key: table for key, table in found.items() if table.rows}


def _accepted_tokens(results: Sequence[Result], decode: Callable[[Sequence[int]], str]) -> LogTable:
    counts = Counter(token_id for result in results for token_id in accepted_ids(result))
    rows = tuple((decode([token_id]), count) for token_id, count in counts.most_common())
    return LogTable(("token", "accepted_count"), rows)


def _time_shares(results: Sequence[Result], metadata: Mapping[str, Any]) -> LogTable:
    """Four rows a stage, of the time from a prompt's submission to its last token."""
    columns = ("component", "calls", "total_time_s", "avg_time_s", "fraction_of_total_time")
    metrics = [result["metrics"] for result in results]
    if not metrics or any("forward_times_s" not in sample for sample in metrics):
        return LogTable(columns, ())
    total_s = sum(sample["total_time"] for sample in metrics)
    names = [PurePath(model["path"]).name for model in metadata["model_configs"]]
    rows: list[tuple[Any, ...]] = []
    for stage, name in enumerate(names):
        prefill_s, forward_s, wait_s = (
            sum(sample[key][stage] for sample in metrics)
            for key in ("prefill_times_s", "forward_times_s", "wait_times_s")
        )
        num_steps = sum(sample["num_steps"][stage] for sample in metrics)
        step = "draft" if stage == 0 and len(names) > 1 else "verify"
        parts = (
            ("prefill", len(metrics), prefill_s),
            (step if len(names) > 1 else "decode", num_steps, forward_s - prefill_s),
            ("wait", None, wait_s),
            ("rest", None, max(0.0, total_s - forward_s - wait_s)),
        )
        for part, calls, seconds in parts:
            mean_s = seconds / calls if calls else None
            rows.append((f"{stage} {name}: {part}", calls, seconds, mean_s, seconds / total_s))
    return LogTable(columns, tuple(rows))


def _positions(results: Sequence[Result], metadata: Mapping[str, Any]) -> LogTable:
    columns = ("position", "scored", "accepted", "acceptance_rate")
    if metadata.get("tree"):
        return LogTable(columns, ())
    counts = acceptance_by_position([result["metrics"] for result in results])
    rows = tuple(
        (position, scored, accepted, accepted / scored)
        for position, (scored, accepted) in enumerate(counts, start=1)
    )
    return LogTable(columns, rows)
