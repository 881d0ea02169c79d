"""One registry of data sets for every command: what a name means, and the samples behind it.

A name is, in this order: a built-in set; `NAME=PATH`, a copy of a built-in set in a file or folder;
a file or folder; a set on the hub (`owner/name`, or `owner/name:config`). A built-in set is one
entry of `BUILT_IN`. Models and tokenizers are unknown here: samples are text or turns, `prompts`
turns them into what is fed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Final

from pipespec.data import templates
from pipespec.data.hub import HubSource, read_hub
from pipespec.data.prompts import Sample, sample_from_row
from pipespec.data.readers import Row, read_file, read_folder
from pipespec.errors import DataError

ToSample = Callable[[int, Mapping[str, Any]], Sample | None]  # None: the row is passed over


@dataclass(frozen=True, slots=True)
class Dataset:
    """The samples of a run.

    name: of the results folder. source: where the samples came from, for the record. digest: names
    their content and order, equal on every machine. warnings: what the user should be told.
    """

    name: str
    samples: tuple[Sample, ...]
    digest: str
    source: str
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class BuiltIn:
    """A set that has a name of its own.

    source: a set on the hub, or a function that gives the rows. to_sample: from a row; by default
    the known columns are looked for. aliases: other names for it. default_num_samples: None is all.
    rows: what `to_sample` takes, where it does not take all rows.
    """

    source: HubSource | Callable[[], Iterable[Row]]
    to_sample: ToSample = sample_from_row
    aliases: tuple[str, ...] = ()
    default_num_samples: int | None = None
    rows: str = "rows"


def _column(name: str) -> ToSample:
    return lambda index, row: sample_from_row(index, row, (name,))


def _stdlib_rows() -> Iterator[Row]:
    from pipespec.data.stdlib import stdlib_prompts

    for prompt in stdlib_prompts():
        yield prompt.name, {"prompt": prompt.text}


def _arithmetic_rows() -> Iterator[Row]:
    from pipespec.data.arithmetic import CHAT_INSTRUCTION, NUM_HELD_OUT_ROWS, arithmetic_problems

    for number, problem in enumerate(arithmetic_problems("held-out", NUM_HELD_OUT_ROWS, 0), 1):
        turn = {"role": "user", "content": f"{problem.question}\n{CHAT_INSTRUCTION}"}
        yield f"question {number}", {"prompt": problem.prompt, "conversation": [turn]}


BUILT_IN: Final[Mapping[str, BuiltIn]] = {
    "stdlib": BuiltIn(_stdlib_rows, default_num_samples=6),
    "humaneval": BuiltIn(
        HubSource("openai/openai_humaneval", split="test"),
        _column("prompt"),
        aliases=("openai_humaneval", "openai/openai_humaneval"),
    ),
    "gsm8k": BuiltIn(
        HubSource("openai/gsm8k", config="main", split="test"),
        _column("question"),
        aliases=("openai/gsm8k", "openai/gsm8k:main"),
    ),
    "one-shot": BuiltIn(
        HubSource("openai/gsm8k", config="main", split="test"),
        templates.one_shot,
        aliases=("one_shot",),
    ),
    "cnn_dailymail": BuiltIn(
        HubSource("abisee/cnn_dailymail", config="3.0.0", split="test"),
        templates.cnn_dailymail,
        aliases=("abisee/cnn_dailymail", "abisee/cnn_dailymail:3.0.0"),
    ),
    "xsum": BuiltIn(
        HubSource("EdinburghNLP/xsum", split="test"),
        templates.xsum,
        aliases=("EdinburghNLP/xsum",),
    ),
    "pg19": BuiltIn(
        HubSource("emozilla/pg19-test", split="test"),
        templates.pg19,
        aliases=("emozilla/pg19-test",),
    ),
    "narrativeqa": BuiltIn(
        HubSource("deepmind/narrativeqa", split="test", is_streamed=True),
        templates.narrativeqa,
        aliases=("deepmind/narrativeqa",),
    ),
    "mmlu": BuiltIn(
        HubSource("cais/mmlu", config="all", split="test"),
        templates.mmlu,
        aliases=("cais/mmlu", "cais/mmlu:all"),
    ),
    "mt-bench": BuiltIn(
        HubSource("HuggingFaceH4/mt_bench_prompts", split="train"),
        templates.mt_bench,
        aliases=("mt_bench", "HuggingFaceH4/mt_bench_prompts"),
    ),
    "wikitext": BuiltIn(
        HubSource("Salesforce/wikitext", config="wikitext-2-raw-v1", split="test"),
        templates.wikitext,
        aliases=("Salesforce/wikitext:wikitext-2-raw-v1",),
        rows=f"rows of {templates.WIKITEXT_WORDS} words or more",
    ),
    "arithmetic": BuiltIn(_arithmetic_rows, _column("prompt"), default_num_samples=6),
    "arithmetic-chat": BuiltIn(_arithmetic_rows, _column("conversation"), default_num_samples=6),
}

_HUB_NAME: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(:[\w.-]+)?")


@dataclass(frozen=True, slots=True)
class _Found:
    """What a name stands for, before any row is read. has: what its samples are made of. advice:
    where a row is wrong."""

    name: str
    source: str
    rows: Callable[[], Iterable[Row]]
    to_sample: ToSample = sample_from_row
    default_num_samples: int | None = None
    warnings: tuple[str, ...] = ()
    has: str = "rows"
    advice: str = ""


def load_dataset(name: str, num_samples: int | None = None) -> Dataset:
    """The first `num_samples` samples of the set called `name`.

    Args:
        num_samples: None is all of them, except six of `stdlib` and `arithmetic`. More than there
            are is no error: all are taken and a warning says so.

    Raises:
        DataError: one line that names the set, the place in it, and what would work.
    """
    if num_samples is not None and num_samples <= 0:
        raise DataError(f"--num-samples is {num_samples}; it must be a positive integer")
    found = _find(name)
    wanted = found.default_num_samples if num_samples is None else num_samples
    samples = tuple(_samples(found, wanted))
    if not samples:
        raise DataError(f"{found.source} has no {found.has}")
    warnings = found.warnings
    if num_samples is not None and len(samples) < num_samples:
        only = f"{found.source} has only {len(samples)} samples; --num-samples {num_samples}"
        warnings = (*warnings, f"{only} takes them all")
    return Dataset(found.name, samples, digest(samples), found.source, warnings)


def digest(samples: Iterable[Sample]) -> str:
    """32 hexadecimal digits over the content and order of the samples."""
    state = hashlib.sha256()
    for sample in samples:
        turns = sample.messages and [[turn.role, turn.content] for turn in sample.messages]
        state.update(json.dumps([sample.text, turns]).encode() + b"\n")
    return state.hexdigest()[:32]


def _samples(found: _Found, num_samples: int | None) -> Iterator[Sample]:
    """Rows are read, and can be wrong, only as far as samples are wanted."""
    limit = None if num_samples is None else min(num_samples, sys.maxsize)
    return islice(_all_samples(found), limit)


def _all_samples(found: _Found) -> Iterator[Sample]:
    index = 0
    for place, row in found.rows():
        try:
            sample = found.to_sample(index, row)
        except DataError as error:
            raise DataError(f"{found.source} {place} {error}{found.advice}") from error
        if sample is not None:
            yield sample
            index += 1


def _find(name: str) -> _Found:
    found = _built_in(name) or _copy_of_built_in(name)
    if found is not None:
        return found
    path = Path(os.path.expanduser(name))
    if name and os.path.exists(path):  # unlike Path.exists, False for a name that is too long
        return _local(path)
    if name.startswith((".", "/", "~")) or path.suffix in (".json", ".jsonl"):
        raise DataError(f"--dataset: there is no file or folder {name}")
    if _HUB_NAME.fullmatch(name):
        hub_path, _, config = name.partition(":")
        source = HubSource(hub_path, config or None)
        return _Found(_folder_name(name), str(source), lambda: read_hub(source))
    raise DataError(
        f"--dataset: there is no data set {name}; use {', '.join(BUILT_IN)}, NAME=PATH for a copy "
        "of one of them, a folder saved by `datasets`, a .jsonl or .json file, or the name of a "
        "set on the hub (owner/name)"
    )


def _built_in(name: str) -> _Found | None:
    """The built-in set, with a warning if there is a file or folder that might be meant."""
    key = _key_of(name)
    if key is None:
        return None
    entry = BUILT_IN[key]
    warnings: tuple[str, ...] = ()
    if os.path.exists(name):
        taken = f"--dataset {name} is the built-in set, not the {_kind(Path(name))} of that name"
        warnings = (f"{taken}; for that, say ./{name}",)
    source = entry.source
    if isinstance(source, HubSource):
        hub = source
        return _Found(
            key,
            str(hub),
            lambda: read_hub(hub),
            entry.to_sample,
            entry.default_num_samples,
            warnings,
            entry.rows,
        )
    return _Found(key, key, source, entry.to_sample, entry.default_num_samples, warnings)


def _copy_of_built_in(name: str) -> _Found | None:
    """`NAME=PATH`: rows with the columns of a built-in set, to be read as that set is."""
    set_name, equals, path_name = name.partition("=")
    key = _key_of(set_name)
    if not equals or key is None:
        return None
    entry, path = BUILT_IN[key], Path(os.path.expanduser(path_name))
    if not isinstance(entry.source, HubSource):
        raise DataError(f"--dataset {name}: {key} is generated, not read; leave out ={path_name}")
    if not path_name or not os.path.exists(path):
        where = path_name or "behind ="
        raise DataError(f"--dataset {name}: there is no file or folder {where}")
    advice = f"; {name} must be a copy of {entry.source} on the hub"
    return replace(_local(path), name=key, to_sample=entry.to_sample, has=entry.rows, advice=advice)


def _key_of(name: str) -> str | None:
    return next((key for key, entry in BUILT_IN.items() if name in (key, *entry.aliases)), None)


def _local(path: Path) -> _Found:
    if path.is_dir():
        return _Found(_folder_name(path.resolve().name), str(path), lambda: read_folder(path))
    return _Found(_folder_name(path.stem), str(path), lambda: read_file(path))


def _kind(path: Path) -> str:
    return "folder" if path.is_dir() else "file"


def _folder_name(name: str) -> str:
    """The last part of a name, of characters that are safe in a folder's name."""
    last = name.rstrip("/").split("/")[-1]
    return re.sub(r"[^\w.-]+", "-", last).strip(".-") or "data"
