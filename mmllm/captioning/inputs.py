"""The pictures of a captioning job: files, folders, patterns, lists, tars, and fsspec URLs of all of these.

They are found one after the other, so a million of them take no memory, and read when their turn comes.
"""

from __future__ import annotations

import functools
import glob
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from mmllm.data.row_pictures import locate_picture, parse_picture
from mmllm.errors import MmllmError
from mmllm.images import read_image_file
from mmllm.readers.compression import decoded_copy, inner_suffix
from mmllm.readers.files import (
    LazyImage,
    RowError,
    filesystem,
    is_folder,
    is_url,
    join_path,
    matching_files,
    parent_folder,
    read_range,
)
from mmllm.readers.folders import classify_files
from mmllm.readers.rows import READERS, Rows, open_rows
from mmllm.readers.tars import member_places

NAMES_AT_ONCE = 1000  # of a folder that are classified together
# Columns that hold the picture of a row, the first that a list has.
IMAGE_COLUMNS = (
    "image", "images", "image_path", "file_name", "filename", "filepath", "path", "jpg", "jpeg", "png", "webp",
)  # fmt: skip


@dataclass(frozen=True)
class FoundPicture:
    """A picture that was found, not yet read."""

    place: str  # what the output calls it: its path as the user wrote it, or that of its tar or list with a name
    name: str  # its relative path below the input, for files that mirror the folders
    stat: str = ""  # changes when the file changes; empty where that is not known
    origin: str = ""  # JSON of what `read_picture` needs; empty where `place` is a path
    fields: Mapping[str, Any] = field(default_factory=dict)  # columns of its row that the prompt names
    unread: str = ""  # why it cannot be captioned


class PictureInputs:
    """Iterates over the pictures of a job in the order in which they are found; a picture may come twice.

    After an iteration `passed_over` counts the other files by reason.
    """

    def __init__(self, inputs: Sequence[str], *, image_column: str | None = None, columns: Sequence[str] = ()):
        texts = map(str, inputs)
        self.inputs = list(dict.fromkeys(text if is_url(text) else str(Path(text)) for text in texts))
        self.image_column, self.columns = image_column, columns
        self.passed_over: Counter[str] = Counter()

    def __iter__(self) -> Iterator[FoundPicture]:
        """Raises MmllmError for an input that cannot be searched at all."""
        self.passed_over.clear()
        for text in self.inputs:
            for path in _expand(text):
                yield from self._pictures_of(path, len(self.inputs) > 1)

    def _pictures_of(self, path: str, has_others: bool) -> Iterator[FoundPicture]:
        if is_folder(path):
            prefix = f"{PurePosixPath(path.rstrip('/')).name}/" if has_others else ""
            names = _names_of_url(path) if is_url(path) else _names_of_folder(path)
            return self._folder(path, prefix, names)
        suffix = inner_suffix(path)
        if suffix == ".tar":
            return self._tar(path)
        if suffix in READERS:
            return self._list(path)
        stat = "" if is_url(path) else _stat_of(path)
        return iter([FoundPicture(path, PurePosixPath(path).name, stat, _url_origin(path))])

    def _folder(self, folder: str, prefix: str, found: Iterable[tuple[str, str | OSError]]) -> Iterator[FoundPicture]:
        """Of (name, stat or why it cannot be searched) of each file below a folder."""
        found = iter(found)
        while chunk := dict(itertools.islice(found, NAMES_AT_ONCE)):
            for name, error in chunk.items():
                if isinstance(error, OSError):
                    why = f"{name} cannot be searched ({error.strerror}); check its rights"
                    yield FoundPicture(name, prefix + name, unread=why)
            stats = {name: stat for name, stat in chunk.items() if isinstance(stat, str)}
            files = classify_files(stats)
            self.passed_over += files.passed_over
            for name in files.pictures:
                place = join_path(folder, name)
                yield FoundPicture(place, prefix + name, stats[name], _url_origin(place))
            for name, reason in files.unread.items():
                place = join_path(folder, name)
                yield FoundPicture(place, prefix + name, unread=f"{place} is {reason}")

    def _tar(self, path: str) -> Iterator[FoundPicture]:
        stat, readable = ("" if is_url(path) else _stat_of(path)), decoded_copy(path, is_text=False)
        for name, offset, size in member_places(readable):
            files = classify_files([name])
            self.passed_over += files.passed_over
            place = f"{path}/{name}"
            for reason in files.unread.values():
                yield FoundPicture(place, name, unread=f"{place} is {reason}")
            if files.pictures:
                origin = {"tar": path, "offset": offset, "size": size}
                yield FoundPicture(place, name, f"{stat}:{offset}:{size}", json.dumps(origin))

    def _list(self, path: str) -> Iterator[FoundPicture]:
        rows, folder = open_rows(path), parent_folder(path)
        stat = "" if is_url(path) else _stat_of(path)
        for number in range(len(rows)):
            place = f"{path}/{number}"
            try:
                row = rows[number]
                column = _column_of(row, self.image_column)
                values = row[column] if isinstance(row[column], list) else [row[column]]
                fields = {key: row[key] for key in self.columns if isinstance(row.get(key), str | int | float)}
                for index, value in enumerate(values):
                    picture = locate_picture(parse_picture(value, column), folder)
                    if isinstance(picture, str):
                        relative = os.path.relpath(picture, folder)
                        name = PurePosixPath(picture).name if relative.startswith("..") else relative
                        yield FoundPicture(picture, name, _stat_of(picture), fields=fields)
                        continue
                    origin = {"list": path, "row": number, "column": column, "index": index}
                    of_several = f".{index}" if len(values) > 1 else ""
                    yield FoundPicture(
                        place + of_several, f"{number}{of_several}", f"{stat}:{number}", json.dumps(origin), fields
                    )
            except RowError as error:
                yield FoundPicture(place, str(number), unread=f"row {number} of {path}: {error}")


