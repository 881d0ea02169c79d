"""Where each stage runs: a pure function from a models config and a machine to placements.

It opens no device and reads no file, so a laptop can test it for eight GPUs; `machine` looks at the
real one. It knows nothing of processes: the launcher pins and sets variables as a placement says.

What a device means:

- `cuda:N`: GPU N of those this process may see. A list of them spreads one model over the set.
- `cpu:N`: the N-th core this process may use; the stage is pinned to it, a list to several. A
  config that names all of cpu:0 to cpu:M-1 also runs on a machine with fewer than M cores: there
  the numbers wrap and the placement carries a note. Any other core that is missing is an error.
- `cuda`: GPUs that PipeSpec chooses. `cpu`: cores that PipeSpec chooses, a share of those no other
  stage is pinned to, or all of them unpinned where there are fewer cores than stages.
- `auto`: `cuda` where the machine has a GPU, else `cpu`.

Stages may share a device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil, floor
from typing import Final

from pipespec.config import ModelConfig
from pipespec.errors import ModelLoadError
from pipespec.machine import Machine as Machine
from pipespec.machine import this_machine as this_machine

USABLE_SHARE: Final = 0.9  # of a GPU's memory; the rest is the CUDA context and activations
_HEADROOM: Final = 1.1  # weights are to leave so much room for the KV cache
_MAX_GPU_STAGE_THREADS: Final = 4  # such a stage's CPU work is Python and kernel launches
_MIB_PER_THREAD: Final = 16  # fewer weights for each thread, and waking threads costs more


@dataclass(frozen=True, slots=True)
class StagePlacement:
    """Where one stage runs.

    device: what the runner is told inside its process: "cpu", "cuda:0", or "auto" (spread over all
    that the process sees). visible_devices: the process's CUDA_VISIBLE_DEVICES, empty for a CPU
    stage. cores: the process is pinned to these; empty leaves it free. threads: torch threads.
    max_memory_gib: device index inside the process, or "cpu" -> limit, for device "auto". note: a
    warning for the user, or empty.
    """

    device: str
    visible_devices: tuple[str, ...] = ()
    cores: tuple[int, ...] = ()
    threads: int = 1
    max_memory_gib: Mapping[str, float] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True, slots=True)
class _Wish:
    """A stage's devices, parsed: which kind, and which ones (empty: any)."""

    kind: str  # "cuda" or "cpu"
    numbers: tuple[int, ...]


def place(
    models: Sequence[ModelConfig],
    machine: Machine,
    weights_gib: Sequence[float] | None = None,
) -> tuple[StagePlacement, ...]:
    """One placement a model, in the same order.

    weights_gib: the size of each model's weights, if known. It decides how many GPUs and cores a
    model gets where the config leaves that open; without it later models count as larger.

    Raises:
        ModelLoadError: a device that this machine does not have, naming the model.
    """
    assert weights_gib is None or len(weights_gib) == len(models)
    wishes = [_parse(model, machine) for model in models]
    gpus = _choose_gpus(models, wishes, machine, weights_gib)
    cores = _choose_cores(models, wishes, machine, weights_gib)
    return tuple(
        _on_gpus(model, gpus[index], machine, _gpu_share(index, gpus, weights_gib), len(models))
        if wish.kind == "cuda"
        else _on_cores(model, *cores[index])
        for index, (model, wish) in enumerate(zip(models, wishes, strict=True))
    )


def in_process(placement: StagePlacement, machine: Machine) -> StagePlacement:
    """The same place, named for a process that sees the whole machine and not the stage's own
    GPUs alone."""
    gpus = [machine.gpu_ids.index(name) for name in placement.visible_devices]
    if not gpus:
        return placement
    limits = placement.max_memory_gib
    return replace(
        placement,
        device=f"cuda:{gpus[0]}" if len(gpus) == 1 else placement.device,
        visible_devices=machine.gpu_ids,
        max_memory_gib={str(gpu): limits[str(i)] for i, gpu in enumerate(gpus) if str(i) in limits},
    )


def num_gpus_named(models: Sequence[ModelConfig]) -> int:
    """How many GPUs a machine needs for every `cuda:N` in the config to exist."""
    named = [d.partition(":") for model in models for d in model.devices if d.startswith("cuda")]
    return max((int(number or 0) + 1 for _, _, number in named), default=0)


