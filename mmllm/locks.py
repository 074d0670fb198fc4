"""File locks, which the operating system releases when their process ends, and file systems that have none.

NFS without its lock service, Lustre mounted without `flock`, and some network and user-space file systems refuse every
lock at once. Work goes on there without a lock, with a warning.
"""

from __future__ import annotations

import errno
import fcntl
import os
from typing import IO, Literal

NO_LOCK_ERRNOS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)
LockOutcome = Literal["held", "taken", "none"]  # by us, by another process, no locks on this file system


def lock_file(file: IO[bytes], *, wait: bool = False) -> LockOutcome:
    """Tries to lock an open file with `flock`; with `wait`, waits until it is free. Raises other OSErrors."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        return _outcome_of(error)
    return "held"


def lock_process(descriptor: int) -> LockOutcome:
    """Tries to lock with a POSIX record lock, which forked workers do not inherit, as they do that of `lock_file`."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return _outcome_of(error)
    return "held"


def _outcome_of(error: OSError) -> LockOutcome:
    if error.errno in (errno.EACCES, errno.EAGAIN, errno.EWOULDBLOCK):
        return "taken"
    if error.errno in NO_LOCK_ERRNOS:
        return "none"
    raise error


def no_locks_warning(path: str | os.PathLike[str]) -> str:
    """The warning for a path on a file system without locks."""
    return f"{os.fspath(path)} is on a file system without locks: make sure that no second run writes there"
