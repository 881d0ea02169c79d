"""The GPUs as NVML shows them. Opens no CUDA context; NVML is handed in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import combinations
from typing import Any, Final, TypeVar

from pipespec.checkup.findings import Finding, Section, ok, problem, warning

_GIB: Final = 1 << 30
_LITTLE_GIB: Final = 1.0  # that a driver may hold of its own
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU; None is what NVML does not tell. link: PCIe generation and lanes. num_processes: of
    any user, with memory on it."""

    index: int
    name: str
    memory_gib: float
    used_gib: float
    capability: tuple[int, int] | None
    persistence: bool | None
    ecc: bool | None
    power_limit_w: float | None
    default_limit_w: float | None
    utilization_percent: int | None
    num_processes: int | None
    link: tuple[int, int] | None


def check_devices(nvml: Any, visible: str | None, num_visible: int) -> Section:
    """visible: the value of CUDA_VISIBLE_DEVICES, None if it is not set. num_visible: how many GPUs
    it leaves."""
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        text = "no GPU: NVML finds no NVIDIA driver, all models run on the CPU"
        return Section("GPUs", [ok(text)], {"gpus": []})
    try:
        driver = _text(nvml.nvmlSystemGetDriverVersion())
        cuda = _maybe(nvml, nvml.nvmlSystemGetCudaDriverVersion)
        gpus = [_read(nvml, index) for index in range(nvml.nvmlDeviceGetCount())]
        pairs = _nvlink_pairs(nvml, len(gpus))
    except nvml.NVMLError as error:
        return Section("GPUs", [problem(f"NVML fails: {error}", "see whether nvidia-smi works")])
    finally:
        _maybe(nvml, nvml.nvmlShutdown)
    version = f", CUDA up to {cuda // 1000}.{cuda % 1000 // 10}" if cuda else ""
    findings = [ok(f"driver {driver}{version}")]
    for gpu in gpus:
        findings += gpu_findings(gpu)
    findings += link_findings(len(gpus), pairs)
    if visible is not None and num_visible < len(gpus):
        findings.append(
            warning(
                f"CUDA_VISIBLE_DEVICES={visible} leaves {num_visible} of {len(gpus)} GPUs",
                "unset it to use all",
            )
        )
    values = {"driver": driver, "gpus": [asdict(gpu) for gpu in gpus], "nvlink": pairs}
    return Section("GPUs", findings, values)


def gpu_findings(gpu: Gpu) -> list[Finding]:
    """What it is, and what about it spoils measurements."""
    name = f"GPU {gpu.index}"
    capability = "?" if gpu.capability is None else f"{gpu.capability[0]}.{gpu.capability[1]}"
    facts = [f"{gpu.memory_gib:.0f} GiB", f"compute capability {capability}"]
    if gpu.power_limit_w is not None:
        facts.append(f"up to {gpu.power_limit_w:.0f} W")
    if gpu.ecc is not None:
        facts.append(f"ECC {'on' if gpu.ecc else 'off'}")
    if gpu.link is not None:
        facts.append(f"PCIe {gpu.link[0]} x{gpu.link[1]}")
    findings = [ok(f"{name}: {gpu.name}, {', '.join(facts)}")]
    if gpu.capability is not None and gpu.capability < (8, 0):
        findings.append(
            warning(f"{name} has no bfloat16 arithmetic", 'use "dtype": "float16" or "float32"')
        )
    if gpu.persistence is False:
        findings.append(
            warning(
                f"{name}: persistence mode is off, the first process waits for the driver",
                f"sudo nvidia-smi -i {gpu.index} -pm 1",
            )
        )
    limit, default = gpu.power_limit_w, gpu.default_limit_w
    if limit is not None and default is not None and limit < 0.99 * default:
        findings.append(
            warning(
                f"{name}: power is capped at {limit:.0f} of {default:.0f} W",
                f"sudo nvidia-smi -i {gpu.index} -pl {default:.0f}, or state the cap with results",
            )
        )
    if gpu.used_gib > _LITTLE_GIB or (gpu.utilization_percent or 0) > 5:
        findings.append(
            warning(
                f"{name} is in use: {gpu.used_gib:.1f} GiB, {gpu.utilization_percent or 0} % busy, "
                f"{gpu.num_processes or 0} processes",
                "see nvidia-smi; take another GPU or wait",
            )
        )
    return findings


def link_findings(num_gpus: int, nvlink_pairs: Sequence[Sequence[int]]) -> list[Finding]:
    """How GPUs are connected: it matters for a model that is spread over several."""
    total = num_gpus * (num_gpus - 1) // 2
    if total == 0:
        return []
    if len(nvlink_pairs) == total:
        return [ok(f"NVLink between all {num_gpus} GPUs")]
    named = ", ".join(f"{a}-{b}" for a, b in nvlink_pairs) or "none"
    return [
        warning(
            f"pairs of GPUs with NVLink: {named}; the others go over PCIe",
            "spread a model over linked GPUs only; between stages only token ids travel",
        )
    ]


def _read(nvml: Any, index: int) -> Gpu:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)

    def ask(name: str) -> Any:
        return _maybe(nvml, lambda: getattr(nvml, name)(handle))

    persistence, ecc = ask("nvmlDeviceGetPersistenceMode"), ask("nvmlDeviceGetEccMode")
    limit = ask("nvmlDeviceGetEnforcedPowerLimit")
    default = ask("nvmlDeviceGetPowerManagementDefaultLimit")
    capability = ask("nvmlDeviceGetCudaComputeCapability")
    utilization = ask("nvmlDeviceGetUtilizationRates")
    processes = ask("nvmlDeviceGetComputeRunningProcesses")
    generation = ask("nvmlDeviceGetCurrPcieLinkGeneration")
    width = ask("nvmlDeviceGetCurrPcieLinkWidth")
    return Gpu(
        index=index,
        name=_text(nvml.nvmlDeviceGetName(handle)),
        memory_gib=memory.total / _GIB,
        used_gib=memory.used / _GIB,
        capability=None if capability is None else (capability[0], capability[1]),
        persistence=None if persistence is None else bool(persistence),
        ecc=None if ecc is None else bool(ecc[0]),
        power_limit_w=None if limit is None else limit / 1000,
        default_limit_w=None if default is None else default / 1000,
        utilization_percent=None if utilization is None else int(utilization.gpu),
        num_processes=None if processes is None else len(processes),
        link=None if generation is None or width is None else (generation, width),
    )


def _nvlink_pairs(nvml: Any, num_gpus: int) -> list[list[int]]:
    handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(num_gpus)]
    linked = []
    for a, b in combinations(range(num_gpus), 2):
        ask = partial(nvml.nvmlDeviceGetP2PStatus, handles[a], handles[b])
        status = _maybe(nvml, partial(ask, nvml.NVML_P2P_CAPS_INDEX_NVLINK))
        if status == nvml.NVML_P2P_STATUS_OK:
            linked.append([a, b])
    return linked


def _maybe(nvml: Any, ask: Callable[[], T]) -> T | None:
    """What NVML answers; None where this driver or GPU has no answer."""
    try:
        return ask()
    except nvml.NVMLError:
        return None


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
