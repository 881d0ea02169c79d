"""How fast one core and each GPU read memory, and what torch was built for: asked of a child."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from pipespec.checkup.children import Reply, ask
from pipespec.checkup.findings import Finding, Section, ok, problem, warning
from pipespec.placement import Machine, StagePlacement

_TIMEOUT_S: Final = 120.0


@dataclass(frozen=True, slots=True)
class Cuda:
    """Whether CUDA can be used. why_not: in a clause, empty if it can."""

    num_devices: int
    why_not: str


def check_memory_speed(machine: Machine, environ: Mapping[str, str]) -> tuple[Section, Cuda]:
    """Measures on the first core, and on every GPU that torch sees."""
    reply = ask(
        "pipespec.checkup.probe",
        {"job": "memory"},
        placement=StagePlacement(
            "cuda:0" if machine.gpu_ids else "cpu",
            visible_devices=machine.gpu_ids,
            cores=machine.cores[:1],
        ),
        inherited=environ,
        timeout_s=_TIMEOUT_S,
    )
    cuda = cuda_of(reply, len(machine.gpu_ids))
    values = {
        "bytes_per_s": {line["device"]: line["bytes_per_s"] for line in _speeds(reply)},
        "torch_cuda": reply.first("cuda"),
        "num_devices": cuda.num_devices,
        "peer_access": reply.first("peers"),
    }
    return Section("Memory", speed_findings(reply, cuda, len(machine.gpu_ids)), values), cuda


def cuda_of(reply: Reply, num_gpus: int) -> Cuda:
    """What the child's torch said of CUDA. num_gpus: that the driver shows this process."""
    num_devices = int(reply.first("num_devices") or 0)
    if num_devices:
        return Cuda(num_devices, "")
    if num_gpus and reply.first("cuda") is None:
        return Cuda(0, "this torch is a build without CUDA")
    return Cuda(0, "torch cannot use the GPU" if num_gpus else "no CUDA device")


def speed_findings(reply: Reply, cuda: Cuda, num_gpus: int) -> list[Finding]:
    """Bandwidths; and a torch that does not start, or does not see the GPUs."""
    findings = []
    for line in _speeds(reply):
        what = "one core reads" if line["device"] == "cpu" else f"{line['device']} reads"
        speed, size = line["bytes_per_s"] / 1e9, line["bytes"] / (1 << 20)
        findings.append(ok(f"{what} {speed:,.1f} GB/s ({size:,.0f} MiB at a time)"))
    if reply.error:
        findings.append(problem(f"torch does not run: {reply.error}", "reinstall it"))
    if num_gpus and cuda.why_not:
        remedy = "install a CUDA build of torch that this driver supports"
        findings.append(problem(f"{num_gpus} GPUs, but {cuda.why_not}", remedy))
    pairs = cuda.num_devices * (cuda.num_devices - 1)
    if pairs and len(reply.first("peers") or ()) < pairs:
        text = "some GPUs cannot read each other's memory directly"
        findings.append(warning(text, "a model spread over them is slower; see nvidia-smi topo -m"))
    return findings


def _speeds(reply: Reply) -> list[dict[str, Any]]:
    return [line for line in reply.lines if "bytes_per_s" in line]
