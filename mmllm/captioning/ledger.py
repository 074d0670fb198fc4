"""The ledger of a captioning job, a SQLite database beside its output: a row a picture, which is its one result.

Every change is a transaction, so a process that is killed leaves a picture either as it was or with its caption. A job
takes pictures before it captions them, and only who has taken a picture may write its result: jobs that share a ledger
share the work. What a job that died had taken, others take over.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from mmllm.captioning.inputs import FoundPicture, container_of
from mmllm.captioning.ledger_file import connect, explained_errors, transaction
from mmllm.captioning.workers import Worker
from mmllm.fault_points import fault_point

_FLAGS_OF_FINISH = {"length": ["cut"], "empty": ["empty"]}  # of lines that were written before there were flags
ROWS_AT_ONCE = 1000  # found pictures in a transaction
REDO = ("cut", "flagged", "failed", "other")  # classes of pictures that are captioned again where asked for


@dataclass(frozen=True)
class JobSettings:
    """What captions are made with. Two jobs of the same settings make the same captions."""

    model: str
    model_hash: str
    prompt: str
    num_captions: int = 1
    script: str = "auto"
    retry: bool = True
    prefix: str = ""
    banned: tuple[str, ...] = ()
    json_schema: str | None = None
    regex: str | None = None

    @property
    def key(self) -> str:
        """A hash of all of it but the model's name."""
        values = {name: value for name, value in vars(self).items() if name != "model"}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class TakenPicture:
    """A picture that this job has taken, and what its last caption was made of."""

    id: int
    place: str
    name: str
    origin: str
    fields: Mapping[str, Any]
    waits_for: str | None
    content: str | None


@dataclass(frozen=True)
class Outcome:
    """What became of a taken picture: a record with its flags, or the reason why it failed."""

    picture: TakenPicture
    content: str | None = None
    look: str | None = None
    record: Mapping[str, Any] | None = None
    reason: str | None = None
    is_unchanged: bool = False  # the file was touched only, and its caption still holds


def ledger_path(out: Path) -> Path:
    """Where the ledger of an output is."""
    return out.with_name(f"{out.name}.ledger")


