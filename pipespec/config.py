"""What the user can set: sampling, generation, models. Frozen values, checked where they are made.

Command-line defaults are read from these dataclasses. This module reads no environment and knows
no device, process or tensor.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Final

from pipespec.errors import ConfigError, UsageError

DTYPES: Final = ("float32", "bfloat16", "float16")
QUANTIZATIONS: Final = ("8bit", "4bit")
RUNNERS: Final = ("auto", "native", "llama", "hf", "emulated")
STRATEGIES: Final = ("greedy", "chain", "async-chain")
POLICIES: Final = ("adaptive", "pipespec")
MAX_STOP_TEXTS: Final = 64
DEVICE_FORMS: Final = '"auto", "cpu", "cpu:0", "cuda", "cuda:0" or a list like ["cuda:0", "cuda:1"]'
_DEVICE: Final = re.compile(r"auto|(cpu|cuda)(:(0|[1-9][0-9]{0,3}))?")


def _require(flag: str, value: float, holds: bool, wanted: str) -> None:
    if not holds or not math.isfinite(value):
        raise UsageError(f"--{flag} is {value}; it must be {wanted}")


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How a token is chosen from logits; the same at every stage.

    temperature: 0 takes the most likely token. top_k: 0 keeps all. top_p: 1 keeps all. min_p: 0
    keeps all, else drops tokens less likely than min_p times the most likely one. seed: of the
    coupled noise; the text is a function of target, prompt, these five values and nothing else.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        _require("temperature", self.temperature, 0.0 <= self.temperature <= 1e4, "from 0 to 10000")
        _require("top-p", self.top_p, 0.0 < self.top_p <= 1.0, "above 0 and at most 1")
        _require("top-k", self.top_k, 0 <= self.top_k < 1 << 31, "0 (off) or a positive integer")
        _require("min-p", self.min_p, 0.0 <= self.min_p < 1.0, "from 0 to below 1")
        _require("seed", self.seed, 0 <= self.seed < 1 << 63, "an integer from 0 to 2**63 - 1")

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    def as_tuple(self) -> tuple[float, float, int, float, int]:
        """The wire form."""
        return (self.temperature, self.top_p, self.top_k, self.min_p, self.seed)


@dataclass(frozen=True, slots=True)
class GenerationParams:
    """One request's limits. `stop`: texts that end the output (cut before the first of them)."""

    max_new_tokens: int = 128
    sampling: SamplingParams = SamplingParams()
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        count = self.max_new_tokens
        _require("max-new-tokens", count, 1 <= count < 1 << 22, "a positive integer")
        if not isinstance(self.stop, tuple) or not all(isinstance(x, str) for x in self.stop):
            raise UsageError("--stop must be a tuple of texts")
        if any(not text for text in self.stop):
            raise UsageError("--stop: a stop text is empty; leave it out")
        if len(self.stop) > MAX_STOP_TEXTS:
            raise UsageError(f"--stop: {len(self.stop)} stop texts; at most {MAX_STOP_TEXTS} work")


