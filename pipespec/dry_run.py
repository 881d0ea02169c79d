"""What a run would need, without starting it: memory of each stage and device, and the placement.

Everything comes from config.json files (and headers of weights that are already here), so it works
for a cluster from a laptop without a network. It knows weights and KV cache; what CUDA and the
activations take is the tenth of a device's memory that it leaves free.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pipespec.checkpoint import CheckpointShape, locate_cached
from pipespec.config import ModelConfig
from pipespec.placement import USABLE_SHARE, Machine, StagePlacement, num_gpus_named, place

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

_GIB: Final = 1 << 30
_TABLE_SOURCE: Final = "PipeSpec's table"
_CPU: Final = "cpu"


def _llama(
    hidden: int,
    inner: int,
    layers: int,
    heads: int,
    kv_heads: int,
    vocab: int,
    context: int,
    *,
    kind: str = "llama",
    head_dim: int | None = None,
    tied: bool = False,
) -> Mapping[str, Any]:
    """The sizes in a config.json, as far as they matter here."""
    return {
        "model_type": kind,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim or hidden // heads,
        "vocab_size": vocab,
        "max_position_embeddings": context,
        "tie_word_embeddings": tied,
    }


# The hub models of the shipped configs, so that their dry run needs no download and no token.
KNOWN_CONFIGS: Final[Mapping[str, Mapping[str, Any]]] = {
    "meta-llama/Llama-3.2-1B-Instruct": _llama(2048, 8192, 16, 32, 8, 128256, 131072, tied=True),
    "meta-llama/Llama-3.1-8B-Instruct": _llama(4096, 14336, 32, 32, 8, 128256, 131072),
    "meta-llama/Meta-Llama-3.1-70B-Instruct": _llama(8192, 28672, 80, 64, 8, 128256, 131072),
    "JackFram/llama-68m": _llama(768, 3072, 2, 12, 12, 32000, 2048),
    "meta-llama/Llama-2-7b-chat-hf": _llama(4096, 11008, 32, 32, 32, 32000, 4096),
    "meta-llama/Llama-2-13b-chat-hf": _llama(5120, 13824, 40, 40, 40, 32000, 4096),
    "Qwen/Qwen3-0.6B": _llama(
        1024, 3072, 28, 16, 8, 151936, 40960, kind="qwen3", head_dim=128, tied=True
    ),
    "Qwen/Qwen3-8B": _llama(4096, 12288, 36, 32, 8, 151936, 40960, kind="qwen3"),
    "Qwen/Qwen3-32B": _llama(5120, 25600, 64, 64, 8, 151936, 40960, kind="qwen3", head_dim=128),
}


@dataclass(frozen=True, slots=True)
class StageNeed:
    """One stage: its shape (None: unknown), the KV cache's positions, memory in bytes, its place,
    and devices, the labels of those that hold it."""

    model: ModelConfig
    shape: CheckpointShape | None
    num_positions: int
    weight_bytes: int
    kv_bytes: int
    placement: StagePlacement
    devices: tuple[str, ...]

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.kv_bytes


@dataclass(frozen=True, slots=True)
class DeviceNeed:
    """One device: the bytes that its stages need there, its size if it is known."""

    label: str
    stages: tuple[str, ...]
    needed_bytes: int
    memory_gib: float | None
    is_complete: bool  # whether the sizes of all its stages are known

    @property
    def fits(self) -> bool | None:
        """Whether it holds its stages; None if that cannot be known."""
        if self.memory_gib is None:
            return None
        if self.needed_bytes > USABLE_SHARE * self.memory_gib * _GIB:
            return False
        return True if self.is_complete else None


@dataclass(frozen=True, slots=True)
class DryRun:
    """The whole run, first draft first. notes: what the user should know besides the tables."""

    stages: tuple[StageNeed, ...]
    devices: tuple[DeviceNeed, ...]
    num_slots: int
    notes: tuple[str, ...]

    @property
    def total_bytes(self) -> int:
        return sum(stage.total_bytes for stage in self.stages)

    @property
    def fits(self) -> bool | None:
        """Whether every device holds its stages; None if that cannot be known."""
        found = {device.fits for device in self.devices}
        return False if False in found else None if None in found else True


def dry_run_report(
    models: Sequence[ModelConfig],
    machine: Machine,
    context_length: int | None,
    num_slots: int = 1,
    base: Path | None = None,
) -> DryRun:
    """What `models` need for `num_slots` requests of up to `context_length` positions each (None:
    as many as each model can). GPUs that the machine does not have are taken as wished.

    Raises:
        ModelLoadError: a local model or a core that does not exist.
    """
    shapes = [_shape(model, base) for model in models]
    wished = _with_wished_gpus(models, machine)
    weights = [_weight_bytes(model, shape) for model, shape in zip(models, shapes, strict=True)]
    is_complete = all(shape or model.emulated is not None for model, shape in zip(models, shapes))
    weights_gib = [size / _GIB for size in weights] if is_complete else None
    stages = []
    for model, shape, size, placement in zip(
        models, shapes, weights, place(models, wished, weights_gib), strict=True
    ):
        limit = shape.context_length if shape else 0
        positions = num_slots * (limit if context_length is None else min(context_length, limit))
        kv_bytes = positions * shape.kv_bytes_per_token(model.dtype) if shape else 0
        devices = tuple(f"cuda:{wished.gpu_ids.index(gpu)}" for gpu in placement.visible_devices)
        stages.append(
            StageNeed(model, shape, positions, size, kv_bytes, placement, devices or (_CPU,))
        )
    return DryRun(
        stages=tuple(stages),
        devices=_devices(stages, machine),
        num_slots=num_slots,
        notes=tuple(_notes(stages, machine, len(wished.gpu_ids))),
    )


def _shape(model: ModelConfig, base: Path | None) -> CheckpointShape | None:
    if model.emulated is not None:
        return None
    folder = locate_cached(model.path, base)
    if folder is not None:
        return CheckpointShape.read(folder)
    known = KNOWN_CONFIGS.get(model.path)
    return CheckpointShape.from_config(known, _TABLE_SOURCE) if known else None


def _weight_bytes(model: ModelConfig, shape: CheckpointShape | None) -> int:
    return shape.weight_bytes(model.dtype, model.quantize) if shape else 0


def _with_wished_gpus(models: Sequence[ModelConfig], machine: Machine) -> Machine:
    """The machine, with as many GPUs as the config names; those it lacks have no known size."""
    missing = num_gpus_named(models) - len(machine.gpu_ids)
    if missing <= 0:
        return machine
    first = len(machine.gpu_ids)
    return replace(
        machine,
        gpu_ids=(*machine.gpu_ids, *(str(first + index) for index in range(missing))),
        gpu_memory_gib=(*machine.gpu_memory_gib, *[0.0] * missing),
    )


def _devices(stages: Sequence[StageNeed], machine: Machine) -> tuple[DeviceNeed, ...]:
    """Needs by device; a stage on several is taken to spread evenly."""
    sizes_gib: dict[str, float] = {
        f"cuda:{index}": gib for index, gib in enumerate(machine.gpu_memory_gib)
    }
    sizes_gib[_CPU] = machine.memory_gib
    labels = dict.fromkeys(label for stage in stages for label in stage.devices)
    needs = []
    for label in sorted(labels, key=lambda label: (label == _CPU, len(label), label)):
        held = [stage for stage in stages if label in stage.devices]
        needs.append(
            DeviceNeed(
                label=label,
                stages=tuple(stage.model.name for stage in held),
                needed_bytes=sum(-(-stage.total_bytes // len(stage.devices)) for stage in held),
                memory_gib=sizes_gib.get(label),
                is_complete=all(s.shape or s.model.emulated is not None for s in held),
            )
        )
    return tuple(needs)


def _notes(stages: Sequence[StageNeed], machine: Machine, num_gpus: int) -> list[str]:
    notes = []
    if num_gpus > len(machine.gpu_ids):
        has = len(machine.gpu_ids)
        notes.append(
            f"not on this machine: needs {num_gpus} GPU{'s' if num_gpus > 1 else ''}, has {has}"
        )
    notes += [stage.placement.note for stage in stages if stage.placement.note]
    listed = [stage.model.path for stage in stages if _is_listed(stage.shape)]
    if listed:
        notes.append(f"shape from {_TABLE_SOURCE}: {', '.join(dict.fromkeys(listed))}")
    for stage in stages:
        path, shape = stage.model.path, stage.shape
        if stage.model.emulated is not None:
            notes.append(f"{path}: emulated, holds no weights")
        elif shape is None:
            notes.append(f"{path}: size unknown, its config.json is not in the Hugging Face cache")
        elif not shape.is_exact:
            notes.append(f"{path}: size estimated, {shape.architecture} is not known exactly")
    return notes


def _is_listed(shape: CheckpointShape | None) -> bool:
    return shape is not None and shape.source == _TABLE_SOURCE


def render(report: DryRun) -> RenderableType:
    """The report for a terminal: stages, devices, notes."""
    from rich.console import Group
    from rich.text import Text

    verdict = {True: "it fits", False: "it does not fit", None: "whether it fits is not known"}
    total = f"In all {format_bytes(report.total_bytes)} of weights and KV cache; "
    lines = [Text(f"- {note}") for note in report.notes]
    return Group(
        _memory_table(report),
        _placement_table(report),
        _device_table(report),
        Text(f"{total}{verdict[report.fits]}."),
        *lines,
    )


def _memory_table(report: DryRun) -> Table:
    table = _table("Memory, first draft first", "model", "dtype", "parameters", "weights")
    slots = f" ({report.num_slots} requests)" if report.num_slots > 1 else ""
    table.add_column(f"KV cache{slots}")
    for stage in report.stages:
        model, shape = stage.model, stage.shape
        _add_row(
            table,
            model.name,
            model.dtype if model.quantize is None else f"{model.quantize} ({model.dtype})",
            format_count(shape.num_parameters) if shape else "-",
            format_bytes(stage.weight_bytes) if shape else "-",
            f"{format_bytes(stage.kv_bytes)} at {stage.num_positions}" if shape else "-",
        )
    return table


def _placement_table(report: DryRun) -> Table:
    table = _table(
        "Placement (visible: the process's CUDA_VISIBLE_DEVICES)",
        *("model", "device", "visible", "cores", "threads"),
    )
    for stage in report.stages:
        place_ = stage.placement
        _add_row(
            table,
            stage.model.name,
            " ".join(stage.devices),
            ",".join(place_.visible_devices) or "none",
            ",".join(map(str, place_.cores)) or "any",
            str(place_.threads),
        )
    return table


def _device_table(report: DryRun) -> Table:
    table = _table("Devices", "device", "stages", "needs", "has", "fits")
    for device in report.devices:
        has = "?" if device.memory_gib is None else f"{device.memory_gib:.1f} GiB"
        fits = {True: "yes", False: "no", None: "?"}[device.fits]
        needs = format_bytes(device.needed_bytes)
        _add_row(table, device.label, ", ".join(device.stages), needs, has, fits)
    return table


def _add_row(table: Table, *cells: str) -> None:
    """A row of plain text: a name in brackets is not markup."""
    from rich.text import Text

    table.add_row(*map(Text, cells))


def _table(title: str, *columns: str) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def format_bytes(count: int) -> str:
    """Bytes in MiB, or in GiB from one on."""
    size, unit = (count / _GIB, "GiB") if count >= _GIB else (count / (1 << 20), "MiB")
    return f"{size:.{1 if size < 99.95 else 0}f} {unit}"


def format_count(count: int) -> str:
    """A number of parameters with three significant digits, such as 8.03B."""
    for unit, letter in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= unit:
            digits = 2 if count < 10 * unit else 1 if count < 100 * unit else 0
            return f"{count / unit:.{digits}f}{letter}"
    return str(count)