def to_sql(text: str) -> str | bytes:
    """A path as SQLite takes it: bytes where it is no UTF-8, which file names need not be."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return os.fsencode(text)
    return text


def _as_utf8(text: str | None) -> str | None:
    """A message that names a file whose name is no UTF-8, with those bytes as `\\udce9`."""
    return None if text is None else text.encode(errors="backslashreplace").decode()


def from_sql(value: str | bytes) -> str:
    return os.fsdecode(value) if isinstance(value, bytes) else value


class Ledger:
    """An open ledger. Raises MmllmError where the file is no ledger, OSError where the disk is full."""

    def __init__(self, path: Path, *, may_create: bool = False):
        self.path = path
        self.database = connect(path, may_create=may_create)
        with explained_errors(path):
            self.database.execute("CREATE TEMP TABLE mine (place PRIMARY KEY) WITHOUT ROWID")  # of this job's inputs
        self.worker = Worker(self.database, path)
        self._last_place: str | bytes = ""
        self._num_taken, self._num_finished = itertools.count(1), itertools.count(1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Gives back what is taken. After it no method may be called."""
        try:
            self.worker.leave()
        except sqlite3.DatabaseError:
            pass  # such as on a full disk: others take over what was taken
        finally:
            self.database.close()

    @contextmanager
    def changes(self) -> Iterator[None]:
        with explained_errors(self.path), transaction(self.database):
            yield

    def _reads(self) -> AbstractContextManager[None]:
        return explained_errors(self.path)

    def has_rows(self) -> bool:
        with self._reads():
            return self.database.execute("SELECT 1 FROM pictures LIMIT 1").fetchone() is not None

    # What there is to do

    def add(
        self, found: Iterable[FoundPicture], settings: JobSettings, *, max_new_tokens: int, redo: Sequence[str] = ()
    ) -> int:
        """Adds the pictures of this job's inputs, and decides which of those with a caption get a new one.

        A picture waits where it is new, failed before, has changed, was cut off below `max_new_tokens` by the same job,
        or is of a class in `redo`: `other` are captions of another model or other settings. Returns how many are named
        more than once.
        """
        values = {"job": settings.key, "max_new_tokens": max_new_tokens, **{name: name in redo for name in REDO}}
        with self.changes():
            self.worker.free_those_of_the_dead()
            self.database.execute(
                "INSERT OR REPLACE INTO jobs VALUES (?, ?)", (settings.key, json.dumps(vars(settings)))
            )
        rows, num_repeated = iter(found), 0
        while chunk := list(itertools.islice(rows, ROWS_AT_ONCE)):
            with self.changes():
                self.database.executemany(
                    _ADD,
                    (
                        {
                            **values, "place": to_sql(one.place), "name": to_sql(one.name), "origin": one.origin,
                            "stat": one.stat, "fields": json.dumps(dict(one.fields)) if one.fields else "",
                            "state": "failed" if one.unread else "waiting", "reason": _as_utf8(one.unread or None),
                        }
                        for one in chunk
                    ),
                )  # fmt: skip
                num_new = self.database.executemany(
                    "INSERT OR IGNORE INTO mine VALUES (?)", ((to_sql(one.place),) for one in chunk)
                ).rowcount
                num_repeated += len(chunk) - num_new
        return num_repeated

    def count(self, condition: str = "1") -> int:
        """How many pictures of this job's inputs fulfil a condition of SQL."""
        with self._reads():
            query = f"SELECT count(*) FROM mine JOIN pictures USING (place) WHERE {condition}"
            return int(self.database.execute(query).fetchone()[0])

    def take(self, settings: JobSettings, limit: int) -> list[TakenPicture]:
        """The next pictures, by their places; they are this process's now. Empty where none waits at the moment."""
        with self.changes():
            self.worker.arrive()
            rows = self._waiting(settings, limit)
            if not rows:  # from the front again: other jobs may have given some back
                self.worker.free_those_of_the_dead()
                self._last_place = ""
                rows = self._waiting(settings, limit)
            self.database.executemany(
                "UPDATE pictures SET state = 'taken', worker = ?, attempts = attempts + 1 WHERE id = ?",
                ((self.worker.name, row["id"]) for row in rows),
            )
        if rows:
            self._last_place = rows[-1]["place"]
            fault_point(f"caption batch {next(self._num_taken)}: taken")
        return [
            TakenPicture(
                row["id"], from_sql(row["place"]), from_sql(row["name"]), row["origin"],
                json.loads(row["fields"] or "{}"), row["waits_for"], row["content"],
            )
            for row in rows
        ]  # fmt: skip

    def _waiting(self, settings: JobSettings, limit: int) -> list[sqlite3.Row]:
        query = (
            "SELECT pictures.* FROM mine CROSS JOIN pictures USING (place) "
            "WHERE mine.place > ? AND state = 'waiting' AND job = ? ORDER BY mine.place LIMIT ?"
        )
        return self.database.execute(query, (self._last_place, settings.key, limit)).fetchall()

    def num_taken_by_others(self) -> int:
        query = (
            "SELECT count(*) FROM pictures WHERE state = 'taken' AND worker <> ? "
            "AND EXISTS (SELECT 1 FROM mine WHERE mine.place = pictures.place)"
        )
        with self._reads():
            return int(self.database.execute(query, (self.worker.name,)).fetchone()[0])

    # What has been done

    def finish(self, outcomes: Sequence[Outcome], settings: JobSettings) -> None:
        """Writes what became of pictures. What another process has taken over in the meantime is left to that one."""
        number = next(self._num_finished)
        with self.changes():
            for outcome in outcomes:
                self._finish_one(outcome, settings)
            fault_point(f"caption batch {number}: before commit")
        fault_point(f"caption batch {number}: committed")

    def _finish_one(self, outcome: Outcome, settings: JobSettings) -> None:
        values: dict[str, Any] = {
            "id": outcome.picture.id, "worker": self.worker.name, "content": outcome.content, "look": outcome.look,
            "job": settings.key, "reason": _as_utf8(outcome.reason),
        }  # fmt: skip
        if outcome.is_unchanged:
            self.database.execute(_UNCHANGED, values)
        elif outcome.record is not None:
            self.database.execute(_DONE, {**values, **columns_of_record(outcome.record)})
        else:
            self.database.execute(_FAILED, values)

    def captions_of(self, contents: Sequence[str]) -> dict[str, list[sqlite3.Row]]:
        """The rows with a caption of pictures with these hashes that are not of this job's inputs, by hash."""
        rows: dict[str, list[sqlite3.Row]] = {}
        with self._reads():
            for row in self.database.execute(_SAME_CONTENT, (json.dumps(contents),)):
                rows.setdefault(row["content"], []).append(row)
        return rows

    def move_caption(self, row: sqlite3.Row, picture: TakenPicture, prompt: str, max_new_tokens: int) -> bool:
        """Moves the caption of a file that is gone to a picture with the same content; False where it is not wanted.

        Args:
            prompt: what is asked about this picture; a prompt that names the file may differ.
        """
        record = json.loads(row["record"])
        is_short = row["finish"] == "length" and (row["max_new_tokens"] or 0) < max_new_tokens
        if is_short or record.get("prompt") != prompt or _is_there(row):
            return False
        with self.changes():
            record["image"] = picture.place
            values = {"id": picture.id, "old": row["id"], "worker": self.worker.name, "record": json.dumps(record)}
            moved = self.database.execute(_MOVE, values).rowcount
            if moved:
                self.database.execute("DELETE FROM pictures WHERE id = ?", (row["id"],))
            fault_point("caption moved: before commit")
        return bool(moved)

    # What it holds

    def records(self, *, with_flagged: bool, only_mine: bool = False) -> Iterator[sqlite3.Row]:
        """The rows with a caption by their places, one after the other."""
        condition = "record IS NOT NULL" + ("" if with_flagged else " AND flags IS NULL")
        return self._rows(condition, only_mine)

    def failures(self, *, only_mine: bool = False) -> Iterator[sqlite3.Row]:
        return self._rows("state = 'failed'", only_mine)

    def written_file(self, path: Path) -> sqlite3.Row | None:
        """What is known of a file that was written from this ledger; None for any other file."""
        query = "SELECT * FROM outputs WHERE path = ?"
        row: sqlite3.Row | None = self.database.execute(query, (to_sql(str(path.absolute())),)).fetchone()
        return row

    def note_written(self, path: Path, last_stat: str = "", next_stat: str = "") -> None:
        """Remembers a file that is written from this ledger, and which states of it are no person's edit."""
        values = (to_sql(str(path.absolute())), last_stat, next_stat)
        self.database.execute("INSERT OR REPLACE INTO outputs VALUES (?, ?, ?)", values)

    def _rows(self, condition: str, only_mine: bool) -> Iterator[sqlite3.Row]:
        joined = "mine CROSS JOIN pictures USING (place)" if only_mine else "pictures"
        with self._reads():
            yield from self.database.execute(f"SELECT * FROM {joined} WHERE {condition} ORDER BY place")


