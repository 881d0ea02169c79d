"""Logs to Weights & Biases: one W&B run for each strategy's run, so that charts lay strategies over
each other under the same keys. Several of one command are in one group.

The package is imported only here, and only when `open_wandb` is called. Before a command starts,
what its user can put right is an error; from then on nothing that goes wrong here is: it is said
once, and the run goes on. Where a server does not answer, W&B's own offline form takes its place.

W&B's service, a process of its own, is ended with the tracker.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import psutil

from pipespec.errors import UsageError
from pipespec.tracking.keys import end_values, facts_of, own_values, sample_values
from pipespec.tracking.tables import tables
from pipespec.tracking.tracker import Decode, Result, RunTracker

DEFAULT_WANDB_PROJECT: Final = "pipespec"
_INIT_S: Final = 30.0  # for a server to answer
_FINISH_S: Final = 60.0  # for it to take what is left at the end of a run
_END_S: Final = 5.0  # for the service to end
_SERVICE: Final = "wandb-core"

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class WandbOptions:
    """Where runs go; None: W&B's default, or of a project, `DEFAULT_WANDB_PROJECT`. entity: a user
    or team. name: of the run, or of several, of their group and the start of their names. is_group:
    the command has several runs."""

    project: str | None = None
    entity: str | None = None
    name: str | None = None
    is_group: bool = False


@contextlib.contextmanager
def open_wandb(options: WandbOptions, say: Say) -> Iterator[WandbTracker]:
    """A tracker of a command; at the end the service's process has ended. say: tells the user a
    line.

    Raises:
        UsageError: the package is missing or too old, or nobody is logged in and W&B is neither
            offline nor disabled.
    """
    wandb = _import()
    try:
        _check_login(wandb)
        yield WandbTracker(wandb, options, say)
    finally:
        _end_service(wandb)


class WandbTracker:
    """A `Tracker`, and the `RunTracker` of the run in progress; see `open_wandb`. After a failure
    it keeps nothing more."""

    def __init__(self, wandb: ModuleType, options: WandbOptions, say: Say) -> None:
        self._wandb = wandb
        self._options = options
        self._say = say
        self._mode: str | None = None  # W&B's own choice, until its server fails
        self._is_lost = False
        self._run: Any = None
        self._num_forwards = 0

    @contextlib.contextmanager
    def run(self, metadata: Mapping[str, Any], directory: Path) -> Iterator[RunTracker]:
        with self._failures("could not be started"):
            self._start(metadata, directory)
        try:
            yield self
        except BaseException:
            self._finish(exit_code=1)
            raise
        self._finish(exit_code=0)

    def log_sample(self, result: Result, metadata: Mapping[str, Any]) -> None:
        if self._run is None:
            return
        with self._failures("failed"):
            facts = facts_of([result], metadata, num_forwards_before=self._num_forwards)
            self._num_forwards = facts.num_forwards or 0
            index = {"pipespec/sample_index": result["sample_index"]}
            self._run.log({**index, **sample_values(facts), **own_values(facts)})

    def log_end(
        self,
        results: Sequence[Result],
        metadata: Mapping[str, Any],
        greedy: Sequence[Result],
        decode: Decode,
    ) -> None:
        if self._run is None:
            return
        with self._failures("failed"):
            facts = facts_of(results, metadata, greedy)
            found = tables(results, metadata, decode)
            logged = {
                key: self._wandb.Table(columns=list(table.columns), data=[*map(list, table.rows)])
                for key, table in found.items()
            }
            self._run.log({**end_values(facts), **logged})
            self._run.summary.update({**sample_values(facts), **own_values(facts)})
            self._run.config.update(dict(metadata), allow_val_change=True)

    def _start(self, metadata: Mapping[str, Any], directory: Path) -> None:
        """Tells where the run is to be seen. A server that does not answer, or refuses, is the
        reason to log offline from now on."""
        if self._is_lost:
            return
        self._num_forwards = 0
        try:
            self._run = self._init(metadata, directory)
        except self._wandb.errors.CommError as error:
            self._say(f"W&B: logging offline, because the server failed: {_reason(error)}")
            self._mode = "offline"
            self._run = self._init(metadata, directory)
        if self._run.url:
            self._say(f"W&B: {self._run.url}")
        elif not self._run.disabled:
            self._say(f"W&B: offline; `wandb sync` uploads {self._run.settings.sync_dir}")

    def _init(self, metadata: Mapping[str, Any], directory: Path) -> Any:
        configured = self._wandb.setup().settings
        strategy = metadata["strategy"]
        name, group = self._options.name, None
        if self._options.is_group:
            group, name = name, name and f"{name}-{strategy}"
        return self._wandb.init(
            project=self._options.project or configured.project or DEFAULT_WANDB_PROJECT,
            entity=self._options.entity,
            name=name,
            group=group,
            job_type=strategy,
            dir=str(directory),
            mode=self._mode,
            config=dict(metadata),
            settings=_settings(self._wandb),
        )

    def _finish(self, exit_code: int) -> None:
        """Uploads what is left."""
        run, self._run = self._run, None
        if run is None:
            return
        with self._failures("failed at the end"):
            try:
                run.finish(exit_code=exit_code)
            except TimeoutError:
                self._say(
                    f"W&B: the server did not take everything within {_FINISH_S:g} s; `wandb "
                    f"sync` uploads {run.settings.sync_dir}"
                )

    @contextlib.contextmanager
    def _failures(self, what: str) -> Iterator[None]:
        """Whatever a library or a server does must not cost the run: it is said, and logging ends
        there."""
        try:
            yield
        except Exception as error:
            self._run, self._is_lost = None, True
            self._say(
                f"W&B {what} ({_reason(error)}); going on without it. Results are in the files: "
                "the same command logs them later"
            )


def _import() -> ModuleType:
    try:
        wandb = importlib.import_module("wandb")
    except ImportError as error:
        raise UsageError(_missing(f"cannot be imported ({_reason(error)})")) from error
    if not hasattr(wandb, "init"):  # a folder of that name, from an earlier run
        raise UsageError(_missing("is not installed"))
    return wandb


def _missing(what: str) -> str:
    return (
        f'--use-wandb: the package wandb {what}; pip install "wandb>=0.31", or leave the flag out'
    )


def _settings(wandb: ModuleType) -> Any:
    """The terminal is PipeSpec's own, and every wait ends."""
    return wandb.Settings(
        silent=True,
        console="off",
        init_timeout=_INIT_S,
        finish_timeout=_FINISH_S,
        finish_timeout_raises=True,
    )


def _check_login(wandb: ModuleType) -> None:
    """Without asking, which W&B would do in the middle of a command."""
    try:
        settings = wandb.setup(_settings(wandb)).settings
        is_ready = settings.mode in ("offline", "dryrun", "disabled") or wandb.login(
            prompt=False, verify=False
        )
    except Exception as error:
        raise UsageError(
            f"--use-wandb: wandb {wandb.__version__} could not be set up ({_reason(error)}); leave "
            "the flag out, or install another version"
        ) from error
    if not is_ready:
        raise UsageError(
            "--use-wandb: nobody is logged in to W&B; run `wandb login`, set WANDB_API_KEY, or log "
            "to files with WANDB_MODE=offline"
        )


def _end_service(wandb: ModuleType) -> None:
    """In the orderly way, which fails if the service has, and then by force."""
    try:
        with contextlib.suppress(Exception):
            wandb.teardown()
    finally:
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.Error):
                if child.name() == _SERVICE:
                    child.kill()
                    child.wait(_END_S)


def _reason(error: Exception) -> str:
    """The first line of an error, in a reasonable length."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
