"""From the path of a models config to a folder on this machine.

A path is a local folder, `pipespec:demo/NAME` for a model that ships with PipeSpec, or the name of
a repository on the Hugging Face hub: looked up in the local cache, else downloaded. Whatever goes
wrong becomes one line; a hub that does not answer is given up within seconds.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final, TypeVar

from pipespec.errors import ModelLoadError

SHIPPED_PREFIX: Final = "pipespec:"
ANSWER_TIMEOUT_S: Final = 12.0  # for the hub to say that it knows the model and that we may read it
_REQUEST_TIMEOUT_S: Final = 5.0
_HUB_NAME: Final = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?")
_SMALL_FILES: Final = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")
_SUBFOLDERS: Final = ("*/*", "consolidated*")  # other formats of the same weights
T = TypeVar("T")


def locate(path: str, base: Path | None = None) -> Path:
    """The folder that holds the model's config.json and weights; downloads it if it must.

    Local paths are relative to the working directory, else to `base`.

    Raises:
        ModelLoadError: there is no such model, it may not be read, or it is not complete.
    """
    folder = _local(path, base)
    if folder is None:
        folder = _cached(path, weights=True)
        if folder is None or _missing_file(folder):
            folder = _download(path, weights=True)
    if missing := _missing_file(folder):
        raise ModelLoadError(f"{path}: {folder} has no {missing}; it is not a complete model")
    return folder


def locate_tokenizer(path: str, base: Path | None = None) -> Path:
    """Like `locate`, for a model of which only the tokenizer is wanted: no weights needed.

    Raises:
        ModelLoadError: as `locate`.
    """
    folder = _local(path, base)
    if folder is None:
        cached = _cached(path, weights=False)
        return cached if cached and _has_tokenizer(cached) else _download(path, weights=False)
    if not _has_tokenizer(folder):
        raise ModelLoadError(f"{path}: {folder} has no tokenizer.json")
    return folder


def locate_cached(path: str, base: Path | None = None) -> Path | None:
    """The folder with the model's config.json if one is here already, weights or not; else None.
    Never touches the network.

    Raises:
        ModelLoadError: a local path or shipped name that does not exist.
    """
    folder = _local(path, base) or _cached(path, weights=False)
    return folder if folder is not None and (folder / "config.json").is_file() else None


def shipped_models() -> dict[str, Path]:
    """Every model that ships with PipeSpec: its path in a models config, its folder."""
    package = Path(__file__).resolve().parent.parent
    return {
        f"{SHIPPED_PREFIX}{config.parents[2].name}/{config.parent.name}": config.parent
        for config in sorted(package.glob("*/models/*/config.json"))
    }


def _local(path: str, base: Path | None) -> Path | None:
    """The folder of a shipped or local model, None if `path` can only be a hub name."""
    if path.startswith(SHIPPED_PREFIX):
        shipped = shipped_models()
        if path in shipped:
            return shipped[path]
        near = difflib.get_close_matches(path, shipped, n=1)
        listed = f"did you mean {near[0]}?" if near else f"it ships {', '.join(shipped) or 'none'}"
        raise ModelLoadError(f"{path} does not ship with PipeSpec; {listed}")
    given = Path(path).expanduser()
    candidates = [given] if base is None or given.is_absolute() else [given, base / given]
    for candidate in candidates:
        if candidate.is_dir():
            return candidate.resolve()
        if candidate.is_file():
            raise ModelLoadError(f"{path} is a file; a model is a folder with a config.json")
    if not _HUB_NAME.fullmatch(path) or path.startswith("."):
        raise ModelLoadError(f"{path}: there is no such folder")
    return None


def _missing_file(folder: Path) -> str:
    """The first file that the folder lacks to be a loadable model; empty if it has all."""
    if not (folder / "config.json").is_file():
        return "config.json"
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            return f"readable {index.name}"
        return next((name for name in sorted(names) if not (folder / name).is_file()), "")
    if any(folder.glob("*.safetensors")) or any(folder.glob("pytorch_model*.bin")):
        return ""
    return "model.safetensors"


def _has_tokenizer(folder: Path) -> bool:
    return any(folder.glob("tokenizer*"))


def _cached(name: str, *, weights: bool) -> Path | None:
    """The hub cache's newest snapshot of a model, perhaps without all of its files."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    with _quiet_hub():
        try:
            return Path(
                snapshot_download(
                    name,
                    local_files_only=True,
                    allow_patterns=_patterns(weights, "*.safetensors"),
                    ignore_patterns=list(_SUBFOLDERS),
                )
            )
        except (LocalEntryNotFoundError, HFValidationError) as error:
            # A download that was interrupted: its small files are good enough for a dry run.
            partial = getattr(error, "snapshot_path", None)
            return Path(partial) if partial else None