def columns_of_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of the ledger that repeat parts of a record."""
    limit = record.get("max_new_tokens", record.get("num_new_tokens"))
    flags = record.get("flags") or _FLAGS_OF_FINISH.get(str(record.get("finish")))
    return {
        "state": "flagged" if flags else "done",
        "finish": record.get("finish"),
        "max_new_tokens": limit if isinstance(limit, int) else 0,
        "flags": json.dumps(flags) if flags else None,
        "record": json.dumps(record),
    }


def _is_there(row: sqlite3.Row) -> bool:
    """Whether the file of a row is still where it was. Of a URL it is not asked, and taken as there."""
    path = container_of(from_sql(row["place"]), row["origin"])
    return "://" in path or Path(path).exists()


# A row that is taken stays as it is: who has taken it finishes it.
_IS_CHANGED = "pictures.stat <> '' AND excluded.stat <> pictures.stat AND pictures.state IN ('done', 'flagged')"
_IS_WANTED_AGAIN = """pictures.edited = 0 AND pictures.state IN ('done', 'flagged') AND (
    pictures.finish = 'length' AND (:cut OR (pictures.made_by = :job AND pictures.max_new_tokens < :max_new_tokens))
    OR (:flagged AND pictures.flags IS NOT NULL) OR (:other AND pictures.made_by <> :job))"""
_WAITS = f"(pictures.state IN ('waiting', 'failed') OR {_IS_CHANGED} OR {_IS_WANTED_AGAIN})"
_ADD = f"""
INSERT INTO pictures (place, name, origin, stat, fields, state, job, reason)
VALUES (:place, :name, :origin, :stat, :fields, :state, :job, :reason)
ON CONFLICT (place) DO UPDATE SET
    name = excluded.name, origin = excluded.origin, fields = excluded.fields,
    stat = CASE WHEN pictures.state = 'taken' THEN pictures.stat ELSE excluded.stat END,
    waits_for = CASE WHEN pictures.record IS NULL OR pictures.state = 'taken' THEN pictures.waits_for
        WHEN {_IS_WANTED_AGAIN} THEN 'redo' WHEN {_IS_CHANGED} THEN 'changed' ELSE pictures.waits_for END,
    job = CASE WHEN {_WAITS} THEN excluded.job ELSE pictures.job END,
    reason = CASE WHEN {_WAITS} THEN excluded.reason ELSE pictures.reason END,
    state = CASE WHEN {_WAITS} THEN excluded.state ELSE pictures.state END