def _parse(model: ModelConfig, machine: Machine) -> _Wish:
    names = [device.partition(":") for device in model.devices]
    kind = names[0][0]
    if kind == "auto":
        kind = "cuda" if machine.gpu_ids else "cpu"
    return _Wish(kind, tuple(int(number) for _, _, number in names if number))


def _choose_gpus(
    models: Sequence[ModelConfig],
    wishes: Sequence[_Wish],
    machine: Machine,
    weights_gib: Sequence[float] | None,
) -> dict[int, tuple[int, ...]]:
    """The GPUs of each CUDA stage, as indexes into the machine's, keyed by the stage's index."""
    num_gpus = len(machine.gpu_ids)
    sizes = _sizes(len(wishes), weights_gib)
    chosen: dict[int, tuple[int, ...]] = {}
    load_gib = [0.0] * num_gpus

    def take(stage: int, gpus: Sequence[int]) -> None:
        chosen[stage] = tuple(gpus)
        for gpu in gpus:
            load_gib[gpu] += sizes[stage] / len(gpus)

    stages = [index for index, wish in enumerate(wishes) if wish.kind == "cuda"]
    for stage in stages:
        _check_gpus(models[stage], wishes[stage].numbers, num_gpus)
        if wishes[stage].numbers:
            take(stage, wishes[stage].numbers)
    free = [stage for stage in stages if not wishes[stage].numbers]
    # The largest first, each on the emptiest GPUs, the highest of them: drafts end up on cuda:0.
    for stage in sorted(free, key=lambda stage: (-sizes[stage], -stage)):
        order = sorted(range(num_gpus), key=lambda gpu: (load_gib[gpu], -gpu))
        count = 1
        if weights_gib is not None:
            room = [USABLE_SHARE * machine.gpu_memory_gib[gpu] - load_gib[gpu] for gpu in order]
            count = _num_that_hold(_HEADROOM * weights_gib[stage], room)
        take(stage, sorted(order[:count]))
    target = len(wishes) - 1
    if weights_gib is None and target in free:
        # Nobody knows how large it is: the target also gets the GPUs that are left.
        unused = [gpu for gpu in range(num_gpus) if load_gib[gpu] == 0.0]
        chosen[target] = tuple(sorted({*chosen[target], *unused}))
    return chosen


def _check_gpus(model: ModelConfig, numbers: Sequence[int], num_gpus: int) -> None:
    missing = [number for number in numbers if number >= num_gpus]
    if num_gpus and not missing:
        return
    wanted = f"cuda:{missing[0]}" if missing else "a GPU"
    if not num_gpus:
        has, remedy = "no GPU", "a GPU"
    else:
        has = f"{num_gpus} GPU{'s' if num_gpus > 1 else ''} (numbered from cuda:0)"
        remedy = "another GPU"
    raise ModelLoadError(
        f'{model.path} wants {wanted}, but this machine shows {has}; change "devices" in the '
        f"models config, or run where there is {remedy}"
    )


def _num_that_hold(wanted_gib: float, room_gib: Sequence[float]) -> int:
    """How many of the GPUs, in this order, have so much room together; all if none is enough."""
    total = 0.0
    for count, room in enumerate(room_gib, start=1):
        total += max(0.0, room)
        if total >= wanted_gib:
            return count
    return len(room_gib)


def _sizes(count: int, weights_gib: Sequence[float] | None) -> Sequence[float]:
    """Weights to compare; unknown ones grow from draft to target, as a config's order promises."""
    return [4.0**index for index in range(count)] if weights_gib is None else weights_gib


def _gpu_share(
    stage: int, gpus: Mapping[int, tuple[int, ...]], weights_gib: Sequence[float] | None
) -> dict[int, float]:
    """The part of each of its GPUs that a stage may fill, by its weights among all on that GPU."""
    count = max(gpus, default=0) + 1
    sizes = _sizes(count, weights_gib)
    shares = {}
    for gpu in gpus.get(stage, ()):
        parts = {s: max(sizes[s], 1e-9) / len(on) for s, on in gpus.items() if gpu in on}
        shares[gpu] = parts[stage] / sum(parts.values())
    return shares


