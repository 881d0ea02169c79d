"""Whether the models of a config are here and fit where the config puts them. Loads no weights."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from pipespec.checkpoint import locate_cached
from pipespec.checkup.findings import Finding, Section, ok, problem, warning
from pipespec.config import ModelConfig, load_models_config
from pipespec.dry_run import DeviceNeed, dry_run_report, format_bytes
from pipespec.errors import PipeSpecError
from pipespec.placement import Machine, StagePlacement, place

_GIB: Final = 1 << 30
_LITTLE_DISK_GIB: Final = 20.0


def check_models(config: Path, machine: Machine, environ: Mapping[str, str]) -> Section:
    """The hub's cache and token, and every model of `config`."""
    models = load_models_config(config)
    findings = check_hub(environ, _cache_folder(environ))
    values: dict[str, object] = {"config": str(config)}
    try:
        report = dry_run_report(models, machine, None, base=config.parent)
        placements = place(models, machine)
        missing = [model.path for model in models if not is_here(model, config.parent)]
    except PipeSpecError as error:
        findings.append(problem(str(error), f"change {config}"))
        return Section(f"Models of {config.name}", findings, values)
    findings += [placement_finding(*pair) for pair in zip(models, placements)]
    findings += [device_finding(device) for device in report.devices]
    findings += [warning(note) for note in dict.fromkeys(p.note for p in placements) if note]
    if missing:
        findings.append(
            warning(
                f"not in the cache: {', '.join(missing)}",
                "the first run downloads them; hf download NAME does it now",
            )
        )
    values["stages"] = [
        {"model": m.path, "device": p.device, "visible": list(p.visible_devices), "cores": p.cores}
        for m, p in zip(models, placements)
    ]
    return Section(f"Models of {config.name}", findings, values)


def check_hub(environ: Mapping[str, str], cache: Path) -> list[Finding]:
    """Whether there is a token (never which), and room for downloads."""
    has_token = bool(environ.get("HF_TOKEN")) or (cache.parent / "token").is_file()
    token = "a token is set" if has_token else "no token (HF_TOKEN): gated models are out of reach"
    offline = "; HF_HUB_OFFLINE is set" if environ.get("HF_HUB_OFFLINE") else ""
    existing = next(folder for folder in (cache, *cache.parents) if folder.exists())
    free_gib = shutil.disk_usage(existing).free / _GIB
    text = f"hub cache {cache}, {free_gib:.0f} GiB free; {token}{offline}"
    if not os.access(existing, os.W_OK):
        return [warning(f"{text}; {existing} is not writable", "set HF_HOME to a folder that is")]
    if free_gib < _LITTLE_DISK_GIB:
        return [warning(text, "large models need more: set HF_HOME to a larger disk")]
    return [ok(text)]


def is_here(model: ModelConfig, base: Path) -> bool:
    """Whether nothing must be downloaded to know the model's sizes."""
    return model.emulated is not None or locate_cached(model.path, base) is not None


def placement_finding(model: ModelConfig, placement: StagePlacement) -> Finding:
    """Where a stage would run."""
    if placement.visible_devices:
        where = f"GPU {', '.join(placement.visible_devices)}"
    else:
        cores = ", ".join(map(str, placement.cores)) or "any"
        where = f"cores {cores}" if len(placement.cores) != 1 else f"core {cores}"
    threads = f"{placement.threads} thread{'' if placement.threads == 1 else 's'}"
    return ok(f"{model.name}, {model.dtype}: {where}, {threads}")


def device_finding(device: DeviceNeed) -> Finding:
    """Whether a device holds its stages, at their full context."""
    has = "unknown" if device.memory_gib is None else f"{device.memory_gib:.1f} GiB"
    text = f"{device.label}: needs {format_bytes(device.needed_bytes)} of {has}"
    if device.fits is False:
        return problem(f"{text}: it does not fit", 'use more devices, "quantize", or less context')
    if device.fits is None:
        return warning(f"{text}: whether it fits is not known")
    return ok(text)


def _cache_folder(environ: Mapping[str, str]) -> Path:
    """Where the hub's client keeps what it downloads; the variables are its own."""
    if environ.get("HF_HUB_CACHE"):
        return Path(environ["HF_HUB_CACHE"]).expanduser()
    home = environ.get("HF_HOME")
    if not home:
        cache = environ.get("XDG_CACHE_HOME") or "~/.cache"
        home = f"{cache}/huggingface"
    return Path(home).expanduser() / "hub"
