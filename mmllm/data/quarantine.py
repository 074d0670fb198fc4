"""The list of bad rows that `mmllm check` writes and a run reads: `<out>/check/bad.jsonl`, one row a line.

The list is valid for the file contents that were checked, whose hashes are in `<out>/check/report.json`. A run leaves
the listed rows out without reading them, but not those that were too long and the like: settings may have changed.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from mmllm.config import SourceConfig
from mmllm.data.inspection import PartReport
from mmllm.data.shards import STREAM_FORMATS
from mmllm.data.sources import BadRow
from mmllm.readers.compression import inner_suffix
from mmllm.readers.files import DataError, fingerprint, is_folder, join_path, list_folder, local_path, matching_files
from mmllm.readers.rows import READERS

CHECK_FOLDER = "check"
BAD_LIST_FILE = "bad.jsonl"
REPORT_FILE = "report.json"


def source_fingerprint(source: SourceConfig) -> str:
    """A hash of the contents of a source's files; in a folder, of its data files and of the names of all its files."""
    path = local_path(source.path)
    if not is_folder(path):
        return fingerprint(matching_files(path))
    names = list_folder(path, recursive=True)
    files = [join_path(path, name) for name in names if inner_suffix(name) in (*READERS, *STREAM_FORMATS, ".txt")]
    return fingerprint(files, names)


def _source_hashes(sources: Iterable[SourceConfig]) -> dict[str, str]:
    hashes = {}
    for source in sources:
        with contextlib.suppress(DataError, OSError):  # an unreadable source is reported by whoever reads its rows
            hashes[source.path] = source_fingerprint(source)
    return hashes


class QuarantineWriter:
    """Writes the list while rows are checked: into a new file, which replaces the old one when all rows are checked."""

    def __init__(self, out: str | Path, sources: Iterable[SourceConfig]):
        self._folder = Path(out) / CHECK_FOLDER
        self._folder.mkdir(parents=True, exist_ok=True)
        self._hashes = _source_hashes(sources)
        self._partial = self._folder / f"{BAD_LIST_FILE}.part"
        self._file: IO[str] = self._partial.open("w")
        self.path = self._folder / BAD_LIST_FILE

    def add(self, split: str, source: SourceConfig, part: PartReport) -> None:
        """Writes the bad rows of a part of this split (`train` or `val`)."""
        for row in part.bad:
            self._file.write(json.dumps({"split": split, "path": source.path, **asdict(row)}) + "\n")

    def close(self, report: Mapping[str, Any]) -> None:
        """Writes the report, and puts the list in its place."""
        self._file.close()
        (self._folder / REPORT_FILE).write_text(json.dumps({**report, "contents": self._hashes}, indent=2) + "\n")
        self._partial.replace(self.path)


def read_quarantine(out: str | Path, sources: Iterable[SourceConfig]) -> dict[tuple[str, int], BadRow]:
    """{(file, row): why it is left out} of the sources whose contents are still those that `mmllm check` read.

    Raises DataError where the folder holds something that `mmllm check` did not write.
    """
    folder = Path(out) / CHECK_FOLDER
    if not (folder / REPORT_FILE).is_file() or not (folder / BAD_LIST_FILE).is_file():
        return {}
    quarantine = {}
    try:
        hashes = json.loads((folder / REPORT_FILE).read_text())["contents"]
        unchanged = {path for path, value in _source_hashes(sources).items() if hashes.get(path) == value}
        with (folder / BAD_LIST_FILE).open() as file:
            for line in map(json.loads, file):
                row = BadRow(line["source"], line["row"], line["id"], line["reason"], line["because"])
                if line["path"] in unchanged and row.because != "settings":
                    quarantine[row.source, row.row] = row
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder} does not hold what `mmllm check` writes ({error!r}); run it again") from error
    return quarantine