def _expand(text: str) -> Iterator[str]:
    """The files of a pattern; a path or URL without one, or that exists as it is, is itself. Raises MmllmError."""
    has_pattern = any(character in text for character in "*?[{")
    if not has_pattern or (not is_url(text) and Path(text).exists()):
        return iter([text])
    if is_url(text) or "{" in text:
        return iter(matching_files(text))
    found = glob.iglob(text, recursive=True)  # noqa: PTH207 - Path.glob takes no absolute pattern
    first = next(found, None)
    if first is None:
        raise MmllmError(f"no file matches {text}; check the pattern (now in {Path.cwd()})")
    return itertools.chain([first], found)


def _names_of_folder(folder: str) -> Iterator[tuple[str, str | OSError]]:
    """(name below the folder, stat) of each file at any depth, without following links to other folders."""
    waiting = [""]
    while waiting:
        inner = waiting.pop()
        try:
            with os.scandir(Path(folder, inner)) as entries:
                for entry in entries:
                    name = f"{inner}/{entry.name}" if inner else entry.name
                    if entry.is_dir():
                        waiting += [] if entry.is_symlink() else [name]
                    else:
                        yield name, _stat_of(entry)
        except OSError as error:
            yield str(Path(folder, inner)), error


def _names_of_url(url: str) -> Iterator[tuple[str, str | OSError]]:
    fs, inner = filesystem(url)
    for path, info in fs.find(inner, detail=True).items():
        marks = [str(info[key]) for key in ("size", "mtime", "ETag", "etag", "LastModified", "md5Hash") if key in info]
        yield str(path).removeprefix(str(inner)).lstrip("/"), ":".join(marks)


def _stat_of(path: str | os.DirEntry[str]) -> str:
    """Size and times of a file; empty where there is none, which reading it will say."""
    try:
        stat = path.stat() if isinstance(path, os.DirEntry) else Path(path).stat()
    except OSError:
        return ""
    return f"{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}"


def _url_origin(place: str) -> str:
    return json.dumps({"url": place}) if is_url(place) else ""


def _column_of(row: Any, given: str | None) -> str:
    """The column with a row's picture. Raises RowError."""
    if not isinstance(row, dict):
        raise RowError("it is no object with columns")
    allowed = (given,) if given else IMAGE_COLUMNS
    column = next((name for name in allowed if row.get(name) not in (None, "", [])), None)
    if column is None:
        columns = ", ".join(map(str, row)) or "none"
        raise RowError(
            f"it has no picture under {' or '.join(allowed)}; its columns: {columns}; name the right one with "
            "--image-column"
        )
    return column


def read_picture(place: str, origin: str) -> bytes:
    """The bytes of a picture's file. Raises MmllmError or OSError where they cannot be read."""
    if not origin:
        return read_image_file(place)
    where = json.loads(origin)
    if "url" in where:
        return read_range(where["url"])
    if "tar" in where:
        start = where["offset"]
        return read_range(_decoded_tar(where["tar"]), start, start + where["size"])
    value = _rows_of(where["list"])[where["row"]][where["column"]]
    picture = parse_picture(value[where["index"]] if isinstance(value, list) else value, where["column"])
    picture = locate_picture(picture, parent_folder(where["list"]))
    if isinstance(picture, str):
        return read_image_file(picture)
    return picture.load() if isinstance(picture, LazyImage) else picture


@functools.lru_cache(maxsize=64)
def _decoded_tar(path: str) -> str:
    return decoded_copy(path, is_text=False)


@functools.lru_cache(maxsize=4)
def _rows_of(path: str) -> Rows:
    return open_rows(path)


def container_of(place: str, origin: str) -> str:
    """The path of the file that holds a picture: the picture's own, or that of its tar or list."""
    where = json.loads(origin) if origin else {}
    return str(where.get("tar") or where.get("list") or where.get("url") or place)
