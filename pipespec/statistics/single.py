"""One file: what was run, each of its samples, and each of its devices."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from pipespec.metrics import SampleTotals, Summary, definitions, energy_estimate_j, summarise
from pipespec.results.labels import model_names, run_label, stage_devices
from pipespec.statistics.comparison import ESTIMATED, POWER_SAMPLES, RECORDED
from pipespec.statistics.groups import Run, devices_of
from pipespec.statistics.tables import Column, Row, Table

_METADATA: Final = (Column("key", "key", is_text=True), Column("value", "value", is_text=True))
_SAMPLES: Final = (
    Column("sample_index", "sample"),
    Column("num_tokens", "tokens"),
    Column("total_time_s", "seconds", digits=2),
    Column("ms_per_token", "ms/token", digits=2),
    Column("tokens_per_s", "tokens/s", digits=1, rank=2),
    Column("num_target_forwards", "target forwards", rank=3),
    Column("acceptance_rate", "acceptance rate", digits=3, rank=1),
    Column("block_efficiency", "block efficiency", digits=2, rank=1),
    Column("energy_j", "J", digits=1),
    Column("energy_source"),
)
_DEVICES: Final = (
    Column("device", "device"),
    Column("models", "models", is_text=True),
    Column("mean_utilization_percent", "utilization", digits=1, unit=" %"),
    Column("mean_power_w", "power", digits=1, unit=" W"),
    Column("energy_from_power_j", "energy", digits=1, unit=" J"),
)


def single_tables(run: Run) -> list[Table]:
    """Metadata, samples and, where they were watched, devices."""
    devices = devices_of(run.metadata)
    label = run_label(run.metadata, name_dataset=True)
    samples = tuple(_sample_row(sample, devices) for sample in run.samples)
    tables = [
        Table(f"{run.path}: {label}", _METADATA, _metadata_rows(run.metadata)),
        Table("samples", _SAMPLES, samples, notes=tuple(_sums(run, samples, devices))),
    ]
    if any(sample.gpu_powers_w or sample.gpu_utilizations for sample in run.samples) and devices:
        rows = tuple(_device_row(run, device) for device in devices)
        tables.append(Table("devices of its models, means over time", _DEVICES, rows))
    return tables


def _metadata_rows(metadata: Mapping[str, Any]) -> tuple[Row, ...]:
    return tuple(
        {"key": key, "value": value if isinstance(value, str) else json.dumps(value)}
        for key, value in metadata.items()
    )


def _sample_row(sample: SampleTotals, devices: Sequence[int]) -> Row:
    summary = summarise([sample])
    energy_j, source = sample.energy_j, RECORDED
    if energy_j is None:
        energy_j, source = energy_estimate_j([sample], devices), POWER_SAMPLES
    return {
        "sample_index": sample.sample_index,
        "num_tokens": sample.num_tokens,
        "total_time_s": float(sample.total_time_s),
        "ms_per_token": summary.ms_per_token,
        "tokens_per_s": summary.tokens_per_s,
        "num_target_forwards": sample.num_target_forwards,
        "acceptance_rate": summary.acceptance_rate,
        "block_efficiency": summary.block_efficiency,
        "energy_j": energy_j,
        "energy_source": None if energy_j is None else source,
    }


def _sums(run: Run, rows: Sequence[Row], devices: Sequence[int]) -> list[str]:
    """What the original's `print_single` printed."""
    summary = summarise(run.samples)
    samples = "1 sample" if summary.num_samples == 1 else f"{summary.num_samples} samples"
    notes = [f"{samples}: {summary.num_tokens:,} tokens in {summary.total_time_s:,.2f} s"]
    times = [value for row in rows if isinstance(value := row["ms_per_token"], float)]
    if summary.ms_per_token is not None and times:
        notes.append(
            f"ms/token: {summary.ms_per_token:.2f} in all, {min(times):.2f} to {max(times):.2f} "
            "by sample"
        )
    return notes + _energy_notes(run, summary, devices)


def _energy_notes(run: Run, summary: Summary, devices: Sequence[int]) -> list[str]:
    """In all, and by whatever it is known."""
    notes = []
    recorded_j = summary.energy_per_token_j
    if recorded_j is not None:
        total_j = recorded_j * summary.num_tokens
        notes.append(f"energy, as recorded: {total_j:,.1f} J, {recorded_j:.2f} J/token")
    estimate_j = energy_estimate_j(run.samples, devices)
    if estimate_j is not None:
        per_token_j = definitions.energy_per_token(estimate_j, summary.num_tokens)
        notes.append(
            f"energy, estimated as mean sampled power times time: {ESTIMATED}{estimate_j:,.1f} J, "
            f"{ESTIMATED}{per_token_j:.2f} J/token"
        )
    if not notes:
        notes.append("energy: neither it nor the power of the run's devices was recorded")
    return notes


def _device_row(run: Run, device: int) -> Row:
    """Over all samples; a long sample weighs more than a short one."""
    stages = zip(model_names(run.metadata), stage_devices(run.metadata))
    return {
        "device": device,
        "models": tuple(name for name, devices in stages if device in devices),
        "mean_utilization_percent": _mean_over_time(
            [(_at(sample.gpu_utilizations, device), sample.total_time_s) for sample in run.samples]
        ),
        "mean_power_w": _mean_over_time(
            [(_at(sample.gpu_powers_w, device), sample.total_time_s) for sample in run.samples]
        ),
        "energy_from_power_j": energy_estimate_j(run.samples, [device]),
    }


def _at(values: Sequence[float | None], gpu: int) -> float | None:
    return values[gpu] if gpu < len(values) else None


def _mean_over_time(values: Sequence[tuple[float | None, float]]) -> float | None:
    """Of the samples that have a value."""
    known = [(value, time_s) for value, time_s in values if value is not None]
    return definitions.ratio(
        sum(value * time_s for value, time_s in known), sum(time_s for _, time_s in known)
    )
