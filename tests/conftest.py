"""What all tests share: which of them run where, and that none is left out in silence."""

from __future__ import annotations

import fcntl
import shutil
import signal
import tempfile
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

# Published data sets and the original's result files, too large to be part of the project.
SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
BROWSER = shutil.which("chromium")
LOCKS = pytest.StashKey[str]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fail-on-skip",
        action="store_true",
        help="a skipped test is a failure, unless it is marked gpu (what CI runs)",
    )


def pytest_configure(config: pytest.Config) -> None:
    """With `-n`, a worker takes whole files, whose fixtures are then made once, in their order:
    pytest-xdist would take those of few tests last, which are the longest.

    What a shell starts in the background, or under nohup, ignores the signals that tests send; and
    so would all that it starts."""
    if config.getoption("dist", "no") == "load":
        config.option.dist, config.option.loadscopereorder = "loadfile", False
    for number, handler in (
        (signal.SIGINT, signal.default_int_handler),
        (signal.SIGHUP, signal.SIG_DFL),
    ):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Slow tests run only when `-m` asks for them, those that read shared data where it is there,
    those that need a browser where there is one, GPU tests only where there is a GPU."""
    if not config.option.markexpr:
        _leave_out("slow", config, items)
    if not SHARED_DATA.is_dir():
        _leave_out("shared_data", config, items)
    if BROWSER is None:
        _leave_out("browser", config, items)
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu and not _has_gpu():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Before pytest-xdist starts a worker: all of a run share a folder for their locks."""
    stash = node.config.stash
    if LOCKS not in stash:
        folder = tempfile.TemporaryDirectory(prefix="test-locks-")
        node.config.add_cleanup(folder.cleanup)
        stash[LOCKS] = folder.name
    node.workerinput["locks"] = stash[LOCKS]


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """A test marked `alone` runs, with its fixtures, while the other workers pause."""
    locks = getattr(item.config, "workerinput", {}).get("locks")
    if locks is None:
        return (yield)
    with _turn(Path(locks), is_alone=item.get_closest_marker("alone") is not None):
        return (yield)


@contextmanager
def _turn(locks: Path, *, is_alone: bool) -> Iterator[None]:
    """Beside other turns, or alone. Who waits holds the queue, so that none overtakes it."""
    with (locks / "running").open("w") as running:
        with (locks / "queue").open("w") as queue:
            fcntl.flock(queue, fcntl.LOCK_EX)
            fcntl.flock(running, fcntl.LOCK_EX if is_alone else fcntl.LOCK_SH)
            fcntl.flock(queue, fcntl.LOCK_UN)
        try:
            yield
        finally:
            fcntl.flock(running, fcntl.LOCK_UN)  # also in processes that the test has forked


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    is_left_out = report.skipped and not hasattr(report, "wasxfail")
    if is_left_out and item.config.option.fail_on_skip and not item.get_closest_marker("gpu"):
        report.outcome = "failed"
        report.longrepr = f"skipped under --fail-on-skip: {_reason(report.longrepr)}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """A module that skips itself is left out like a test."""
    report = yield
    if report.skipped and collector.config.option.fail_on_skip:
        report.outcome = "failed"
        report.longrepr = f"skipped under --fail-on-skip: {_reason(report.longrepr)}"
    return report


def _leave_out(mark: str, config: pytest.Config, items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker(mark)]
    items[:] = [item for item in items if item not in marked]
    config.hook.pytest_deselected(items=marked)


def _reason(longrepr: object) -> str:
    """Of (file, line, reason), as pytest reports a skip."""
    return str(longrepr[2]) if isinstance(longrepr, tuple) else str(longrepr)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
