"""Imports go downward only, and the light layers stay light."""

from __future__ import annotations

import ast
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from processes import run_python

PACKAGE = Path(__file__).resolve().parents[1] / "pipespec"

# From the ground up; a module may import its own layer and those before it.
LAYERS = (
    ("errors", "config", "hashing", "messages"),
    (
        *("state", "policy", "metrics", "results", "emulation", "simulate", "placement"),
        *("machine", "lookahead", "solo", "estimates"),
    ),
    ("sampling", "checkpoint", "tokenizer"),
    ("transport",),
    ("runners", "data", "demo"),
    ("forwards", "trace"),
    ("stage",),
    (
        *("interrupts", "parent_watch", "worker_spec", "stage_process", "control", "launcher"),
        *("worker", "monitor", "gpu_monitor"),
    ),
    ("decoding",),
    ("planning", "tracking"),
    (
        *("dry_run", "commands", "benchmark", "run_example", "fit_emulation", "plan"),
        *("comparison", "compare", "checkup", "doctor", "statistics", "print_benchmark_stats"),
        *("reporting", "report"),
    ),
)
# Commands that live beside what they are about; nothing may import them.
COMMANDS = ("demo.train", "demo.evaluate", "comparison.published", "trace.__main__")
LEVEL = {name: level for level, names in enumerate((*LAYERS, COMMANDS)) for name in names}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def imports_of(path: Path) -> set[str]:
    """Names in `LEVEL` that a file imports, wherever in the file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        found |= {layer_name(name.split(".")[1:]) for name in names if name.startswith("pipespec.")}
    return found


def layer_name(parts: Sequence[str]) -> str:
    """A module's name in `LEVEL`, of the parts of its own below `pipespec`."""
    dotted = ".".join(parts[:2])
    return dotted if dotted in COMMANDS else parts[0]


def test_every_module_has_a_layer() -> None:
    names = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in modules()}
    assert names - {"__init__"} == set(LEVEL) - set(COMMANDS)


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_downward(path: Path) -> None:
    own = layer_name(path.relative_to(PACKAGE).with_suffix("").parts)
    if own == "__init__":
        return
    above = {name for name in imports_of(path) if LEVEL.get(name, 0) > LEVEL[own]}
    assert not above, f"{path.relative_to(PACKAGE)} imports {sorted(above)} from a higher layer"


LIGHT = (
    *("pipespec", "pipespec.state", "pipespec.simulate", "pipespec.results", "pipespec.metrics"),
    *("pipespec.transport", "pipespec.launcher", "pipespec.stage", "pipespec.worker"),
    *("pipespec.placement", "pipespec.checkpoint", "pipespec.tokenizer", "pipespec.data"),
    *("pipespec.dry_run", "pipespec.benchmark", "pipespec.run_example"),
    *("pipespec.emulation", "pipespec.fit_emulation", "pipespec.doctor", "pipespec.plan"),
    *("pipespec.compare", "pipespec.comparison.child", "pipespec.comparison.published"),
    *("pipespec.demo.train", "pipespec.demo.evaluate"),
    *("pipespec.planning.meter", "pipespec.gpu_monitor", "pipespec.monitor.sampler"),
    *("pipespec.print_benchmark_stats", "pipespec.report"),
    *("pipespec.trace", "pipespec.trace.__main__"),
    *("pipespec.tracking", "pipespec.tracking.wandb_runs"),
)


HEAVY = ("torch", "transformers", "datasets", "scipy", "matplotlib", "wandb")


@pytest.fixture(scope="module")
def loaded() -> dict[str, list[str]]:
    """What of `HEAVY` each of `LIGHT` loads that none before it did: one process imports them all,
    and between two of them forgets this package."""
    code = (
        "import importlib, json, sys\n"
        "unseen = set(sys.argv[1].split())\n"
        "for module in sys.argv[2:]:\n"
        "    importlib.import_module(module)\n"
        "    print(json.dumps([module, sorted(unseen & set(sys.modules))]))\n"
        "    unseen -= set(sys.modules)\n"
        "    for name in [name for name in sys.modules if name.split('.')[0] == 'pipespec']:\n"
        "        del sys.modules[name]\n"
    )
    run = run_python(code, " ".join(HEAVY), *LIGHT)
    assert run.returncode == 0, run.stderr
    return dict(map(json.loads, run.stdout.splitlines()))


@pytest.mark.parametrize("module", LIGHT)
def test_importing_it_loads_neither_torch_nor_transformers(
    module: str, loaded: dict[str, list[str]]
) -> None:
    assert loaded[module] == []


def test_files_stay_readable() -> None:
    long = {
        str(path.relative_to(PACKAGE)): count
        for path in modules()
        if (count := len(path.read_text(encoding="utf-8").splitlines())) > 420
    }
    assert not long, f"files over about 400 lines: {long}"
