"""Locks that the operating system lets go when their process ends, and file systems that have none.

NFS without its lock service, Lustre mounted without `flock`, and some network and user-space file systems refuse a lock
at once. Work goes on there, and says what nobody watches over any more.
"""

from __future__ import annotations

import errno
import fcntl
import os
from typing import IO, Literal

NO_LOCK_ERRNOS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)
LockOutcome = Literal["held", "taken", "none"]


def lock_file(file: IO[bytes], *, wait: bool = False) -> LockOutcome:
    """Whether this open file is locked now: `held` by us, `taken` by another one, `none` where there are no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        return _outcome_of(error)
    return "held"


def lock_process(descriptor: int) -> LockOutcome:
    """As `lock_file`, by a POSIX record lock: unlike flock's it is not handed on to forked workers."""
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


def no_locks_warning(what: str | os.PathLike[str]) -> str:
    """What to say where there are none."""
    return f"{os.fspath(what)} is on a file system without locks: see to it that no second run writes there"
