"""One writer a file: a lock that the kernel drops with its process, so none is ever stale."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from pipespec.errors import UsageError

_NO_LOCKS: Final = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)

_log = logging.getLogger(__name__)


@contextmanager
def locked(path: Path, flag: str) -> Iterator[None]:
    """Within it nobody else writes `path`, which `flag` names.

    Raises:
        UsageError: somebody does, or the lock file cannot be written.
    """
    descriptor = lock(path, flag)
    try:
        yield
    finally:
        if descriptor is not None:
            unlock(path, descriptor)


def lock(path: Path, flag: str) -> int | None:
    """Takes the lock file of `path`; a descriptor that holds it, None where locks do not work.

    The pid in it is for the message only: the kernel's lock counts, which ends with its process.

    Raises:
        UsageError: another process has it, or it cannot be written; names the flag.
    """
    lock_path = _lock_path(path)
    while True:
        try:
            descriptor = os.open(lock_path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            reason = error.strerror or error
            raise UsageError(f"{flag}: cannot write {lock_path} ({reason})") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(descriptor, 64, 0).decode(errors="replace").strip() or "unknown"
            os.close(descriptor)
            raise UsageError(
                f"another process (pid {owner}) is writing {path}; wait for it or name another "
                f"{flag}"
            ) from None
        except OSError as error:
            os.close(descriptor)
            if error.errno in _NO_LOCKS:
                _log.warning("no file locks in %s; run one command at a time", path.parent)
                return None
            raise UsageError(f"{flag}: cannot lock {lock_path} ({error})") from error
        if _is_same_file(descriptor, lock_path):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, str(os.getpid()).encode(), 0)
            return descriptor
        os.close(descriptor)  # its owner finished and removed it between our open and our lock


def unlock(path: Path, descriptor: int) -> None:
    """Gives back what `lock` has returned."""
    _lock_path(path).unlink(missing_ok=True)
    os.close(descriptor)


def _is_same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _lock_path(path: Path) -> Path:
    return path.with_name(path.name + ".lock")
