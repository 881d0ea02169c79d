"""Runs and times every runner path that exists here, each in a child process pinned to one core.

The first path, transformers in float32 on the CPU, writes a text with each model; the others draw
it again. Results are handed on as they come.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Final

from pipespec.checkpoint import DTYPE_BYTES, CheckpointShape, shipped_models
from pipespec.checkup.children import ask
from pipespec.checkup.runner_paths import (
    PathResult,
    Reference,
    RunnerPath,
    obstacle,
    paths_of,
    read_result,
    with_floors,
)
from pipespec.checkup.shapes import SHAPES, shape_of
from pipespec.placement import Machine, StagePlacement

NUM_TOKENS: Final = 32  # that each path draws of a text
_PROMPT: Final = 'def mean(values):\n    """The arithmetic mean of a list of numbers."""\n'
_CHILD_TIMEOUT_S: Final = 120.0  # beside the time for measuring
_COMPILE_TIMEOUT_S: Final = 900.0
_LARGE_TIMEOUT_S: Final = 600.0
_GIB: Final = 1 << 30


@dataclass(frozen=True, slots=True)
class Subject:
    """A model to time. prompt: token ids."""

    name: str
    folder: Path
    shape: CheckpointShape
    prompt: tuple[int, ...]
    is_shape: bool = False

    def bytes_to_read(self, dtype: str) -> int:
        """Of the weights that a step reads: all but an embedding of its own, of which it reads a
        row."""
        shape = self.shape
        embedding = 0 if shape.tied_embeddings else shape.vocab_size * shape.hidden_size
        return shape.weight_bytes(dtype) - embedding * DTYPE_BYTES[dtype]


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run. seconds: for all measurements together. no_cuda: why there is no CUDA device, or
    empty."""

    runners: Sequence[str]
    seconds: float
    no_cuda: str
    with_compile: bool
    machine: Machine
    environ: Mapping[str, str]


@dataclass(slots=True)
class Outcome:
    """What came of it. not_run: path and reason. references: by model."""

    results: list[PathResult] = field(default_factory=list)
    not_run: dict[str, str] = field(default_factory=dict)
    references: dict[str, Reference] = field(default_factory=dict)


def shipped_subjects() -> list[Subject]:
    """The models that ship with PipeSpec, smallest first."""
    from pipespec.tokenizer import load_tokenizer

    subjects = []
    for folder in shipped_models().values():
        shape = CheckpointShape.read(folder)
        prompt = tuple(load_tokenizer(folder).encode(_PROMPT))
        subjects.append(Subject(folder.name, folder, shape, prompt))
    return sorted(subjects, key=lambda subject: subject.shape.num_parameters)


def shape_subject(name: str, folder: Path) -> Subject:
    """A model of one of `SHAPES`, whose files are to be in `folder`."""
    return Subject(name, folder / name, shape_of(name), tuple(range(100, 164)), is_shape=True)


def run_paths(
    plan: Plan, subjects: Sequence[Subject], outcome: Outcome, say: Callable[[str], None]
) -> None:
    """Times all paths with all subjects; `say` is told what is under way."""
    is_shape = subjects[0].is_shape
    paths = []
    for path in paths_of(plan.runners):
        reason = obstacle(
            path, no_cuda=plan.no_cuda, with_compile=plan.with_compile, is_shape=is_shape
        )
        if reason:
            outcome.not_run.setdefault(str(path), reason)
        else:
            paths.append(path)
    each_s = max(0.05, plan.seconds / max(1, len(paths) * len(subjects)))
    results: list[PathResult] = []
    for _, group in groupby(paths, key=lambda path: (path.kind, path.runner)):
        results += _run_group(plan, list(group), subjects, each_s, outcome, say)
    sizes = {(s.name, d): s.bytes_to_read(d) for s in subjects for d in DTYPE_BYTES}
    outcome.results += with_floors(results, sizes)


