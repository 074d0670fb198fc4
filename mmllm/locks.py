"""Locks that the operating system lets go when their process ends, and file systems that have none.

Linux and macOS lock through `fcntl`, Windows through `msvcrt`. NFS without its lock service, Lustre mounted without
`flock`, and some network and user-space file systems refuse a lock at once. Work goes on there, and says what nobody
watches over any more.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import time
from typing import IO, Any, Literal

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)
Outcome = Literal["held", "taken", "none"]

# Windows keeps others from reading a byte that is locked, so a byte is locked that no file is long enough to have.
_LOCKED_BYTE = 2**31 - 2
_SECONDS_BETWEEN_TRIES = 0.1


def _module(name: str) -> Any:
    with contextlib.suppress(ImportError):
        return importlib.import_module(name)
    return None


_fcntl, _msvcrt = _module("fcntl"), _module("msvcrt")


def lock_file(file: IO[bytes], *, wait: bool = False) -> Outcome:
    """Whether this open file is locked now: `held` by us, `taken` by another one, `none` where there are no locks."""
    if _fcntl is None:
        return _lock_byte(file.fileno(), wait=wait)
    try:
        _fcntl.flock(file, _fcntl.LOCK_EX | (0 if wait else _fcntl.LOCK_NB))
    except OSError as error:
        return _outcome(error)
    return "held"


def lock_process(descriptor: int) -> Outcome:
    """As `lock_file`, by a POSIX record lock: unlike flock's it is not handed on to forked workers."""
    if _fcntl is None:
        return _lock_byte(descriptor, wait=False)  # Windows forks no process
    try:
        _fcntl.lockf(descriptor, _fcntl.LOCK_EX | _fcntl.LOCK_NB)
    except OSError as error:
        return _outcome(error)
    return "held"


def _lock_byte(descriptor: int, *, wait: bool) -> Outcome:
    """Windows' lock, https://learn.microsoft.com/cpp/c-runtime-library/reference/locking: of bytes from here on."""
    if _msvcrt is None:
        return "none"
    while (outcome := _try_byte(descriptor)) == "taken" and wait:
        time.sleep(_SECONDS_BETWEEN_TRIES)
    return outcome


def _try_byte(descriptor: int) -> Outcome:
    here = os.lseek(descriptor, 0, os.SEEK_CUR)
    os.lseek(descriptor, _LOCKED_BYTE, os.SEEK_SET)
    try:
        _msvcrt.locking(descriptor, _msvcrt.LK_NBLCK, 1)
    except OSError as error:
        return _outcome(error)
    finally:
        os.lseek(descriptor, here, os.SEEK_SET)
    return "held"


def _outcome(error: OSError) -> Outcome:
    if error.errno in (errno.EACCES, errno.EAGAIN, errno.EWOULDBLOCK):
        return "taken"
    if error.errno in NO_LOCKS:
        return "none"
    raise error


def without_locks(what: str | os.PathLike[str]) -> str:
    """What to say where there are none."""
    if _fcntl is None and _msvcrt is None:
        return f"this Python has no file locks: see to it that no second run writes to {os.fspath(what)}"
    return f"{os.fspath(what)} is on a file system without locks: see to it that no second run writes there"
