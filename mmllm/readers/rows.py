"""Raw rows of data files by number, each parsed when it is indexed, its pictures not yet read.

JSON is indexed (`index.py`); parquet, Arrow and CSV are memory-mapped by `datasets`; of a tar only headers are read.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import PurePosixPath
from typing import Any, Protocol

from mmllm.locks import NO_LOCK_ERRNOS
from mmllm.readers.compression import inner_suffix
from mmllm.readers.files import DataError, RowError, is_folder, join_path, list_folder, matching_files, read_range
from mmllm.readers.folders import SIDECAR_ENDINGS, classify_files, describe_passed_over, ending_of, missing_package
from mmllm.readers.json_rows import JsonRows
from mmllm.readers.tables import arrow_rows, csv_rows, parquet_rows, saved_dataset
from mmllm.readers.tars import TarRows, add_member

METADATA_FILES = ("metadata.jsonl", "metadata.csv")  # of the imagefolder of `datasets`


class Rows(Protocol):
    """The raw rows of a source. A row that cannot be parsed raises RowError."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Any: ...


# Folders of pictures


class FolderRows:
    """Pictures with a sidecar each, which holds a caption or a row: `a.png` with `a.txt` or `a.json`."""

    def __init__(self, folder: str):
        self.folder = folder
        files = classify_files(list_folder(folder, recursive=True))
        self._pictures = files.pictures
        self._sidecars = {name[: -len(ending_of(name))] + ending_of(name): name for name in files.sidecars}
        self.passed_over = files.passed_over + files.unread_by_reason()

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, index: int) -> Any:
        name = self._pictures[index]
        if reason := missing_package(name):
            raise RowError(reason)
        stem = name.rsplit(".", 1)[0]
        row: dict[str, Any] = {"id": stem}
        endings = [ending for ending in SIDECAR_ENDINGS if stem + ending in self._sidecars]
        if not endings:
            raise RowError(f"no {stem}.txt or {stem}.json beside {name}, so there is nothing to learn about it")
        for ending in endings:
            add_member(row, ending[1:], read_range(join_path(self.folder, self._sidecars[stem + ending])))
        return {**{key: value for key, value in row.items() if key not in ("image", "images")}, "image": name}


class MetadataRows:
    """The rows of an imagefolder's metadata, with `file_name` renamed to `image` and `file_names` to `images`."""

    def __init__(self, rows: Rows):
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Any:
        names = {"file_name": "image", "file_names": "images"}
        fields = self._rows[index]
        return {names.get(key, key): value for key, value in fields.items()} if isinstance(fields, dict) else fields


def _open_folder(folder: str) -> Rows:
    names = list_folder(folder)
    if "state.json" in names or "dataset_dict.json" in names:
        return saved_dataset(folder)
    for name in METADATA_FILES:
        if name in names:
            return MetadataRows(READERS[PurePosixPath(name).suffix]([join_path(folder, name)]))
    rows = FolderRows(folder)
    if not len(rows):
        passed_over = describe_passed_over(rows.passed_over)
        note = f" ({passed_over})" if passed_over else ""
        raise DataError(
            f"{folder} is a folder without pictures or {', '.join(METADATA_FILES)}{note}; give a "
            "folder that holds them, one that `datasets` saved, or the path of the data file in it"
        )
    return rows


# The reader of a file


READERS: dict[str, Callable[[list[str]], Rows]] = {
    ".json": functools.partial(JsonRows, is_lines=False),
    ".jsonl": functools.partial(JsonRows, is_lines=True),
    ".parquet": parquet_rows,
    ".arrow": arrow_rows,
    ".feather": arrow_rows,
    ".csv": csv_rows,
    ".tsv": functools.partial(csv_rows, delimiter="\t"),
    ".tar": TarRows,
}


def suffix_of(path: str, allowed: Sequence[str]) -> str:
    """The suffix that decides the reader, without that of a compression. Raises DataError for one not allowed."""
    suffix = inner_suffix(path)
    if suffix not in allowed:
        raise DataError(
            f"{path} has the suffix {suffix!r}; allowed: {', '.join(allowed)}, also compressed as .gz or .zst"
        )
    return suffix


def open_rows(path: str) -> Rows:
    """The rows of a file, a pattern of files, or a folder. Raises DataError where they cannot be used at all."""
    try:
        rows = _open_folder(path) if is_folder(path) else _open_files(path)
    except OSError as error:
        if error.errno in NO_LOCK_ERRNOS:  # `datasets` locks its cache
            raise DataError(
                f"{path} needs a cache on a disk with locks, but that of `datasets` has none ({error.strerror}); set "
                "HF_DATASETS_CACHE to a folder of a local disk"
            ) from error
        raise DataError(f"{path} cannot be read ({error.strerror or error}); check the path and permissions") from error
    if not len(rows):
        raise DataError(f"{path} holds no rows; give a file with at least one conversation")
    return rows


def _open_files(path: str) -> Rows:
    reader = READERS[suffix_of(path, list(READERS))]
    return reader(matching_files(path))
