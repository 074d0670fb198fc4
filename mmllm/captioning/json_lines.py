"""The JSON-lines output of a captioning job: written from the ledger, and taken into it where a person changed it.

Its lines are those of jobs of before there was a ledger, whose files go on. A picture's line is `{"image", "caption",
...}`; of several lines of one picture the last counts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmllm.captioning.ledger import JobSettings, Ledger, columns_of_record, to_sql
from mmllm.errors import MmllmError
from mmllm.fault_points import fault_point

LINE_START = b'{"image": '


def take_in(ledger: Ledger, out: Path) -> int:
    """Takes the lines of a file into the ledger that are not what it wrote last; returns how many.

    A line that differs from what was written is a person's edit. A line that a person removed is no edit.
    Raises MmllmError for a file that holds something else, and takes nothing then.
    """
    if not out.exists():
        return 0
    if not out.is_file():
        raise MmllmError(f"--out {out} is a folder or a device; give the path of a file")
    written = ledger.written_file(out)
    stat = _stat_of(out)
    if written is not None and stat in (written["last_stat"], written["next_stat"]):
        return 0
    num_taken = 0
    with ledger.changes():
        for record in _read(out):
            place = to_sql(record["image"])
            old = ledger.database.execute("SELECT record FROM pictures WHERE place = ?", (place,)).fetchone()
            if old is not None and old["record"] is not None and json.loads(old["record"]) == record:
                continue
            num_taken += 1
            values = {"place": place, "edited": written is not None, **columns_of_record(record)}
            values |= {"name": to_sql(Path(record["image"]).name), "job": _job_of(record)}
            ledger.database.execute(_TAKE_IN, values)
        ledger.note_written(out, stat)
        fault_point("captions taken in: before commit")
    return num_taken


_TAKE_IN = """
INSERT INTO pictures (place, name, origin, stat, fields, state, job, made_by, finish, max_new_tokens, flags, edited,
    record)
VALUES (:place, :name, '', '', '', :state, :job, :job, :finish, :max_new_tokens, :flags, :edited, :record)
ON CONFLICT (place) DO UPDATE SET state = :state, finish = :finish, max_new_tokens = :max_new_tokens, flags = :flags,
    edited = :edited, record = :record, made_by = coalesce(made_by, :job), worker = NULL, waits_for = NULL,
    reason = NULL
"""


def _job_of(record: Mapping[str, Any]) -> str:
    """The job that would make this line today."""
    model, model_hash, prompt = (str(record.get(name)) for name in ("model", "model_hash", "prompt"))
    return JobSettings(model, model_hash, prompt).key


def write(ledger: Ledger, out: Path) -> None:
    """Writes the whole file from the ledger, in the order of the pictures' places. It is replaced as a whole."""
    partial = out.with_name(f"{out.name}.part")
    out.parent.mkdir(parents=True, exist_ok=True)
    with partial.open("wb") as file:
        for row in ledger.records(with_flagged=True):
            file.write(row["record"].encode() + b"\n")
    now = _stat_of(out) if out.exists() else ""  # known already, or taken in
    # said before it is so: whenever the process ends, this file is one that the ledger knows
    with ledger.changes():
        ledger.note_written(out, now, _stat_of(partial))
    fault_point("captions written: before rename")
    partial.replace(out)


def _stat_of(path: Path) -> str:
    stat = path.stat()
    return f"{stat.st_size}:{stat.st_mtime_ns}"


def read_captions(path: Path) -> dict[str, str]:
    """The captions of such a file by picture."""
    return {record["image"]: record["caption"] for record in _read(path)}


def _read(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a file without a last line that is half written. Raises MmllmError for lines that are none."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            record = _record(line)
            if record is not None:
                yield record
            elif not line.endswith(b"\n") and (line.startswith(LINE_START) or LINE_START.startswith(line)):
                return  # the process that wrote it was killed
            elif line.strip():
                raise MmllmError(
                    f"{path} line {number} is not a caption of this command; repair or remove the line, "
                    "or give another --out"
                )


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    is_caption = isinstance(record, dict) and all(isinstance(record.get(key), str) for key in ("image", "caption"))
    return record if is_caption else None
