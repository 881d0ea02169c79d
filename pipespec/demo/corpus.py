"""The demo's corpus: the source files of the running interpreter's standard library, and for
training those of installed packages that PipeSpec depends on.

Pure standard library, no torch. The split into train and held-out modules looks at nothing but the
module's dotted name, so a module that is held out under one Python version is held out under every
version, and a prompt taken from a held-out module was never seen by the shipped models.

What it does not know: near-duplicates. `json` and `test.test_json` may fall on different sides, and
so may two generated files of `encodings`; a held-out module is unseen, not unlike everything seen.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

HELD_OUT_ONE_IN = 10

# Test suites: the majority of the bytes, and the least like what a user would prompt with.
_TEST_PARTS = frozenset({"test", "tests", "idle_test"})
# Generated tables and reference text: large, and hardly code.
_TABLE_PARTS = frozenset({"encodings", "pydoc_data"})
# Installed with PipeSpec, all under permissive licences (the model card lists them). Without those
# that hold copies of the standard library, such as setuptools.
PACKAGES = (
    "torch", "numpy", "scipy", "pandas", "sympy", "matplotlib", "networkx", "transformers",
    "accelerate", "datasets", "huggingface_hub", "tokenizers", "safetensors", "mpmath", "rich",
    "pygments", "fsspec", "jinja2", "packaging", "psutil", "pytest", "_pytest", "msgpack", "zmq",
)  # fmt: skip
_COPIES = frozenset({"_vendor", "vendor", "vendored", "extern", "externals", "_distutils"})
MAX_PACKAGE_FILE_BYTES = 200_000  # larger ones are tables

_FOREIGN_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__"})


@dataclass(frozen=True, slots=True, order=True)
class SourceFile:
    """One module, of the standard library or of a package: its dotted name and its source."""

    module_name: str
    path: Path

    def text(self) -> str:
        """The file's text with `\\n` line ends; the file is known to be UTF-8."""
        return self.path.read_bytes().decode("utf-8").replace("\r\n", "\n")


def stdlib_folder() -> Path:
    """Where the running interpreter keeps its standard library (the base one in a venv)."""
    return Path(sysconfig.get_path("stdlib"))


def is_held_out(module_name: str) -> bool:
    """Whether a module is kept away from training: a stable hash of its name, about one in ten."""
    digest = hashlib.blake2b(module_name.encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "big") % HELD_OUT_ONE_IN == 0


def is_test_module(module_name: str) -> bool:
    """Whether a module belongs to a test suite, `test.test_json` or `unittest.test.support`."""
    parts = module_name.split(".")
    return not _TEST_PARTS.isdisjoint(parts) or parts[-1].startswith("test_")


def is_table_module(module_name: str) -> bool:
    """Whether a module is mostly a generated table or reference text rather than code."""
    return not _TABLE_PARTS.isdisjoint(module_name.split("."))


def is_library_module(module_name: str) -> bool:
    """Whether a module is code that people import: neither a test nor a table."""
    return not (is_test_module(module_name) or is_table_module(module_name))


def source_files(folder: Path | None = None) -> list[SourceFile]:
    """Every usable source file, sorted by module name.

    Left out: installed packages, empty files, files that are not UTF-8, and the files in which a
    build writes down its own settings (`_sysconfigdata_*`, `config-*`), which differ by machine.
    """
    return _files(folder, lambda module_name: True)


def train_files(folder: Path | None = None) -> list[SourceFile]:
    """The files a model may be trained on."""
    return _files(folder, lambda module_name: not is_held_out(module_name))


def package_files() -> list[SourceFile]:
    """Sources of the installed packages among `PACKAGES`, by name, no text twice.

    Left out: their tests, copies of other projects, large tables, and a tenth by name, as of the
    standard library.
    """
    seen: set[bytes] = set()
    found: list[SourceFile] = []
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            for name, path in sorted(_walk(Path(folder))):
                file = SourceFile(f"{package}.{name}", path)
                if _is_of_use(file) and (digest := _digest(path)) not in seen:
                    seen.add(digest)
                    found.append(file)
    return found


def _is_of_use(file: SourceFile) -> bool:
    name = file.module_name
    if is_held_out(name) or is_test_module(name) or not _COPIES.isdisjoint(name.split(".")):
        return False
    return file.path.stat().st_size <= MAX_PACKAGE_FILE_BYTES and _is_usable(file.path)


def _digest(path: Path) -> bytes:
    return hashlib.blake2b(path.read_bytes(), digest_size=16).digest()


def held_out_files(folder: Path | None = None) -> list[SourceFile]:
    """The files no tokenizer and no model is trained on."""
    return _files(folder, is_held_out)


def _files(folder: Path | None, wanted: Callable[[str], bool]) -> list[SourceFile]:
    root = stdlib_folder() if folder is None else folder
    # Names first: only the files that are wanted need to be read.
    named = (SourceFile(*entry) for entry in _walk(root) if wanted(entry[0]))
    return sorted(file for file in named if _is_usable(file.path))


def _walk(root: Path) -> Iterator[tuple[str, Path]]:
    for folder, folders, names in os.walk(root):
        # Not entered at all: the packages there may be ten times as many files as the library.
        folders[:] = [name for name in folders if name not in _FOREIGN_FOLDERS]
        for path in (Path(folder, name) for name in names if name.endswith(".py")):
            parts = path.relative_to(root).with_suffix("").parts
            if parts[-1] == "__init__":
                parts = parts[:-1]
            if parts and not _is_build_record(parts):
                yield ".".join(parts), path


def _is_build_record(parts: tuple[str, ...]) -> bool:
    return parts[0].startswith("config-") or parts[-1].startswith("_sysconfigdata")


def _is_usable(path: Path) -> bool:
    try:
        return bool(path.read_bytes().decode("utf-8").strip())
    except (UnicodeDecodeError, OSError):
        return False
