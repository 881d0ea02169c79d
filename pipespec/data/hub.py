"""Data sets of the Hugging Face hub: from the local cache, else downloaded, never hanging.

Without a network the libraries retry for half a minute before they say so. Here the cache is asked
first, and a download starts only once the hub has answered a short question within a time limit.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from pipespec.data.readers import Row, choose_split, first_line, number_rows
from pipespec.errors import DataError

HUB_TIMEOUT_S: Final = 10.0
CONVERTED: Final = "refs/convert/parquet"  # a branch that the hub makes by itself


@dataclass(frozen=True, slots=True)
class HubSource:
    """A set on the hub: `owner/name`, one of its configurations, one of its splits (None: the only
    configuration, and the test, validation or train split). is_streamed: a download would be
    enormous, so rows are read over the network as far as they are asked for."""

    path: str
    config: str | None = None
    split: str | None = None
    is_streamed: bool = False

    def __str__(self) -> str:
        return self.path if self.config is None else f"{self.path}:{self.config}"


def read_hub(source: HubSource, timeout_s: float = HUB_TIMEOUT_S) -> Iterator[Row]:
    """Rows of a set on the hub.

    timeout_s: for the hub's first answer; a download that has begun may take as long as it needs.

    Raises:
        DataError: there is no such set, it may not be read, or the hub cannot be reached.
    """
    splits = _cached(source)
    if splits is None:
        _check_reachable(source, timeout_s)
        splits = _downloaded(source)
    split = source.split or choose_split(str(source), splits)
    if split not in splits:
        raise DataError(f"{source} has no split {split} (it has: {', '.join(splits)})")
    rows = number_rows(splits[split], f"split {split} row ")
    return _streamed(source, rows) if source.is_streamed else rows


def _streamed(source: HubSource, rows: Iterator[Row]) -> Iterator[Row]:
    """Rows that may fail to come at any time."""
    try:
        yield from rows
    except Exception as error:  # of the file system, the HTTP client or the decoder
        raise DataError(_explain(source, error)) from error


def _cached(source: HubSource) -> Any | None:
    """The splits as an earlier download left them, or None. No network."""
    import datasets
    from datasets.packaged_modules.cache.cache import Cache

    try:
        builder = Cache(
            dataset_name=source.path.split("/")[-1],
            repo_id=source.path,
            config_name=source.config,
            version="auto",
            hash="auto",
        )
        return builder.as_dataset()
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError):
        return None  # nothing there, or not usable: the download says what is wrong


def _check_reachable(source: HubSource, timeout_s: float) -> None:
    """Asks the hub whether the set exists. In a thread, because name resolution, for one, has no
    timeout of its own; it is a daemon, so a question that hangs does not keep the process."""
    failures: list[BaseException | None] = []

    def ask() -> None:
        from huggingface_hub import HfApi

        try:
            HfApi().dataset_info(source.path, timeout=timeout_s)
        except Exception as error:
            failures.append(error)
        else:
            failures.append(None)

    asking = threading.Thread(target=ask, name="hub-check", daemon=True)
    asking.start()
    asking.join(timeout_s)
    failure = failures[0] if failures else TimeoutError(f"no answer within {timeout_s:g} s")
    if failure is not None:
        raise DataError(_explain(source, failure)) from failure


def _downloaded(source: HubSource) -> Any:
    import datasets

    options: dict[str, Any] = {"streaming": True} if source.is_streamed else {}
    try:
        try:
            return datasets.load_dataset(source.path, source.config, **options)
        except RuntimeError as error:
            if "scripts are no longer supported" not in str(error):
                raise
            # The hub keeps a converted copy of such sets.
            options["revision"] = CONVERTED
            return datasets.load_dataset(source.path, source.config, **options)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(_explain(source, error)) from error


def _explain(source: HubSource, error: BaseException) -> str:
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return f"{source} is gated on the hub: ask for access there, then set HF_TOKEN"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{source} is not on the hub, or is private and needs HF_TOKEN"
    if "Config name is missing" in str(error):
        return f"{source} has several configurations ({_configs(error)}): name one as {source}:NAME"
    reason = first_line(error)
    return (
        f"{source} is not in the local cache and cannot be had from the hub ({reason}); use "
        "--dataset stdlib, or name a folder saved by `datasets` or a .jsonl file"
    )


def _configs(error: BaseException) -> str:
    """`datasets` lists them on a line of its message, as a Python list."""
    found = re.search(r"available configs: \[(.*)\]", str(error))
    return found[1].replace("'", "") if found else "see its page"
