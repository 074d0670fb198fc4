"""One run at a time per folder, by a lock that the operating system releases when its process ends, even if killed."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from mmllm.errors import MmllmError
from mmllm.locks import lock_process, no_locks_warning

LOCK_FILE = "run.lock"


class LockedError(MmllmError):
    """Another process trains into this folder; the message says which."""


def _holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_text())
        return f"process {holder['pid']} on {holder['host']}"
    except (OSError, ValueError, KeyError):  # the holder has not written its id yet
        return "another process"


def _acquire(path: Path) -> int | None:
    """The descriptor that holds the lock; None on a file system without locks. Raises LockedError if it is taken.

    It is a record lock, which forked workers do not inherit: they may outlive a killed run.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            outcome = lock_process(descriptor)
            if outcome == "held" and path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except OSError:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder may have just removed the file: then a new one is locked
        if outcome == "none":
            return None
        if outcome == "taken":
            raise LockedError(
                f"{_holder(path)} trains into {path.parent} now; wait for it or stop it, or give another out=FOLDER"
            )


@contextlib.contextmanager
def exclusive_run(out: Path) -> Iterator[None]:
    """Creates the folder and locks it for this process. Raises LockedError if another process holds the lock."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / LOCK_FILE
    descriptor = _acquire(path)
    if descriptor is None:
        path.unlink(missing_ok=True)  # without locks, the file cannot show whether a run is active
        print(no_locks_warning(out), flush=True)
        yield
        return
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
        yield
    finally:
        with contextlib.suppress(PermissionError):  # Windows removes no open file; an unlocked one blocks nobody
            path.unlink(missing_ok=True)
        os.close(descriptor)
