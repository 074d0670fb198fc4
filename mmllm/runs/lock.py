"""One run at a time in a folder, by a lock that the operating system lets go when its process ends, however it ends."""

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
    except (OSError, ValueError, KeyError):  # it has the lock and has not yet written who it is
        return "another process"


def _acquire(path: Path) -> int | None:
    """The descriptor that holds the lock; None where there are no locks. Raises LockedError where another has it.

    A record lock, since forked workers, which would inherit another one, may outlive a killed run.
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
        os.close(descriptor)  # who had it may have just removed it: then a new one is taken
        if outcome == "none":
            return None
        if outcome == "taken":
            raise LockedError(
                f"{_holder(path)} trains into {path.parent} now; wait for it or stop it, or give another out=FOLDER"
            )


@contextlib.contextmanager
def exclusive_run(out: Path) -> Iterator[None]:
    """Makes the folder, and holds it for this process. Raises LockedError where another process does."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / LOCK_FILE
    descriptor = _acquire(path)
    if descriptor is None:
        path.unlink(missing_ok=True)  # it would say that a run is there, to whom nothing tells otherwise
        print(no_locks_warning(out), flush=True)
        yield
        return
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
        yield
    finally:
        with contextlib.suppress(PermissionError):  # Windows removes no open file; one without a lock blocks nobody
            path.unlink(missing_ok=True)
        os.close(descriptor)