"""
_IS_OURS = "WHERE id = :id AND worker = :worker AND state = 'taken'"
_DONE = f"""
UPDATE pictures SET state = :state, content = :content, look = :look, made_by = :job, finish = :finish,
    max_new_tokens = :max_new_tokens, flags = :flags, record = :record, reason = NULL, waits_for = NULL, worker = NULL,
    edited = 0
{_IS_OURS}"""
_UNCHANGED = f"""
UPDATE pictures SET state = CASE WHEN flags IS NULL THEN 'done' ELSE 'flagged' END, waits_for = NULL, worker = NULL
{_IS_OURS}"""
# The caption of a picture that failed stays, unless it is of another picture.
_IS_SAME = ":content IS NULL OR content IS NULL OR :content = content"
_FAILED = f"""
UPDATE pictures SET state = 'failed', reason = :reason, worker = NULL, waits_for = NULL,
    record = CASE WHEN {_IS_SAME} THEN record END, flags = CASE WHEN {_IS_SAME} THEN flags END,
    content = coalesce(:content, content)
{_IS_OURS}"""
# `+state`: else SQLite may go through all that is done instead of the index of contents.
_SAME_CONTENT = """
SELECT * FROM pictures WHERE content IN (SELECT value FROM json_each(?)) AND +state IN ('done', 'flagged')
    AND record IS NOT NULL
    AND NOT EXISTS (SELECT 1 FROM mine WHERE mine.place = pictures.place)
ORDER BY id LIMIT 1000"""
_MOVE = f"""
UPDATE pictures SET (state, made_by, content, look, finish, max_new_tokens, flags, edited) =
    (SELECT state, made_by, content, look, finish, max_new_tokens, flags, edited FROM pictures WHERE id = :old),
    record = :record, reason = NULL, waits_for = NULL, worker = NULL
{_IS_OURS} AND record IS NULL AND EXISTS (SELECT 1 FROM pictures WHERE id = :old)"""
