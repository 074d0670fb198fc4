"""One run at a time in a folder, by a lock that the operating system lets go when its process ends, however it ends."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from mmllm.user_error import UserError

LOCK_FILE = "run.lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # file systems that are mounted without them


class LockedError(UserError):
    """Another process trains into this folder; the message says which."""


def _holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_text())
        return f"process {holder['pid']} on {holder['host']}"
    except (OSError, ValueError, KeyError):  # it has the lock and has not yet written who it is
        return "another process"


def _acquire(path: Path) -> int:
    """The descriptor that holds the lock. Raises LockedError where another process has it.

    A POSIX record lock: unlike flock's, it is not handed on to forked workers, which may outlive a killed run.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
            os.close(descriptor)  # who had it has just removed it: take a new one
        except OSError as error:
            os.close(descriptor)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise LockedError(
                    f"{_holder(path)} trains into {path.parent} now; wait for it or stop it, or give another out=FOLDER"
                ) from error
            raise


@contextlib.contextmanager
def only_run(out: Path) -> Iterator[None]:
    """Makes the folder, and holds it for this process. Raises LockedError where another process does."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / LOCK_FILE
    try:
        descriptor = _acquire(path)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        print(f"{out} is on a file system without locks: see to it that no second run writes there")
        yield
        return
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)
