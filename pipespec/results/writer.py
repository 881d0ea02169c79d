"""Writing a result file so that an interrupted run loses nothing.

While a run goes on, every finished sample is appended to `NAME.json.partial` (JSON lines, the
metadata first) and forced to the disk before the next one starts. At the end `NAME.json` appears in
one step, complete, and the partial file goes. Whatever ends the process in between, even kill -9 or
a power cut, leaves the earlier `NAME.json` as it was and a partial file that `resume` continues.

One writer a file: a lock that the kernel drops with its process, so none is ever stale.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any, Final, Self

from pipespec.errors import PipeSpecError, UsageError
from pipespec.results.locks import lock, unlock
from pipespec.results.metadata import metadata_differences, plain
from pipespec.results.paths import ensure_writable, partial_path
from pipespec.results.reading import read_partial, result_problem, to_json

_NUM_DIGITS: Final = 7  # a clock tells no less than 1e-7 s from noise

_log = logging.getLogger(__name__)


def sample_result(
    sample_index: int,
    strategy: str,
    metrics: Mapping[str, Any],
    output_text: str,
    input_text: str,
    gpustats: Sequence[Mapping[str, Any]] = (),
    **more: Any,
) -> dict[str, Any]:
    """One item of `results`, the original's six keys first and in its order."""
    return {
        "sample_index": sample_index,
        "strategy": strategy,
        "metrics": dict(metrics),
        "output_text": output_text,
        "input_text": input_text,
        "gpustats": list(gpustats),
        **more,
    }


class ResultWriter:
    """A context manager. Leaving it without `finish` keeps the partial file.

    with ResultWriter(path, metadata) as writer:
        for sample in samples:
            writer.add(sample_result(...))
        writer.finish()
    """

    def __init__(self, path: Path, metadata: Mapping[str, Any], *, resume: bool = False) -> None:
        """Starts a run's file, dropping what an earlier interrupted run left; with `resume`
        continues after its samples. `done` tells which those are.

        Raises:
            UsageError: the folder cannot be written, another process writes this file, or the
                interrupted run was of other metadata.
            DataError: its partial file is damaged.
        """
        self.path = path
        self.metadata: dict[str, Any] = plain(metadata)
        self._partial_path = partial_path(path)
        self._results: dict[int, str] = {}
        self._file: FileIO | None = None
        ensure_writable(path.parent)
        self._lock = lock(path, "--output-dir")
        try:
            self._open(resume)
        except OSError as error:
            self.close()
            raise self._disk_error(error) from error
        except BaseException:
            self.close()
            raise

    @classmethod
    def resume(cls, path: Path, metadata: Mapping[str, Any]) -> ResultWriter:
        """A writer that goes on where an interrupted run of the same metadata ended."""
        return cls(path, metadata, resume=True)

    @property
    def done(self) -> frozenset[int]:
        """Indexes of the samples that are on the disk."""
        return frozenset(self._results)

    @property
    def results(self) -> tuple[dict[str, Any], ...]:
        """Every sample that is on the disk, in the order of their indexes."""
        return tuple(json.loads(text) for _, text in sorted(self._results.items()))

    def add(self, result: Mapping[str, Any]) -> None:
        """Appends a finished sample (of `sample_result`); it is on the disk on return.

        Numbers are rounded to 1e-7; those that are not finite become null.

        Raises:
            PipeSpecError: the disk refused; the samples before are safe.
        """
        cleaned = plain(result, _NUM_DIGITS)
        problem = result_problem(cleaned)
        assert problem is None, f"a result {problem}"
        index = cleaned["sample_index"]
        assert index not in self._results, f"sample {index} is in {self._partial_path} already"
        self._put(cleaned)

    def add_metrics(self, index: int, **metrics: Any) -> None:
        """Adds to the metrics of a sample on the disk what became known after it."""
        result = json.loads(self._results[index])
        result["metrics"].update(plain(metrics, _NUM_DIGITS))
        self._put(result)

    def update_metadata(self, **facts: Any) -> None:
        """Records what became known during the run, such as `pids` and `effective_schedule`."""
        cleaned = plain(facts)
        self.metadata.update(cleaned)
        self._append(to_json({"metadata": cleaned}) + "\n")

    def finish(self) -> Path:
        """Puts the complete file in place, in one step, and removes the partial one.

        Raises:
            PipeSpecError: the disk refused; the partial file holds every sample.
        """
        temporary = self.path.with_name(self.path.name + ".tmp")
        results = ",\n".join(self._results[index] for index in sorted(self._results))
        text = f'{{"metadata":{to_json(self.metadata)},\n"results":[\n{results}\n]}}\n'
        try:
            with temporary.open("wb") as file:
                file.write(text.encode("ascii"))
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.path)
            _sync_folder(self.path.parent)
            self._partial_path.unlink()
        except OSError as error:
            raise self._disk_error(error) from error
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
        self.close()
        return self.path

    def close(self) -> None:
        """Lets go of the file; what was added stays. Idempotent."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._lock is not None:
            unlock(self.path, self._lock)
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    # -- parts ------------------------------------------------------------------------------

    def _open(self, resume: bool) -> None:
        if resume and self._partial_path.exists():
            self._take_over()
        if self._file is None:
            self._file = FileIO(self._partial_path, "wb")
            self._append(to_json({"metadata": self.metadata}) + "\n")
            _sync_folder(self.path.parent)

    def _take_over(self) -> None:
        """Continues the partial file, unless not even its metadata reached the disk. The stored
        metadata stay; where the run went on is added to them."""
        partial = read_partial(self._partial_path)
        if partial.metadata is None:
            return
        differences = metadata_differences(partial.metadata, self.metadata)
        if differences:
            raise UsageError(
                f"--resume: {self._partial_path} is of another run: {', '.join(differences)}; "
                "--force starts over"
            )
        now = self.metadata
        self.metadata = partial.metadata
        self._results = dict(partial.results)
        self._file = FileIO(self._partial_path, "r+b")
        self._file.truncate(partial.num_bytes)
        self._file.seek(partial.num_bytes)
        session = {key: now.get(key) for key in ("started_at", "host", "commit")}
        self.update_metadata(resumed=[*self.metadata.get("resumed", []), session])

    def _put(self, result: Mapping[str, Any]) -> None:
        """Appends a sample; of two with one index, the later counts."""
        text = to_json(result)
        self._append('{"result":' + text + "}\n")
        self._results[result["sample_index"]] = text

    def _append(self, line: str) -> None:
        """One line, on the disk on return; on failure nothing of it stays."""
        assert self._file is not None, "the writer is closed"
        start = self._file.tell()
        rest = memoryview(line.encode("ascii"))
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            with suppress(OSError):
                self._file.truncate(start)
                self._file.seek(start)
            raise self._disk_error(error) from error

    def _disk_error(self, error: OSError) -> PipeSpecError:
        reason = error.strerror or error
        return PipeSpecError(
            f"cannot write {self.path} ({reason}); {len(self._results)} finished samples are safe "
            f"in {self._partial_path}, --resume goes on after them"
        )


def _sync_folder(folder: Path) -> None:
    """Makes the creation or renaming of a file in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
