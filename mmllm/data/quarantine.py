"""What `mmllm check` found and a run uses: `<out>/check/bad.jsonl`, one line for each row that is left out.

A line holds for the file contents that were looked at, whose hash stands in `<out>/check/report.json`. A run leaves out
the rows whose own fault it was (or their pictures'), without looking at them again; settings may have changed since.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from mmllm.config import SourceConfig
from mmllm.data.inspection import Part
from mmllm.data.shards import STREAMS
from mmllm.data.sources import BadRow
from mmllm.readers.arrow_to_python import inner_suffix
from mmllm.readers.files import DataError, expand, fingerprint, is_folder, join, list_folder, local_path
from mmllm.readers.rows import READERS

FOLDER = "check"
BAD_LIST = "bad.jsonl"
REPORT = "report.json"


def source_fingerprint(source: SourceConfig) -> str:
    """A hash of what a source holds; of a folder, of its data files, or of the names where it is full of pictures."""
    path = local_path(source.path)
    if not is_folder(path):
        return fingerprint(expand(path))
    names = list_folder(path, recursive=True)
    files = [join(path, name) for name in names if inner_suffix(name) in (*READERS, *STREAMS, ".txt")]
    return fingerprint(files, names)


def _hashes(sources: Iterable[SourceConfig]) -> dict[str, str]:
    found = {}
    for source in sources:
        with contextlib.suppress(DataError, OSError):  # whoever reads the source says that it cannot be read
            found[source.path] = source_fingerprint(source)
    return found


class Writer:
    """Writes the list while rows are looked at: into a new file, which takes the old one's place when all is seen."""

    def __init__(self, out: str | Path, sources: Iterable[SourceConfig]):
        self._folder = Path(out) / FOLDER
        self._folder.mkdir(parents=True, exist_ok=True)
        self._hashes = _hashes(sources)
        self._partial = self._folder / f"{BAD_LIST}.part"
        self._file: IO[str] = self._partial.open("w")
        self.path = self._folder / BAD_LIST

    def add(self, split: str, source: SourceConfig, part: Part) -> None:
        """The bad rows of a part."""
        for row in part.bad:
            self._file.write(json.dumps({"split": split, "path": source.path, **asdict(row)}) + "\n")

    def close(self, report: Mapping[str, Any]) -> None:
        """Puts list and report in place."""
        self._file.close()
        (self._folder / REPORT).write_text(json.dumps({**report, "contents": self._hashes}, indent=2) + "\n")
        self._partial.replace(self.path)


def read_quarantine(out: str | Path, sources: Iterable[SourceConfig]) -> dict[tuple[str, int], BadRow]:
    """The listed rows, by file and number, of those sources that still hold what `mmllm check` looked at."""
    folder = Path(out) / FOLDER
    if not (folder / REPORT).is_file() or not (folder / BAD_LIST).is_file():
        return {}
    found = {}
    try:
        hashes = json.loads((folder / REPORT).read_text())["contents"]
        now = {path: value for path, value in _hashes(sources).items() if hashes.get(path) == value}
        with (folder / BAD_LIST).open() as file:
            for line in map(json.loads, file):
                row = BadRow(line["source"], line["row"], line["id"], line["reason"], line["because"])
                if line["path"] in now and row.because != "settings":
                    found[row.source, row.row] = row
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder} does not hold what `mmllm check` writes ({error!r}); run it again") from error
    return found
