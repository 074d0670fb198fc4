"""File locks, which the operating system releases when their process ends, and file systems that have none.

Linux and macOS lock through `fcntl`, Windows through `msvcrt`. NFS without its lock service, Lustre mounted without
`flock`, and some network and user-space file systems refuse every lock at once. Work goes on there without a lock, with
a warning.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Literal

from filelock import FileLock

NO_LOCK_ERRNOS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)
LockOutcome = Literal["held", "taken", "none"]  # by us, by another process, no locks on this file system

# Windows keeps others from reading a byte that is locked, so a byte is locked that no file is long enough to have.
_LOCKED_BYTE = 2**31 - 2
_SECONDS_BETWEEN_TRIES = 0.1


def _module(name: str) -> Any:
    with contextlib.suppress(ImportError):
        return importlib.import_module(name)
    return None


_fcntl, _msvcrt = _module("fcntl"), _module("msvcrt")


def lock_file(file: IO[bytes], *, wait: bool = False) -> LockOutcome:
    """Tries to lock an open file with `flock`; with `wait`, waits until it is free. Raises other OSErrors."""
    if _fcntl is None:
        return _lock_byte(file.fileno(), wait=wait)
    try:
        _fcntl.flock(file, _fcntl.LOCK_EX | (0 if wait else _fcntl.LOCK_NB))
    except OSError as error:
        return _outcome_of(error)
    return "held"


def lock_process(descriptor: int) -> LockOutcome:
    """Tries to lock with a POSIX record lock, which forked workers do not inherit, as they do that of `lock_file`."""
    if _fcntl is None:
        return _lock_byte(descriptor, wait=False)  # Windows forks no process
    try:
        _fcntl.lockf(descriptor, _fcntl.LOCK_EX | _fcntl.LOCK_NB)
    except OSError as error:
        return _outcome_of(error)
    return "held"


def _lock_byte(descriptor: int, *, wait: bool) -> LockOutcome:
    """Windows' lock, https://learn.microsoft.com/cpp/c-runtime-library/reference/locking: of bytes from here on."""
    if _msvcrt is None:
        return "none"
    while (outcome := _try_byte(descriptor)) == "taken" and wait:
        time.sleep(_SECONDS_BETWEEN_TRIES)
    return outcome


def _try_byte(descriptor: int) -> LockOutcome:
    here = os.lseek(descriptor, 0, os.SEEK_CUR)
    os.lseek(descriptor, _LOCKED_BYTE, os.SEEK_SET)
    try:
        _msvcrt.locking(descriptor, _msvcrt.LK_NBLCK, 1)
    except OSError as error:
        return _outcome_of(error)
    finally:
        os.lseek(descriptor, here, os.SEEK_SET)
    return "held"


def _outcome_of(error: OSError) -> LockOutcome:
    if error.errno in (errno.EACCES, errno.EAGAIN, errno.EWOULDBLOCK):
        return "taken"
    if error.errno in NO_LOCK_ERRNOS:
        return "none"
    raise error


def no_locks_warning(path: str | os.PathLike[str]) -> str:
    """The warning for a path on a file system, or in a Python, without locks."""
    if _fcntl is None and _msvcrt is None:
        return f"this Python has no file locks: make sure that no second run writes to {os.fspath(path)}"
    return f"{os.fspath(path)} is on a file system without locks: make sure that no second run writes there"


@contextlib.contextmanager
def exclusive_path(path: Path) -> Iterator[None]:
    """Holds a lock on this file, and waits for it. On a file system without locks, work goes on without one."""
    lock = FileLock(path, fallback_to_soft=False)  # a soft lock would outlive a killed process
    try:
        lock.acquire()
    except OSError as error:
        if error.errno not in NO_LOCK_ERRNOS:
            raise
        yield
        return
    try:
        yield
    finally:
        lock.release()
