"""Files of cached features: append-only rows, found by the hash of a picture, shared by all processes.

A folder belongs to one tower and transform. It has NUM_FILES pairs of files, chosen by the first byte of the picture's
hash: `07.bin` has the rows, `07.idx` a record for each: the picture's SHA-256 and the checksum of the row. A row is
written before its record, so a row that a killed process left without a record is ignored and overwritten. A writer
holds the `flock` of the index, which the system releases when the process ends.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mmllm.locks import lock_file, lock_process

NUM_FILES = 32
RECORD = np.dtype([("hash", "S64"), ("sum", "<u8")])  # the hash is in hexadecimal


def file_of(name: str) -> int:
    """The number of the file for this picture; `name` is its hash in hexadecimal."""
    return int(name[:2], 16) * NUM_FILES // 256


def row_checksums(rows: NDArray[np.int16]) -> NDArray[np.uint64]:
    """The checksum of each row [N, numbers]: the sum of its words, which changes if any bit changes."""
    wide = rows.shape[1] % 4 == 0 and rows.flags.c_contiguous
    words = rows.view(np.uint64) if wide else rows.view(np.uint16)
    checksums: NDArray[np.uint64] = words.sum(axis=1, dtype=np.uint64)
    return checksums


class FeatureFile:
    """One pair of files with rows of `row_numbers` 16-bit numbers each."""

    def __init__(self, folder: Path, number: int, row_numbers: int):
        self.data, self.index = folder / f"{number:02x}.bin", folder / f"{number:02x}.idx"
        self.row_numbers = row_numbers
        self.rows: dict[str, int] = {}
        self.checksums: NDArray[np.uint64] = np.zeros(0, np.uint64)
        self.values: NDArray[np.int16] = np.zeros((0, row_numbers), np.int16)

    def read(self) -> None:
        """Reads the index as it is now, without records whose rows are missing in the data file."""
        size, width = self.row_numbers * 2, RECORD.itemsize
        if not self.index.is_file() or not self.data.is_file():
            return
        records = np.fromfile(self.index, RECORD, count=self.index.stat().st_size // width)
        records = records[: self.data.stat().st_size // size]
        self.checksums = records["sum"].copy()
        self.rows = {name.decode(errors="replace"): row for row, name in enumerate(records["hash"])}  # the last counts
        if len(records):
            self.values = np.memmap(self.data, np.int16, "r", shape=(len(records), self.row_numbers))

    def drop_damaged(self, names: Sequence[str]) -> int:
        """Verifies the rows of these pictures, forgets those with a wrong checksum, and returns their number."""
        there = [name for name in names if name in self.rows]
        damaged = 0
        for start in range(0, len(there), 64):
            some = there[start : start + 64]
            at = np.array([self.rows[name] for name in some])
            for name, is_whole in zip(some, row_checksums(self.values[at]) == self.checksums[at], strict=True):
                if not is_whole:
                    del self.rows[name]
                    damaged += 1
        return damaged

    @contextlib.contextmanager
    def locked(self, *, wait: bool) -> Iterator[bool]:
        """Locks the file; yields whether this process may write to it, also if there are no locks (`has_locks`)."""
        with self.index.open("ab") as file:
            yield lock_file(file, wait=wait) != "taken"

    def add(self, names: Sequence[str], rows: NDArray[np.int16]) -> None:
        """Appends rows after the last one with a record. Call it under the lock. Raises OSError on a full disk."""
        num_records = self.index.stat().st_size // RECORD.itemsize if self.index.is_file() else 0
        if self.data.is_file():
            num_records = min(num_records, self.data.stat().st_size // (2 * self.row_numbers))
        os.truncate(self.index, num_records * RECORD.itemsize)  # a half-written record, or one without its row
        with self.data.open("ab") as file:
            file.truncate(num_records * self.row_numbers * 2)
            file.write(np.ascontiguousarray(rows).data)
        records = np.zeros(len(names), RECORD)
        records["hash"], records["sum"] = [name.encode() for name in names], row_checksums(rows)
        with self.index.open("ab") as file:
            file.write(records.tobytes())


def has_locks(folder: Path) -> bool:
    """Whether files of this folder can be locked; tests it with a temporary file."""
    probe = folder / f"locks-{os.getpid()}.part"
    try:
        with probe.open("ab") as file:
            outcome = lock_process(file.fileno())
        probe.unlink()
    except OSError:  # full or read-only, which who writes there says better
        return True
    return outcome != "none"


class PictureHashes:
    """SHA-256 of pictures. Hashes of files are stored with size and time, so a second start reads no picture."""

    def __init__(self, file: Path | None):
        table = "CREATE TABLE IF NOT EXISTS files (path TEXT PRIMARY KEY, size INT, time INT, hash TEXT)"
        if file and file.parent.is_dir() and not has_locks(file.parent):
            print(f"feature cache: {file.parent} has no locks, so all pictures are read for their hashes")
            file = None  # SQLite would wait for a lock until its timeout
        self.base = sqlite3.connect(str(file) if file else ":memory:", timeout=60)
        try:
            self.base.execute(table)
        except sqlite3.OperationalError as error:  # a full or read-only disk
            print(f"feature cache: {file} cannot be used, so all pictures are read for their hashes: {error}")
            self.base = sqlite3.connect(":memory:")
            self.base.execute(table)

    def of(self, images: Sequence[str | bytes]) -> list[str]:
        """The hashes of these pictures. Raises OSError where a file cannot be read."""
        found, new = [], []
        for image in images:
            if isinstance(image, bytes):
                found.append(hashlib.sha256(image).hexdigest())
                continue
            path, facts = str(Path(image).absolute()), Path(image).stat()
            known = self.base.execute("SELECT size, time, hash FROM files WHERE path = ?", (path,)).fetchone()
            if known is None or known[:2] != (facts.st_size, facts.st_mtime_ns):
                name = hashlib.sha256(Path(image).read_bytes()).hexdigest()
                new.append((path, facts.st_size, facts.st_mtime_ns, name))
            else:
                name = known[2]
            found.append(name)
        try:
            with self.base:
                self.base.executemany("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?)", new)
        except sqlite3.OperationalError as error:  # a shortcut is lost, and no feature
            print(f"feature cache: the next start reads {len(new)} pictures again: {error}")
        return found

    def close(self) -> None:
        self.base.close()