def _patterns(weights: bool, weight_files: str) -> list[str]:
    return [*_SMALL_FILES, weight_files] if weights else list(_SMALL_FILES)


def _download(name: str, *, weights: bool) -> Path:
    """Fetches the files of a hub model into the cache; a progress bar shows on a terminal."""
    from huggingface_hub import snapshot_download

    try:
        with _quiet_hub():
            files = _within(ANSWER_TIMEOUT_S, lambda: _readable_files(name))
            safe = any(file.endswith(".safetensors") for file in files)
            return Path(
                snapshot_download(
                    name,
                    etag_timeout=_REQUEST_TIMEOUT_S,
                    allow_patterns=_patterns(weights, "*.safetensors" if safe else "*.bin"),
                    ignore_patterns=list(_SUBFOLDERS),
                )
            )
    except Exception as error:  # whatever the hub's client and its HTTP library have
        raise ModelLoadError(_why(name, error)) from error


def _readable_files(name: str) -> Sequence[str]:
    """The repository's files, after asking for one of them: only that shows a missing licence."""
    from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_url

    info = HfApi().model_info(name, timeout=_REQUEST_TIMEOUT_S)
    files = [file.rfilename for file in info.siblings or ()]
    if "config.json" in files:
        get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=_REQUEST_TIMEOUT_S)
    return files


def _within(limit_s: float, work: Callable[[], T]) -> T:
    """The result of `work`, or TimeoutError. Looking up a host name has no time limit of its own,
    so the work is done in a thread that is left behind if it does not come back."""
    results: list[T] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            results.append(work())
        except Exception as error:  # raised again below, in the caller's thread
            errors.append(error)

    thread = threading.Thread(target=run, name="hub", daemon=True)
    thread.start()
    thread.join(limit_s)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"no answer within {limit_s:g} s")
    return results[0]


def _why(name: str, error: Exception) -> str:
    """One line for a failed download: what is wrong and what to do."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    page = f"https://huggingface.co/{name}"
    if isinstance(error, GatedRepoError):
        return (
            f"{name} is a gated model: accept its licence at {page} and set HF_TOKEN to a token "
            "of that account"
        )
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"{name} is neither a local folder nor a model on the hub that may be read; check the "
            "name, or set HF_TOKEN if it is private or gated"
        )
    if status == 401:
        return f"{name}: the hub does not accept the token in HF_TOKEN; set a valid one"
    if status is not None and status < 500:
        return f"{name}: the hub refuses it (HTTP status {status}); see {page}"
    reason = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, OfflineModeIsEnabled):
        reason = "HF_HUB_OFFLINE is set"
    return (
        f"{name} is not in the Hugging Face cache and cannot be downloaded ({reason[:120]}); "
        "connect to the network (a gated model also needs HF_TOKEN), copy the cache from where it "
        f"was fetched by `hf download {name}`, or give a local folder as its path"
    )


@contextlib.contextmanager
def _quiet_hub() -> Iterator[None]:
    """The hub's client logs what the error line says better."""
    from huggingface_hub.utils import logging as hub_logging

    before = hub_logging.get_verbosity()
    hub_logging.set_verbosity_error()
    try:
        yield
    finally:
        hub_logging.set_verbosity(before)
