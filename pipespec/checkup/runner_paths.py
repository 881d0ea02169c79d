"""Which ways there are to compute a step, which can run here, and what their results mean.

Pure: measuring is `probe`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from pipespec.checkup.findings import Finding, ok, problem, warning

NOT_REAL: Final = ("auto", "emulated")  # of the runners in the configuration
_COMPILED: Final = "hf, compiled"  # with its static cache
_ON_GPU: Final = (
    ("hf", "hf"),
    ("eager", "llama, eager"),
    ("llama", "llama, graphs"),
    ("static", _COMPILED),
)
# How far ahead of another a token's logit must be for a different draw to be an error.
_NEAR_TIE: Final[Mapping[str, float]] = {"float32": 1e-3, "bfloat16": 0.5, "float16": 0.1}
_EXPECTED: Final = ("hf", "native", "llama", "eager")  # to run wherever they are tried
_REMEDY: Final = 'use another "runner" in the models config, and report this'
_SHORT: Final[Mapping[str, str]] = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


@dataclass(frozen=True, slots=True)
class RunnerPath:
    """One way to compute steps. runner: as `probe` knows it. kind: "cpu" or "cuda"."""

    label: str
    runner: str
    kind: str
    dtype: str

    def __str__(self) -> str:
        return f"{self.label} on {'CPU' if self.kind == 'cpu' else 'GPU'}, {_SHORT[self.dtype]}"


@dataclass(frozen=True, slots=True)
class Reference:
    """What a model writes, by the path that the others are held against. margins: by how much each
    token led."""

    prompt: tuple[int, ...]
    text: tuple[int, ...]
    margins: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class PathResult:
    """A path with one model. step_s: by query length. bytes_per_s: at which so many bytes as the
    weights have were read just before. floor_s: to read them once. error: why there are no numbers,
    or empty."""

    path: RunnerPath
    model: str
    step_s: Mapping[int, float] = field(default_factory=dict)
    bytes_per_s: float = 0.0
    floor_s: float | None = None
    num_equal: int = 0
    num_compared: int = 0
    num_wrong: int = 0
    error: str = ""

    @property
    def ratio(self) -> float | None:
        """A step of one token over the floor."""
        return self.step_s[1] / self.floor_s if self.floor_s and 1 in self.step_s else None

    def to_json(self) -> dict[str, Any]:
        return {
            "path": self.path.label,
            "device": self.path.kind,
            "dtype": self.path.dtype,
            "model": self.model,
            "step_s": {str(query): seconds for query, seconds in self.step_s.items()},
            "bytes_per_s": self.bytes_per_s,
            "floor_s": self.floor_s,
            "ratio": self.ratio,
            "num_equal": self.num_equal,
            "num_compared": self.num_compared,
            "num_wrong": self.num_wrong,
            "error": self.error,
        }


def paths_of(runners: Sequence[str]) -> list[RunnerPath]:
    """All paths: on the CPU each real runner of the configuration, on a GPU what is known to go
    there. The first is the reference."""
    real = sorted((name for name in runners if name not in NOT_REAL), key=lambda n: n != "hf")
    on_cpu = [
        RunnerPath(name, name, "cpu", dtype) for name in real for dtype in ("float32", "bfloat16")
    ]
    on_cpu.append(RunnerPath(_COMPILED, "static", "cpu", "float32"))
    on_gpu = [
        RunnerPath(label, name, "cuda", dtype)
        for name, label in _ON_GPU
        for dtype in ("float32", "bfloat16")
    ]
    return [*on_cpu, *on_gpu]


def obstacle(path: RunnerPath, *, no_cuda: str, with_compile: bool, is_shape: bool) -> str:
    """Why a path is not run; empty if it is. no_cuda: why there is no CUDA device, or empty."""
    if path.kind == "cuda" and no_cuda:
        return no_cuda
    if path.kind == "cpu" and path.runner == "static" and not with_compile:
        return "compiling takes a minute: --compile"
    if is_shape and path.dtype == "float32":
        return "random weights are timed in bfloat16 only"
    if is_shape and path.kind == "cpu" and not no_cuda:
        return "random weights are timed on the GPU"
    if path.runner == "static" and path.kind == "cuda" and path.dtype == "float32":
        return "compiling takes minutes: only bfloat16 is timed"
    return ""


def read_result(
    path: RunnerPath, line: Mapping[str, Any], reference: Reference | None
) -> PathResult:
    """A line of `probe`'s answer, held against the reference of its model."""
    if "error" in line:
        return PathResult(path, line["model"], error=line["error"])
    draws = line["draws"]
    num_equal = num_wrong = num_compared = 0
    if reference is not None:
        num_compared = min(len(draws), len(reference.text))
        for draw, token, margin in zip(draws, reference.text, reference.margins):
            num_equal += draw == token
            num_wrong += draw != token and margin > _NEAR_TIE[path.dtype]
    return PathResult(
        path=path,
        model=line["model"],
        step_s={int(query): seconds for query, seconds in line["step_s"].items()},
        bytes_per_s=line["bytes_per_s"],
        num_equal=num_equal,
        num_compared=num_compared,
        num_wrong=num_wrong,
    )