def _run_group(
    plan: Plan,
    paths: Sequence[RunnerPath],
    subjects: Sequence[Subject],
    each_s: float,
    outcome: Outcome,
    say: Callable[[str], None],
) -> list[PathResult]:
    """One child: a runner in all its dtypes, with all subjects."""
    first = paths[0]
    names = ", ".join(subject.name for subject in subjects)
    say(f"{', '.join(map(str, paths))}: {names}")
    device = "cpu" if first.kind == "cpu" else "cuda:0"
    # A GPU's process sees the GPUs that this one does.
    visible = () if first.kind == "cpu" else plan.machine.gpu_ids
    cores = plan.machine.cores[:1] if first.kind == "cpu" else ()
    timeout_s = _LARGE_TIMEOUT_S if subjects[0].is_shape else _CHILD_TIMEOUT_S
    timeout_s += _COMPILE_TIMEOUT_S if first.runner == "static" else 0.0
    reply = ask(
        "pipespec.checkup.probe",
        {
            "job": "runner",
            "runner": first.runner,
            "device": device,
            "dtypes": [path.dtype for path in paths],
            "seconds": each_s,
            "num_tokens": NUM_TOKENS,
            "models": [_question(subject, outcome.references) for subject in subjects],
        },
        placement=StagePlacement(device, visible_devices=visible, cores=cores),
        inherited=plan.environ,
        timeout_s=timeout_s + 2 * each_s * len(paths) * len(subjects),
    )
    answered = {(line["dtype"], line["model"]): line for line in reply.lines if "model" in line}
    results = []
    for path in paths:
        for subject in subjects:
            line = answered.get((path.dtype, subject.name))
            if line is None:
                line = {"model": subject.name, "error": reply.error or "no answer"}
            if "obstacle" in line:
                outcome.not_run[str(path)] = line["obstacle"]
                continue
            if "text" in line:
                outcome.references[subject.name] = Reference(
                    subject.prompt, tuple(line["text"]), tuple(line["margins"])
                )
            reference = outcome.references.get(subject.name)
            results.append(read_result(path, line, reference))
    return results


def _question(subject: Subject, references: Mapping[str, Reference]) -> dict[str, Any]:
    reference = references.get(subject.name)
    return {
        "name": subject.name,
        "folder": os.fspath(subject.folder),
        "vocab_size": subject.shape.vocab_size,
        "bytes_to_read": {d: subject.bytes_to_read(d) for d in DTYPE_BYTES},
        "prompt": list(subject.prompt),
        "text": None if reference is None else list(reference.text),
    }


def run_shapes(
    plan: Plan, names: Sequence[str], outcome: Outcome, say: Callable[[str], None]
) -> None:
    """Times the paths on random weights of well-known sizes, one size after the other, each in a
    temporary folder."""
    for name in names:
        reason = shape_obstacle(name, plan.machine.memory_gib, bool(plan.no_cuda))
        if reason:
            outcome.not_run[f"all paths with {name}"] = reason
            continue
        with tempfile.TemporaryDirectory(prefix="ps-doctor-") as folder:
            say(f"writing random weights of {SHAPES[name]}")
            subject = shape_subject(name, Path(folder))
            reply = ask(
                "pipespec.checkup.probe",
                {"job": "shape", "name": name, "folder": os.fspath(subject.folder)},
                placement=StagePlacement("cpu"),
                inherited=plan.environ,
                timeout_s=_LARGE_TIMEOUT_S,
            )
            if reply.error:
                outcome.not_run[f"all paths with {name}"] = reply.error
                continue
            run_paths(plan, [subject], outcome, say)


def shape_obstacle(name: str, memory_gib: float, on_cpu: bool) -> str:
    """Why a size cannot be timed here; empty if it can."""
    size_gib = shape_of(name).weight_bytes("bfloat16") / _GIB
    free_gib = shutil.disk_usage(tempfile.gettempdir()).free / _GIB
    if free_gib < 1.1 * size_gib:
        return f"its weights take {size_gib:.0f} GiB of disk; TMPDIR has {free_gib:.0f}"
    if on_cpu and memory_gib < 2.5 * size_gib:
        return f"its weights take {size_gib:.0f} GiB, too much for {memory_gib:.0f} GiB of memory"
    return ""
