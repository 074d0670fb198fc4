"""Which processes work on a captioning ledger now, and which of them have died with pictures in hand.

A process writes now and then that it is alive. One that has not for LEASE_SECONDS, or that this machine no longer has,
is dead, and its pictures are free. It may only have slept: then it finds that its pictures are another's.
"""

from __future__ import annotations

import contextlib
import os
import platform
import sqlite3
import threading
import time
import uuid
from pathlib import Path

LEASE_SECONDS = 90.0
SECONDS_BETWEEN_SIGNS = 15.0


class Worker:
    """This process, as one of those that work on a ledger. Its methods belong in a transaction of `database`."""

    def __init__(self, database: sqlite3.Connection, ledger: Path):
        self.name = uuid.uuid4().hex
        self._database, self._ledger = database, ledger
        self._has_left = threading.Event()
        self._signs: threading.Thread | None = None

    def arrive(self) -> None:
        """Enters this process, which signs from now on that it is alive."""
        self._database.execute(
            "INSERT OR IGNORE INTO workers VALUES (?, ?, ?, ?)", (self.name, platform.node(), os.getpid(), time.time())
        )
        if self._signs is not None:
            return
        self._signs = threading.Thread(target=self._sign, name="ledger signs", daemon=True)
        self._signs.start()

    def _sign(self) -> None:
        """Writes the time every SECONDS_BETWEEN_SIGNS, by a connection of this thread."""
        while not self._has_left.wait(SECONDS_BETWEEN_SIGNS):
            with contextlib.suppress(sqlite3.DatabaseError):  # a disk that is full now may not be so next time
                address = f"{self._ledger.absolute().as_uri()}?mode=rw"
                with contextlib.closing(sqlite3.connect(address, uri=True, isolation_level=None)) as database:
                    database.execute("UPDATE workers SET seen_at = ? WHERE name = ?", (time.time(), self.name))

    def leave(self) -> None:
        """Gives back what this process has taken."""
        if self._signs is None:
            return
        self._has_left.set()
        self._signs.join()
        self._signs = None
        self._free(self.name)

    def free_those_of_the_dead(self) -> None:
        """Makes the pictures wait again that dead processes had taken."""
        for row in self._database.execute("SELECT * FROM workers WHERE name <> ?", (self.name,)).fetchall():
            is_late = time.time() - row["seen_at"] > LEASE_SECONDS
            if is_late or (row["host"] == platform.node() and not _is_running(row["process"])):
                self._free(row["name"])

    def _free(self, name: str) -> None:
        self._database.execute(
            "UPDATE pictures SET state = 'waiting', worker = NULL WHERE state = 'taken' AND worker = ?", (name,)
        )
        self._database.execute("DELETE FROM workers WHERE name = ?", (name,))


def _is_running(process: int) -> bool:
    """Whether this machine has such a process. On Windows that is not asked: there the lease alone decides."""
    if os.name == "nt":
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
