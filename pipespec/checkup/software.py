"""Python and the packages that PipeSpec needs, against what it asks for. Imports none of them."""

from __future__ import annotations

import configparser
import platform
import re
import shutil
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Final

from pipespec.checkup.findings import Finding, Section, ok, problem, warning

_REQUIREMENT: Final = re.compile(r"([A-Za-z0-9_.-]+)\s*(?:>=\s*([0-9.]+))?\s*(?:;.*)?")
_COMPILERS: Final = ("c++", "g++", "clang++")


def check_software(num_gpus: int) -> Section:
    """Versions of everything, and whether torch can use the GPUs that there are."""
    wanted = read_requirements(Path(__file__).resolve().parents[2] / "setup.cfg")
    findings, versions = check_versions(wanted, _installed)
    findings += check_torch_build(versions.get("torch"), num_gpus)
    findings += _zmq_findings()
    compiler = next((name for name in _COMPILERS if shutil.which(name)), None)
    if compiler is None:
        findings.append(
            warning(
                "no C++ compiler: models on the CPU run on the llama runner, which is slower",
                "install g++ or clang++ for the native one",
            )
        )
    return Section("Software", findings, {**versions, "compiler": compiler})


def read_requirements(setup_cfg: Path) -> dict[str, str]:
    """The oldest version of each package that will do, and of Python; "" is any. From a checkout's
    setup.cfg, else from what the installed package says of itself."""
    if setup_cfg.is_file():
        parser = configparser.ConfigParser()
        parser.read(setup_cfg, encoding="utf-8")
        options = parser["options"]
        lines = options["install_requires"].split("\n")
        python = options["python_requires"]
    else:
        lines = [line for line in metadata.requires("pipespec") or [] if "extra ==" not in line]
        python = metadata.metadata("pipespec")["Requires-Python"] or ""
    wanted = {"python": python.removeprefix(">=").strip()}
    for line in lines:
        match = _REQUIREMENT.fullmatch(line.strip())
        if match:
            wanted[match[1]] = match[2] or ""
    return wanted


def check_versions(
    wanted: dict[str, str], installed: Callable[[str], str | None]
) -> tuple[list[Finding], dict[str, str | None]]:
    """Findings, and the version of each package (None: not there)."""
    versions = {name: installed(name) for name in wanted}
    findings = []
    for name, version in versions.items():
        remedy = "run pip install -r requirements.txt in this environment"
        if version is None:
            findings.append(problem(f"{name} is not installed", remedy))
        elif is_older(version, wanted[name]):
            findings.append(problem(f"{name} {version} is older than {wanted[name]}", remedy))
    good = [f"{name} {v}" for name, v in versions.items() if v and not is_older(v, wanted[name])]
    return [ok(", ".join(good)), *findings], versions


def check_torch_build(version: str | None, num_gpus: int) -> list[Finding]:
    """Whether torch was built for the GPUs that the driver shows. version: such as 2.13.0+cpu."""
    if version is None:
        return []
    if version.endswith("+cpu"):
        text = f"torch {version} is a build without CUDA"
        if num_gpus:
            return [problem(f"{text}, and there are {num_gpus} GPUs", "install its CUDA build")]
        return [ok(f"{text}; there is no GPU either")]
    return []


def is_older(version: str, least: str) -> bool:
    """Compares the leading numbers of two versions; `least` may be empty."""
    return _numbers(version) < _numbers(least)


def _numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3]]


def _installed(name: str) -> str | None:
    if name == "python":
        return platform.python_version()
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _zmq_findings() -> list[Finding]:
    try:
        import zmq
    except ImportError:
        return []  # said above
    if zmq.has("curve"):
        return [ok(f"libzmq {zmq.zmq_version()} with CURVE")]
    return [
        warning(
            f"libzmq {zmq.zmq_version()} has no CURVE: --transport tcp does not work",
            "install pyzmq from its wheel, or keep to --transport ipc",
        )
    ]