@dataclass(frozen=True, slots=True)
class Schedule:
    """When stages draft and verify.

    policy: "adaptive" (measured waiting, the default) or "pipespec" (the original's: verify
    whatever is there). lookahead: candidates a verifier waits for; None lets the policy choose;
    chain drafts exactly so many. run_ahead: tokens a stage may be ahead of the last verdict.
    outcomes: other tokens a position, each a case that a draft prepares for, -1 for what the policy
    takes: 4, and 0 for "pipespec"; chain prepares none.
    tree: candidates of prepared outcomes that a verification may score beside the main path.
    confidence: a first draft of async-chain stops where its text is as good as dead; None for what
    the policy does: "adaptive" stops, "pipespec" drafts on.
    """

    policy: str = "adaptive"
    lookahead: int | None = None
    run_ahead: int = 64
    outcomes: int = -1
    tree: int = 0
    confidence: bool | None = None

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise UsageError(f"--policy is {self.policy}; it must be one of {', '.join(POLICIES)}")
        if self.lookahead is not None:
            _require("lookahead", self.lookahead, 0 <= self.lookahead <= 1024, "from 0 to 1024")
        _require("run-ahead", self.run_ahead, 1 <= self.run_ahead <= 4096, "from 1 to 4096")
        if self.outcomes == -1:
            object.__setattr__(self, "outcomes", 4 if self.policy == "adaptive" else 0)
        _require("outcomes", self.outcomes, 0 <= self.outcomes <= 16, "from 0 to 16")
        _require("tree", self.tree, 0 <= self.tree <= 64, "from 0 to 64")

    @property
    def stops_where_dead(self) -> bool:
        """Whether drafts heed their confidence."""
        return self.policy == "adaptive" if self.confidence is None else self.confidence


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One entry of a models config: a stage, smallest draft first, target last.

    path: a local folder, a hub name, or `pipespec:demo/NAME` for a model shipped with PipeSpec.
    devices: as the user wrote them, always a tuple: ("cuda:0",), ("cuda:0", "cuda:1"), ("cuda",),
    ("cpu",), ("cpu:0",), ("cpu:0", "cpu:1"), ("auto",). threads: of torch, where the placement's
    own choice does not suit. max_memory_gib: of each device. tokenizer: a path like `path`, where
    the model has none of its own. emulated: what the emulated runner is to imitate. deterministic:
    the bits of a step must not depend on how many tokens it has.

    Raises:
        ConfigError: naming the key and what is allowed.
    """

    path: str
    devices: tuple[str, ...]
    dtype: str = "bfloat16"
    quantize: str | None = None
    runner: str = "auto"
    threads: int | None = None
    max_memory_gib: float | None = None
    tokenizer: str | None = None
    emulated: Mapping[str, Any] | None = field(default=None, hash=False)
    deterministic: bool = False

    def __post_init__(self) -> None:
        _check_text("path", self.path)
        if self.name in ("", ".", ".."):
            raise ConfigError(f'"path" is "{self.path}"; it must end in the name of a model folder')
        _check_devices(self.devices)
        _check_choice("dtype", self.dtype, DTYPES)
        if self.quantize is not None:
            _check_choice("quantize", self.quantize, QUANTIZATIONS)
        _check_choice("runner", self.runner, RUNNERS)
        if self.threads is not None and not _is_number(self.threads, int, 1, 1024):
            raise _wrong("threads", self.threads, "an integer from 1 to 1024")
        limit = self.max_memory_gib
        if limit is not None and not _is_number(limit, (int, float), 1e-3, 1e6):
            raise _wrong("max_memory_gib", limit, "a number of GiB from 0.001 to 1000000")
        if self.tokenizer is not None:
            _check_text("tokenizer", self.tokenizer)
        if not isinstance(self.deterministic, bool):
            raise _wrong("deterministic", self.deterministic, "true or false")
        if self.emulated is not None and not isinstance(self.emulated, Mapping):
            raise _wrong("emulated", self.emulated, "an object")
        if self.runner == "emulated" and self.emulated is None:
            raise ConfigError('"runner" is "emulated"; it needs the key "emulated" too')
        if self.emulated is not None and self.runner not in ("auto", "emulated"):
            raise ConfigError(f'"emulated" does not go with "runner": "{self.runner}"; remove one')

    @property
    def name(self) -> str:
        """What file names and tables call the model: the last part of its path."""
        return Path(self.path.rstrip("/")).name


def find_models_config(text: str) -> Path:
    """The file that `--models-config-path` names: as given, else below the folder that holds the
    package, so that `configs/models/demo.json` works from anywhere.

    Raises:
        ConfigError: there is no such file; the message lists the ones that PipeSpec ships.
    """
    given = Path(text).expanduser()
    if given.exists():
        return given
    root = Path(__file__).resolve().parent.parent
    if (root / given).is_file():
        return root / given
    shipped = [f"configs/models/{path.name}" for path in sorted(root.glob("configs/models/*.json"))]
    listed = f"; PipeSpec ships {', '.join(shipped)}" if shipped else ""
    raise ConfigError(f"--models-config-path: there is no file {text}{listed}")


def load_models_config(path: Path) -> tuple[ModelConfig, ...]:
    """Reads a models config: the original's JSON array, smallest draft first, target last.

    `devices` may be a text or a list of texts. Nothing is replaced in silence.

    Raises:
        ConfigError: one line that names the file, the entry (counted from 0) and the key.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_object)
    except IsADirectoryError:
        raise ConfigError(f"{path} is a folder; a models config is a JSON file") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from error
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}"
        raise ConfigError(f"{path} is not JSON ({where}: {error.msg})") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON ({error})") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    if not isinstance(entries, list):
        raise ConfigError(f"{path} must hold an array of models, smallest draft first")
    if not entries:
        raise ConfigError(f"{path} holds an empty array; it must name at least one model")
    return tuple(_model(entry, f"{path}: entry {index}") for index, entry in enumerate(entries))