def _on_gpus(
    model: ModelConfig,
    gpus: Sequence[int],
    machine: Machine,
    share: Mapping[int, float],
    num_stages: int,
) -> StagePlacement:
    limits: dict[str, float] = {}
    for index, gpu in enumerate(gpus):
        if model.max_memory_gib is not None:
            limits[str(index)] = float(model.max_memory_gib)
        elif len(gpus) > 1:
            usable_gib = USABLE_SHARE * machine.gpu_memory_gib[gpu] * share[gpu]
            limits[str(index)] = floor(usable_gib * 100) / 100
    threads = min(_MAX_GPU_STAGE_THREADS, len(machine.cores) // num_stages)
    return StagePlacement(
        device="cuda:0" if len(gpus) == 1 else "auto",
        visible_devices=tuple(machine.gpu_ids[gpu] for gpu in gpus),
        threads=model.threads or max(1, threads),
        max_memory_gib=limits,
    )


def _choose_cores(
    models: Sequence[ModelConfig],
    wishes: Sequence[_Wish],
    machine: Machine,
    weights_gib: Sequence[float] | None,
) -> dict[int, tuple[tuple[int, ...], int, str]]:
    """Cores (empty: unpinned), threads and a note for each CPU stage, keyed by its index."""
    cores = machine.cores
    stages = [index for index, wish in enumerate(wishes) if wish.kind == "cpu"]
    named = {number for stage in stages for number in wishes[stage].numbers}
    wraps = max(named, default=0) >= len(cores) and named == set(range(len(named)))
    chosen: dict[int, tuple[tuple[int, ...], int, str]] = {}
    for stage in stages:
        if numbers := wishes[stage].numbers:
            if not wraps:
                _check_cores(models[stage], numbers, len(cores))
            own = tuple(dict.fromkeys(cores[number % len(cores)] for number in numbers))
            lacks = wraps and max(numbers) >= len(cores)
            chosen[stage] = own, len(own), _wrap_note(models[stage], len(cores)) if lacks else ""
    pinned = {core for own, _, _ in chosen.values() for core in own}
    free = [core for core in cores if core not in pinned]
    open_stages = [stage for stage in stages if not wishes[stage].numbers]
    if len(free) < len(open_stages):
        for stage in open_stages:
            chosen[stage] = (), max(1, len(cores) // len(open_stages)), ""
        return chosen
    sizes = None if weights_gib is None else [weights_gib[stage] for stage in open_stages]
    for stage, count in zip(open_stages, _core_counts(len(open_stages), len(free), sizes)):
        chosen[stage] = tuple(free[:count]), count, ""
        free = free[count:]
    return chosen


def _check_cores(model: ModelConfig, numbers: Sequence[int], num_cores: int) -> None:
    if max(numbers) >= num_cores:
        cores = (
            "1 core (cpu:0)"
            if num_cores == 1
            else f"{num_cores} cores (cpu:0 to cpu:{num_cores - 1})"
        )
        raise ModelLoadError(
            f"{model.path} wants cpu:{max(numbers)}, but PipeSpec may use {cores} here; change "
            f'"devices" in the models config, for example to "cpu"'
        )


def _wrap_note(model: ModelConfig, num_cores: int) -> str:
    cores = "is 1 core" if num_cores == 1 else f"are {num_cores} cores"
    return (
        f"{model.name}: there {cores} for a config that names more; stages share a core and will "
        "not overlap in time"
    )


def _core_counts(num_stages: int, num_cores: int, sizes_gib: Sequence[float] | None) -> list[int]:
    """Disjoint shares of the cores: equal (the later stages take the remainder), or where sizes
    are known, in proportion to them and no more than a model of that size can use."""
    counts = [1] * num_stages
    sizes = [1.0] * num_stages if sizes_gib is None else [max(size, 1e-9) for size in sizes_gib]
    most = [num_cores if sizes_gib is None else ceil(s * 1024 / _MIB_PER_THREAD) for s in sizes]
    for _ in range(num_cores - num_stages):
        hungry = [index for index in range(num_stages) if counts[index] < most[index]]
        if not hungry:
            break
        counts[max(hungry, key=lambda index: (sizes[index] / counts[index], index))] += 1
    return counts


def _on_cores(
    model: ModelConfig, cores: tuple[int, ...], threads: int, note: str
) -> StagePlacement:
    limit = model.max_memory_gib
    return StagePlacement(
        device="cpu",
        cores=cores,
        threads=model.threads or threads,
        max_memory_gib={} if limit is None else {"cpu": float(limit)},
        note=note,
    )
