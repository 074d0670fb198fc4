"""The output file of a captioning job, which is also its ledger: a picture that has a line in it is done."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from mmllm.errors import MmllmError
from mmllm.locks import lock_file, no_locks_warning

LINE_START = b'{"image": '


@dataclass(frozen=True)
class DoneCaption:
    """How the caption of a line was made."""

    model_hash: str
    prompt: str
    cut_at: int | None  # the limit of tokens at which it was cut off; None for a caption that ended by itself

    def is_of(self, stamp: Mapping[str, str]) -> bool:
        """Whether it is of the same model and the same prompt."""
        return (self.model_hash, self.prompt) == (stamp["model_hash"], stamp["prompt"])


class Ledger:
    """The output file, opened and locked: the captions that it holds, and new ones that are appended.

    Raises MmllmError where another job has locked the file, or where a line of it is not a caption.
    """

    def __init__(self, path: Path):
        self.path = path
        if path.exists() and not path.is_file():
            raise MmllmError(f"--out {path} is a folder or a device; give the path of a file")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        self.done: dict[str, DoneCaption] = {}  # by picture; of several lines for one picture the last counts
        self._has_replaced = False
        try:
            outcome = lock_file(self._file)
            if outcome == "taken":
                raise MmllmError(f"another run is writing {path}; wait for its end, or give another --out")
            if outcome == "none":
                print(no_locks_warning(path), flush=True)
            self._read()
        except (ValueError, OSError):
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    def _read(self) -> None:
        self._file.seek(0)
        position = 0
        for number, line in enumerate(self._file, 1):
            record = _record(line)
            if record is not None:
                self._remember(record)
            elif not line.endswith(b"\n") and (line.startswith(LINE_START) or LINE_START.startswith(line)):
                self._file.truncate(position)  # an unfinished line: the run that wrote it was killed
                break
            elif line.strip():
                raise MmllmError(
                    f"{self.path} line {number} is not a caption of this command; repair or remove the line, "
                    "or give another --out"
                )
            position += len(line)
            if not line.endswith(b"\n"):
                self._file.write(b"\n")
                self._file.flush()

    def _remember(self, record: Mapping[str, Any]) -> None:
        self._has_replaced |= record["image"] in self.done
        limit = record.get("max_new_tokens", record.get("num_new_tokens"))
        cut_at = (limit if isinstance(limit, int) else 0) if record.get("finish") == "length" else None
        self.done[record["image"]] = DoneCaption(str(record.get("model_hash")), str(record.get("prompt")), cut_at)

    def append(self, records: Sequence[dict[str, Any]]) -> None:
        self._file.write(b"".join(json.dumps(record).encode() + b"\n" for record in records))
        self._file.flush()
        for record in records:
            self._remember(record)

    def drop_replaced(self) -> None:
        """Removes the earlier lines of pictures that were captioned again. The file is replaced as a whole."""
        if not self._has_replaced:
            return
        self._file.seek(0)
        lines = {(_record(line) or {}).get("image"): line for line in self._file}
        partial = self.path.with_name(f"{self.path.name}.part")
        partial.write_bytes(b"".join(lines.values()))
        partial.replace(self.path)
        self._has_replaced = False


def read_captions(path: Path) -> dict[str, str]:
    """The captions of such a file by picture; of several lines of one picture the last counts."""
    with path.open("rb") as file:
        return {record["image"]: record["caption"] for line in file if (record := _record(line))}


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    is_caption = isinstance(record, dict) and all(isinstance(record.get(key), str) for key in ("image", "caption"))
    return record if is_caption else None