def model_to_json(model: ModelConfig) -> dict[str, Any]:
    """The model as results files hold it: the original's keys, devices as a list, and of our own
    keys those that differ from their defaults."""
    values = {item.name: getattr(model, item.name) for item in fields(model)}
    kept = {"path": model.path, "devices": list(model.devices), "dtype": model.dtype}
    for item in fields(model):
        if item.name not in kept and values[item.name] != item.default:
            kept[item.name] = values[item.name]
    return kept


def config_digest(models: Sequence[ModelConfig], **others: Any) -> str:
    """64 hexadecimal digits that name the models and whatever else must agree: dataclasses and
    plain values, by keyword. Equal in every process and on every machine."""
    values = {key: asdict(x) if is_dataclass(x) else x for key, x in others.items()}  # type: ignore[arg-type]
    parts = [[asdict(model) for model in models], values]
    text = json.dumps(parts, sort_keys=True, default=dict)
    return hashlib.sha256(text.encode()).hexdigest()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; a key given twice is an error, where `json` would keep the last one."""
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ConfigError(f'key "{next(k for k in keys if keys.count(k) > 1)}" is given twice')
    return values


def _model(entry: object, where: str) -> ModelConfig:
    if not isinstance(entry, dict):
        raise ConfigError(f"{where} must be an object with the keys path and devices")
    known = {item.name: item for item in fields(ModelConfig)}
    if isinstance(entry.get("path"), str):
        where = f"{where} ({entry['path']})"
    for key in entry:
        if key not in known:
            hint = _hint(key, tuple(known)) or f"; the keys are {', '.join(known)}"
            raise ConfigError(f'{where}: unknown key "{key}"{hint}')
    for key, item in known.items():
        if item.default is MISSING and key not in entry:
            raise ConfigError(f'{where}: the key "{key}" is missing')
    devices = entry["devices"]
    if isinstance(devices, (str, list)):
        devices = (devices,) if isinstance(devices, str) else tuple(devices)
    try:
        return ModelConfig(**{**entry, "devices": devices})
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def _check_devices(devices: object) -> None:
    if not isinstance(devices, tuple):
        raise _wrong("devices", devices, DEVICE_FORMS)
    if not devices:
        raise ConfigError(f'"devices" is empty; it must be {DEVICE_FORMS}')
    for device in devices:
        if not isinstance(device, str) or not _DEVICE.fullmatch(device):
            raise _wrong("devices", device, DEVICE_FORMS)
    if len(devices) == 1:
        return
    for device in devices:
        if ":" not in device:
            raise ConfigError(f'"devices": "{device}" stands alone; a list holds numbered devices')
        if devices.count(device) > 1:
            raise ConfigError(f'"devices" names {device} twice')
    if len({device.partition(":")[0] for device in devices}) > 1:
        raise ConfigError('"devices" mixes cpu and cuda; a model runs on one kind')


def _check_text(key: str, value: object) -> None:
    if not isinstance(value, str) or not value.strip() or not value.isprintable():
        raise _wrong(key, value, "the path or hub name of a model")


def _check_choice(key: str, value: object, allowed: Sequence[str]) -> None:
    if not isinstance(value, str) or value not in allowed:
        raise _wrong(key, value, f"one of {', '.join(allowed)}", allowed)


def _is_number(value: object, kinds: type | tuple[type, ...], low: float, high: float) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool) and low <= value <= high  # type: ignore[operator]


def _wrong(key: str, value: object, wanted: str, allowed: Sequence[str] = ()) -> ConfigError:
    try:
        shown = json.dumps(value)
    except (TypeError, ValueError):
        shown = repr(value)
    shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
    hint = _hint(value, allowed) if isinstance(value, str) else ""
    return ConfigError(f'"{key}" is {shown}; it must be {wanted}{hint}')


def _hint(text: str, allowed: Sequence[str]) -> str:
    close = difflib.get_close_matches(text, allowed, n=1)
    return f' (did you mean "{close[0]}"?)' if close else ""
