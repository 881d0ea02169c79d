"""Where a run took place: versions, machine, commit. Facts for the record, never for decisions.

Imports none of the packages whose versions it reports. What cannot be found out is None.
"""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from pipespec import __version__

PACKAGES: Final = (
    "torch",
    "transformers",
    "tokenizers",
    "accelerate",
    "safetensors",
    "datasets",
    "pyzmq",
    "msgpack",
)
_GIT_TIMEOUT_S: Final = 5.0


def describe_environment() -> dict[str, Any]:
    """`pipespec_version`, `versions`, `host`, `platform`, `cpu`, `commit`; plain JSON values."""
    return {
        "pipespec_version": __version__,
        "versions": {"python": platform.python_version(), **{p: _version(p) for p in PACKAGES}},
        "host": platform.node(),
        "platform": platform.platform(),
        "cpu": cpu_model(),
        "commit": commit_of(Path(__file__).resolve()),
    }


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str | None:
    """The processor's name as Linux gives it, else as Python does."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip().lower() in ("model name", "cpu model") and value.strip():
            return value.strip()
    return platform.processor() or platform.machine() or None


def commit_of(file: Path) -> str | None:
    """The commit that `file` is checked out from, with "-dirty" if tracked files were changed.

    None where there is no git, or where the file is not tracked: an installed package may lie in a
    virtual environment inside some other project's checkout.
    """
    if _git(file.parent, "ls-files", "--error-unmatch", "--", file.name) is None:
        return None
    return _git(file.parent, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=_GIT_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