def with_floors(
    results: Sequence[PathResult], num_bytes: Mapping[tuple[str, str], int]
) -> list[PathResult]:
    """The results with one floor for all that read the same on the same device: by the fastest
    reading, since another process may have disturbed the others.

    num_bytes: that a step of a model in a dtype must read.
    """
    fastest: dict[tuple[str, str, str], float] = {}
    for result in results:
        key = (result.model, result.path.dtype, result.path.kind)
        fastest[key] = max(fastest.get(key, 0.0), result.bytes_per_s)
    return [
        replace(result, floor_s=num_bytes[result.model, result.path.dtype] / speed)
        if (speed := fastest[result.model, result.path.dtype, result.path.kind])
        else result
        for result in results
    ]


def result_findings(results: Sequence[PathResult]) -> list[Finding]:
    """What the results say about whether paths work; their times are for the table."""
    findings = []
    for result in results:
        name = f"{result.path} with {result.model}"
        if result.error and result.path.runner in _EXPECTED:
            findings.append(problem(f"{name} fails: {result.error}", _REMEDY))
        elif result.error:
            findings.append(warning(f"{name} did not run: {result.error}"))
        elif result.num_wrong:
            findings.append(
                problem(
                    f"{name} draws {result.num_wrong} of {result.num_compared} tokens that are "
                    "clearly not the reference's",
                    _REMEDY,
                )
            )
    finished = [result for result in results if not result.error]
    num_compared = sum(result.num_compared for result in finished)
    if finished and not any(result.num_wrong for result in finished):
        num_equal = sum(result.num_equal for result in finished)
        text = f"{num_equal} of {num_compared} tokens are those of the reference, {results[0].path}"
        rest = num_compared - num_equal
        findings.insert(0, ok(f"{text}; {rest} differ at near-ties" if rest else text))
    return findings


def table_rows(results: Sequence[PathResult]) -> list[tuple[str, ...]]:
    """A row for each result that has numbers, model by model: model, path, dtype, ms a step by
    query length, floor, ratio, tokens that agree."""
    models = list(dict.fromkeys(result.model for result in results))
    rows = []
    for result in sorted(results, key=lambda r: models.index(r.model)):
        if result.error:
            continue
        times = [result.step_s.get(query) for query in (1, 2, 4, 8)]
        ratio = result.ratio
        agreed = f"{result.num_equal}/{result.num_compared}" if result.num_compared else "-"
        rows.append(
            (
                result.model,
                result.path.label,
                _SHORT[result.path.dtype],
                *(milliseconds(seconds) for seconds in times),
                milliseconds(result.floor_s),
                "-" if ratio is None else f"{ratio:.1f}x",
                f"{agreed} WRONG" if result.num_wrong else agreed,
            )
        )
    return rows


def milliseconds(seconds: float | None) -> str:
    """With three significant digits, such as 0.314 or 12.3."""
    if seconds is None:
        return "-"
    value = 1000 * seconds
    return f"{value:.{3 if value < 1 else 2 if value < 10 else 1}f}"
