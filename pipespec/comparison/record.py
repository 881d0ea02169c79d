"""What a race has brought so far, and its file: one JSON that is replaced as a whole every time.

A text is stored once, under a digest of it, however often it was written. Times are seconds.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from pipespec.comparison.drafting import StageSums
from pipespec.errors import DataError, PipeSpecError, UsageError
from pipespec.results import ensure_writable_file
from pipespec.results.metadata import plain

SCHEMA_VERSION: Final = 1
_KIND: Final = "race"
_NUM_DIGITS: Final = 7


@dataclass(frozen=True, slots=True)
class PromptResult:
    """One prompt of one turn.

    index: of the prompt in the data set. num_tokens: generated. seconds: from the request to the
    last token, prefill included. first_token_s: to the first tokens, of which there were
    num_first_tokens; None where a contestant does not tell. output: key in `Record.outputs`, None
    where a contestant does not show what it wrote. stages: what each of our stages counted.
    """

    index: int
    num_tokens: int
    seconds: float
    first_token_s: float | None = None
    num_first_tokens: int | None = None
    output: str | None = None
    stages: tuple[StageSums, ...] = ()


@dataclass(frozen=True, slots=True)
class Turn:
    """One contestant, in one variant, over all prompts. round: from 1."""

    round: int
    contestant: str
    variant: str
    prompts: tuple[PromptResult, ...]

    @property
    def tokens_per_s(self) -> float:
        """All tokens by all the time from each request to its last token, prefill included: what a
        user waits for, and the only time that every program can tell."""
        return sum(p.num_tokens for p in self.prompts) / sum(p.seconds for p in self.prompts)

    @property
    def decode_tokens_per_s(self) -> float | None:
        """The same without the first tokens and the time to them; None where the contestant does
        not tell when it had them, or wrote none after them."""
        num_tokens, seconds = 0, 0.0
        for prompt in self.prompts:
            if prompt.first_token_s is None or prompt.num_first_tokens is None:
                return None
            num_tokens += prompt.num_tokens - prompt.num_first_tokens
            seconds += prompt.seconds - prompt.first_token_s
        return num_tokens / seconds if num_tokens > 0 and seconds > 0 else None


@dataclass(slots=True)
class Entrant:
    """A contestant as the file shows it. key, name, kind, tables, cores, settings: as in
    `Contestant`. places: of each model, as JSON. variants: their labels. info: what its process
    said of itself. left_out: why it does not race, or no longer; empty while it does."""

    key: str
    name: str
    kind: str
    tables: tuple[str, ...]
    cores: tuple[int, ...]
    places: tuple[Mapping[str, Any], ...]
    settings: Mapping[str, Any]
    variants: tuple[str, ...] = ("",)
    info: Mapping[str, Any] = field(default_factory=dict)
    left_out: str = ""


@dataclass(slots=True)
class Record:
    """metadata: what was raced where. entrants: in the order of the tables. outputs: what was
    written, {"token_ids": [...]} or {"text": "..."} or both, by digest."""

    metadata: dict[str, Any]
    entrants: list[Entrant]
    turns: list[Turn] = field(default_factory=list)
    outputs: dict[str, dict[str, Any]] = field(default_factory=dict)

    def store(self, token_ids: Sequence[int] | None, text: str | None) -> str | None:
        """Keeps an output, if there is one; returns its key."""
        output: dict[str, Any] = {}
        if token_ids is not None:
            output["token_ids"] = list(token_ids)
        if text is not None:
            output["text"] = text
        if not output:
            return None
        key = hashlib.sha256(json.dumps(output, sort_keys=True).encode()).hexdigest()[:16]
        self.outputs[key] = output
        return key

    def entrant(self, key: str) -> Entrant:
        return next(entrant for entrant in self.entrants if entrant.key == key)


def claim(path: Path, *, force: bool) -> None:
    """Makes the folder and sees that the file can be written, before any time is spent.

    Raises:
        UsageError: it cannot, or there is a file already and `force` does not say to replace it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(f"--output: cannot write {path} ({reason}); name another file") from error
    ensure_writable_file(path, "--output")
    if path.exists() and not force:
        raise UsageError(f"--output: {path} is there already; name another, or pass --force")


def save(record: Record, path: Path) -> None:
    """Replaces the file in one step; whatever interrupts it leaves the former one whole. A record
    without a turn is not worth a former one, and not written.

    Raises:
        PipeSpecError: the disk refused.
    """
    if not record.turns:
        return
    content = {
        "kind": _KIND,
        "schema_version": SCHEMA_VERSION,
        "metadata": record.metadata,
        "contestants": [asdict(entrant) for entrant in record.entrants],
        "turns": [_turn_to_json(turn) for turn in record.turns],
        "outputs": record.outputs,
    }
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("w", encoding="ascii") as file:
            json.dump(plain(content, _NUM_DIGITS), file, separators=(",", ":"), allow_nan=False)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise PipeSpecError(f"cannot write {path} ({error.strerror or error})") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def load(path: Path) -> Record:
    """Reads a race.

    Raises:
        DataError: missing, damaged, not a race, or of a newer schema; names the file.
    """
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON ({error})") from error
    if not isinstance(content, dict) or content.get("kind") != _KIND:
        raise DataError(f"{path} is not the file of a race; python -m pipespec.compare writes one")
    if content.get("schema_version") != SCHEMA_VERSION:
        raise DataError(f"{path} has another schema version than {SCHEMA_VERSION}; race again")
    try:
        _check_metadata(content["metadata"])
        return Record(
            content["metadata"],
            [Entrant(**_tuples(entrant)) for entrant in content["contestants"]],
            [_turn(turn) for turn in content["turns"]],
            content["outputs"],
        )
    except (KeyError, TypeError) as error:
        raise DataError(f"{path} is not a whole file of a race ({error})") from error


def _check_metadata(metadata: Mapping[str, Any]) -> None:
    """Raises a KeyError or TypeError where tables and pictures would, which read these."""
    for key in ("dataset", "num_samples", "max_new_tokens", "load_average_before"):
        metadata[key]
    metadata["sampling"]["temperature"]
    for model in metadata["models"]:
        model["path"]
    for table in metadata["tables"]:
        metadata["tables"][table]


def _turn_to_json(turn: Turn) -> dict[str, Any]:
    rates = {
        "tokens_per_s": turn.tokens_per_s,
        "decode_tokens_per_s": turn.decode_tokens_per_s,
    }
    return {**asdict(turn), **rates}


def _turn(values: Mapping[str, Any]) -> Turn:
    prompts = tuple(_prompt(prompt) for prompt in values["prompts"])
    return Turn(values["round"], values["contestant"], values["variant"], prompts)


def _prompt(values: Mapping[str, Any]) -> PromptResult:
    stages = tuple(StageSums(**stage) for stage in values.get("stages", ()))
    return PromptResult(**{**values, "stages": stages})


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
    }
