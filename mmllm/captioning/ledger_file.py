"""Opens the SQLite file of a captioning ledger, and says its errors in words.

On a disk with locks the database is in WAL mode, so that jobs write while others read. WAL needs memory that processes
share, which network disks do not give: there a rollback journal does the same, one job at a time slower. On a disk
without any locks one job alone may have the ledger, and is told so. https://www.sqlite.org/wal.html
"""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

from mmllm.errors import MmllmError
from mmllm.locks import lock_file, no_locks_warning

FORMAT = 1
SECONDS_BETWEEN_TRIES = 0.02
WAIT_SECONDS = 60.0  # for another job's transaction, which takes milliseconds
NETWORK_DISKS = ("nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "lustre", "beegfs", "gpfs", "ceph", "fuse", "afs")

SCHEMA = """
CREATE TABLE jobs (                 -- what captions are made with
    key TEXT PRIMARY KEY,           -- hash of the model and the settings
    settings TEXT NOT NULL          -- JSON
) WITHOUT ROWID;
CREATE TABLE pictures (
    id INTEGER PRIMARY KEY,
    place NOT NULL UNIQUE,          -- path as the user wrote it; bytes where it is no UTF-8
    name NOT NULL,                  -- relative path below the input
    origin TEXT NOT NULL,           -- JSON of where it is in a tar or list; empty for a file
    stat TEXT NOT NULL,             -- size and times of the file; empty where not known
    fields TEXT NOT NULL,           -- JSON of the columns that the prompt names
    state TEXT NOT NULL,            -- waiting, taken, done, flagged, failed
    waits_for TEXT,                 -- why a picture with a caption waits: changed, redo
    worker TEXT,                    -- the process that has taken it
    attempts INTEGER NOT NULL DEFAULT 0,
    job TEXT NOT NULL,              -- that it waits for
    made_by TEXT,                   -- the job that made its caption
    content TEXT,                   -- hash of the file's bytes
    look TEXT,                      -- perceptual hash of the picture
    finish TEXT, max_new_tokens INTEGER,
    flags TEXT,                     -- JSON list of what is wrong with the caption
    edited INTEGER NOT NULL DEFAULT 0,  -- by a person: never overwritten unless the picture changes
    reason TEXT,                    -- why it failed
    record TEXT                     -- JSON of its line in the output
);
CREATE INDEX pictures_by_state ON pictures (state);
CREATE INDEX pictures_by_content ON pictures (content);
CREATE INDEX pictures_by_look ON pictures (look);
CREATE TABLE workers (              -- processes that work on this ledger now
    name TEXT PRIMARY KEY, host TEXT NOT NULL, process INTEGER NOT NULL, seen_at REAL NOT NULL
) WITHOUT ROWID;
CREATE TABLE outputs (              -- files that were written from it, to notice that a person changed one
    path PRIMARY KEY, last_stat TEXT, next_stat TEXT
) WITHOUT ROWID;
"""


@contextlib.contextmanager
def explained_errors(path: Path) -> Iterator[None]:
    """SQLite's errors as the operating system's or the user's. Raises OSError, MmllmError."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        code = getattr(error, "sqlite_errorcode", None)
        primary = code & 255 if code is not None else None
        if primary == sqlite3.SQLITE_FULL:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        if primary in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
            raise MmllmError(f"{path} is no ledger of a captioning job, or damaged ({error}); name another") from error
        if primary in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL):
            raise MmllmError(f"another program keeps {path} locked ({error}); end it, or wait for its end") from error
        if primary in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_PERM):
            raise MmllmError(f"{path} cannot be read or written ({error}); check the path, rights and disk") from error
        raise


def connect(path: Path, *, may_create: bool) -> sqlite3.Connection:
    """A connection to the ledger. Raises MmllmError where it is none, or where there is none and none is made."""
    if path.exists() and not path.is_file():
        raise MmllmError(f"{path} is a folder or a device; a ledger is a file")
    if not may_create and not path.exists():
        raise MmllmError(f"there is no ledger at {path}; `mmllm caption` writes one beside its output, as OUT.ledger")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path.parent) as file:  # to close the ledger itself would drop SQLite's locks on it
        has_locks = lock_file(file) != "none"
    if not has_locks:
        print(no_locks_warning(path), flush=True)
    with explained_errors(path):
        address = f"file:{quote(os.fsencode(path.absolute()))}" + ("" if has_locks else "?nolock=1")
        database = sqlite3.connect(
            address, uri=True, timeout=WAIT_SECONDS, isolation_level=None, check_same_thread=False
        )
        try:
            _prepare(database, path, uses_wal=has_locks and not is_network_disk(path))
        except BaseException:
            database.close()
            raise
    return database


def _prepare(database: sqlite3.Connection, path: Path, *, uses_wal: bool) -> None:
    database.row_factory = sqlite3.Row
    version = database.execute("PRAGMA user_version").fetchone()[0]
    if version not in (0, FORMAT):
        raise MmllmError(f"{path} has format {version}, written by a newer mmllm; this one reads {FORMAT}")
    _set_journal(database, "wal" if uses_wal else "truncate")
    database.execute("PRAGMA synchronous = NORMAL")
    if version == 0:
        with transaction(database):
            if database.execute("PRAGMA user_version").fetchone()[0] == 0:  # no other job was quicker
                if database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                    raise MmllmError(f"{path} is a database of another program; name another --out")
                for statement in SCHEMA.split(";\n"):
                    database.execute(statement)
                database.execute(f"PRAGMA user_version = {FORMAT}")


def _set_journal(database: sqlite3.Connection, mode: str) -> None:
    """Sets how changes are kept until they are whole. SQLite itself does not wait here for another job that does it."""
    end = time.monotonic() + WAIT_SECONDS
    while database.execute("PRAGMA journal_mode").fetchone()[0] != mode:
        try:
            database.execute(f"PRAGMA journal_mode = {mode}")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 255 != sqlite3.SQLITE_BUSY or time.monotonic() > end:
                raise
            time.sleep(SECONDS_BETWEEN_TRIES)


@contextlib.contextmanager
def transaction(database: sqlite3.Connection) -> Iterator[None]:
    """All or nothing of what the block writes; it waits for a transaction of another job."""
    database.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        if database.in_transaction:  # SQLite has ended it already where the disk is full
            database.execute("ROLLBACK")
        raise
    database.execute("COMMIT")


def is_network_disk(path: Path, mounts: str = "/proc/self/mountinfo") -> bool:
    """Whether Linux says that this path is on a disk that several machines may share; elsewhere False."""
    try:
        lines = Path(mounts).read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return False
    kinds = {}  # https://man7.org/linux/man-pages/man5/proc_pid_mountinfo.5.html
    for line in lines:
        before, _, after = line.partition(" - ")
        kinds[before.split()[4].replace("\\040", " ")] = after.split()[0]
    folder = path.absolute().parent.resolve()
    mounted = next((str(parent) for parent in [folder, *folder.parents] if str(parent) in kinds), "")
    return kinds.get(mounted, "").split(".")[0] in NETWORK_DISKS
