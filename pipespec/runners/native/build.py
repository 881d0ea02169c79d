"""Compiles the native runner's C++ at its first use and keeps the library for the next.

The cache is `$XDG_CACHE_HOME/pipespec`, or `~/.cache/pipespec`, or where that cannot be written a
folder that is gone once the library is loaded. A library's name holds a hash of all that it depends
on: sources, flags, compiler, processor. It appears under that name at once and whole, so processes
that compile at the same time do not disturb each other. Knows no model.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from pipespec.errors import ModelLoadError

COMPILERS: Final = ("c++", "g++", "clang++")
TIMEOUT_S: Final = 300.0  # a few seconds on a core of one's own
_FOLDER: Final = Path(__file__).parent
_SOURCES: Final = ("step.cpp", "attention.h", "noise.h", "pool.h", "products.h", "vectors.h")
# Without contraction and fast-math the bits of a result do not depend on how a loop was unrolled.
_FLAGS: Final = (
    *("-std=c++17", "-O3", "-fno-math-errno", "-ffp-contract=off"),
    *("-shared", "-fPIC", "-pthread"),
)


class BuildError(ModelLoadError):
    """The native runner cannot be compiled here; another runner serves the same models."""


def load_library(
    compiler: str | None = None, march: str = "native", cache: Path | None = None
) -> ctypes.CDLL:
    """The compiled library, from the cache or made now.

    compiler: a command, None for the first of `COMPILERS` that is there. march: the processor that
    it may assume. cache: the folder to keep it in, None for the user's.

    Raises:
        BuildError: no compiler, or one that cannot compile it.
    """
    command = [_find(compiler), *_FLAGS, f"-march={march}"]
    cache, name = cache or user_cache(), f"native-{_digest(command)}.so"
    if cache is not None and (cache / name).is_file():
        return _load(cache / name)
    with _folder_in(cache) as folder:
        made = Path(folder) / name
        _run([*command, "-o", str(made), str(_FOLDER / _SOURCES[0])])
        if cache is not None:
            with suppress(OSError):
                made = made.replace(cache / name)
        return _load(made)  # once loaded, a library needs no file


def user_cache() -> Path | None:
    """The folder for what PipeSpec can make again; None for a user without a home."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):
        base = os.path.expanduser("~/.cache")
    return Path(base) / "pipespec" if os.path.isabs(base) else None


def _folder_in(cache: Path | None) -> tempfile.TemporaryDirectory[str]:
    """A folder to compile in; if it cannot be in the cache, then elsewhere."""
    if cache is not None:
        with suppress(OSError):  # read-only, or full
            cache.mkdir(parents=True, exist_ok=True)
            return tempfile.TemporaryDirectory(dir=cache, prefix=".native-")
    return tempfile.TemporaryDirectory(prefix="pipespec-")


def _find(compiler: str | None) -> str:
    for name in COMPILERS if compiler is None else (compiler,):
        if found := shutil.which(name):
            return found
    wanted = ", ".join(COMPILERS) if compiler is None else compiler
    raise BuildError(
        f"the native runner needs a C++ compiler and found none; install one of {wanted}"
    )


def _digest(command: Sequence[str]) -> str:
    """Of everything that the library depends on."""
    digest = hashlib.sha256()
    for source in _SOURCES:
        digest.update((_FOLDER / source).read_bytes())
    digest.update("\0".join([*command, _run([command[0], "--version"]), processor()]).encode())
    return digest.hexdigest()[:20]


def processor() -> str:
    """What the processor is and can do, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    telling = ("model name", "flags", "Features", "CPU part")
    first = dict.fromkeys(line for line in lines if line.startswith(telling))
    return "\n".join([platform.machine(), *first])


def _run(command: Sequence[str]) -> str:
    """Standard output of a command that succeeds.

    Raises:
        BuildError: it cannot be started, fails, or takes too long; with the line that tells why.
    """
    try:
        # A group of its own: a compiler starts others, and they must end with it.
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            process_group=0,
        )
    except OSError as error:
        raise _failure(command, error.strerror or str(error)) from error
    with process:
        try:
            output, errors = process.communicate(timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired as error:
            raise _failure(command, f"it took longer than {TIMEOUT_S:.0f} s") from error
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
    if process.returncode != 0:
        lines = [line.strip() for line in errors.splitlines() if line.strip()]
        telling = [line for line in lines if "error" in line.lower()] or lines
        raise _failure(command, telling[0] if telling else f"exit status {process.returncode}")
    return output


def _failure(command: Sequence[str], reason: str) -> BuildError:
    return BuildError(f"{command[0]} cannot compile the native runner: {reason}")


def _load(library: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise BuildError(
            f"{library} cannot be loaded ({error}); delete it and try again"
        ) from error
