"""WebDataset tars: samples of files that share a name, read by number or from front to back.

The name of a sample ends at the first dot, as in WebDataset: `7.left.png`, `7.right.png` and `7.json` are one sample.
Where a picture has a text of its own under a longer name, as `cat.v2.jpg` with `cat.v2.txt`, it ends at the last dot.
"""

from __future__ import annotations

import tarfile
from array import array
from collections.abc import Callable, Iterable, Iterator
from pathlib import PurePosixPath
from typing import IO, Any

import numpy as np

from mmllm.readers.compression import DECOMPRESSION_ERRORS, decoded_copy, open_decompressed
from mmllm.readers.files import DataError, RowError, lazy_image_at, open_file
from mmllm.readers.folders import PICTURE_ENDINGS, SIDECAR_ENDINGS
from mmllm.readers.json_rows import parse_row

PICTURE_SUFFIXES = tuple(ending[1:] for ending in PICTURE_ENDINGS)
CAPTION_SUFFIXES = tuple(ending[1:] for ending in SIDECAR_ENDINGS if ending != ".json")
# What operating systems leave among people's files: macOS its forks, Finder and Explorer their settings.
_SYSTEM_FILES = {"__MACOSX", ".DS_Store", "Thumbs.db", "desktop.ini"}


def _relative_name(name: str) -> str:
    """A member's name without the `./` that `tar -C folder .` puts before it."""
    return PurePosixPath(name).as_posix().lstrip("/")


def _is_system_file(name: str) -> bool:
    return any(part in _SYSTEM_FILES or part.startswith("._") for part in name.split("/"))


def _key(name: str) -> tuple[str | None, str]:
    """(WebDataset's key, the rest of the name with its ending in lower case); None as the key of a hidden file."""
    from webdataset.tariterators import base_plus_ext

    base, suffix = base_plus_ext(name)
    stem, dot, ending = (suffix or "").rpartition(".")
    return base, f"{stem}{dot}{ending.lower()}"


def group_members(members: Iterable[tuple[str, Any]]) -> Iterator[dict[str, Any]]:
    """Samples, {"__key__": key, suffix: value, ...}, from the (name, value) of a tar's members in their order."""
    try:
        from webdataset.tariterators import group_by_keys
    except ImportError as error:
        raise DataError("tars are read with webdataset: pip install 'mmllm[tars]'") from error
    named = ((_relative_name(name), value) for name, value in members)
    files = ({"fname": name, "data": value, "__url__": ""} for name, value in named if not _is_system_file(name))
    try:
        for sample in group_by_keys(files, keys=_key, lcase=False):
            yield from _split_by_stem(sample)
    except DataError:
        raise
    except ValueError as error:
        raise DataError(f"a tar holds the same name twice: {error.args[0]}") from error


def _split_by_stem(sample: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The samples under one key: several, where pictures have texts of their own under longer names."""
    members = {suffix: value for suffix, value in sample.items() if not suffix.startswith("__")}
    parts: dict[str, dict[str, Any]] = {}
    has_own_text = False
    for suffix, value in members.items():
        stem, _, ending = suffix.rpartition(".")
        parts.setdefault(stem, {})[ending] = value
    for stem, part in parts.items():
        has_picture = any(ending in PICTURE_SUFFIXES for ending in part)
        has_own_text |= bool(stem) and has_picture and any(ending in ("json", *CAPTION_SUFFIXES) for ending in part)
    if not has_own_text:
        yield sample
        return
    for stem, part in parts.items():
        yield {"__key__": f"{sample['__key__']}.{stem}" if stem else sample["__key__"], **part}


def tar_row(sample: dict[str, Any], read: Callable[[Any], Any]) -> dict[str, Any]:
    """The raw row of a tar's sample. Raises RowError where no text belongs to its pictures."""
    row = member_row(sample, read)
    endings = {suffix.split(".")[-1] for suffix in sample}
    if row["images"] and not endings & {"json", *CAPTION_SUFFIXES}:
        raise RowError(
            f"no .txt or .json with the picture {sample['__key__']}, so there is nothing to learn about it; in a tar, "
            "the files of one name must follow each other (`tar --sort=name`)"
        )
    return row


def member_row(sample: dict[str, Any], read: Callable[[Any], Any]) -> dict[str, Any]:
    """A raw row of the members of one sample: pictures in their order, the fields of a .json, and a caption.

    `read` returns the bytes of a member.
    """
    row: dict[str, Any] = {"id": sample["__key__"]}
    members = [(suffix, value) for suffix, value in sample.items() if not suffix.startswith("__")]
    row["images"] = [value for suffix, value in members if suffix.split(".")[-1] in PICTURE_SUFFIXES]
    row["image"] = None
    for suffix, value in members:
        last = suffix.split(".")[-1]
        if last == "json" or last in CAPTION_SUFFIXES:
            add_member(row, last, read(value))
        elif last not in PICTURE_SUFFIXES:
            row[suffix] = suffix
    return row


def add_member(row: dict[str, Any], suffix: str, data: Any) -> None:
    """Adds to a row what a file beside its picture holds: the fields of a .json, or a caption.

    A caption file wins over a caption in the .json. `data` is bytes, or what a table has parsed already.
    """
    if suffix == "json":
        data = data.encode() if isinstance(data, str) else data
        fields = parse_row(data) if isinstance(data, bytes) else data
        fields = {"caption": fields} if isinstance(fields, str) else fields
        if not isinstance(fields, dict):
            raise RowError("the .json beside the picture must hold an object or a string")
        row.update({key: value for key, value in fields.items() if key not in row})
        return
    try:
        text = data.decode("utf-8-sig") if isinstance(data, bytes) else data
    except UnicodeDecodeError as error:
        raise RowError(f"the .{suffix} beside the picture is not UTF-8 text at byte {error.start}") from error
    row["caption"] = text.strip() if isinstance(text, str) else text


class TarRows:
    """WebDataset tars by number. Of each member three numbers stay in memory: its suffix, offset and size.

    A compressed tar is decompressed into the cache.
    """

    def __init__(self, files: list[str]):
        self._files = [decoded_copy(path, is_text=False) for path in files]
        self._names = files
        self._suffixes: dict[str, int] = {}
        keys, ends, tars = bytearray(), array("q"), array("q")
        members, first = array("q"), array("q", [0])
        for number, path in enumerate(self._files):
            for sample in group_members(_headers(path, files[number])):
                keys += sample["__key__"].encode(errors="replace")
                ends.append(len(keys))
                for suffix, place in sample.items():
                    if not suffix.startswith("__"):
                        members.extend((self._suffixes.setdefault(suffix, len(self._suffixes)), *place))
                first.append(len(members) // 3)
                tars.append(number)
        self._keys = bytes(keys)
        self._members = np.asarray(members).reshape(-1, 3)
        self._ends, self._first, self._tars = (np.asarray(values) for values in (ends, first, tars))
        self._suffix_names = list(self._suffixes)

    def __len__(self) -> int:
        return len(self._tars)

    def __getitem__(self, index: int) -> Any:
        number = int(self._tars[index])
        begin = int(self._ends[index - 1]) if index else 0
        sample: dict[str, Any] = {"__key__": self._keys[begin : int(self._ends[index])].decode()}
        for suffix_id, start, size in self._members[self._first[index] : self._first[index + 1]].tolist():
            suffix = self._suffix_names[suffix_id]
            name = f"{self._names[number]}/{sample['__key__']}.{suffix}"
            sample[suffix] = lazy_image_at(self._files[number], start, size, name)
        return tar_row(sample, lambda stored: stored.load())


def _check_size(file: IO[bytes], name: str) -> None:
    """Raises DataError for a tar that is cut off: `tarfile` takes half a header for the end of the tar."""
    if file.seek(0, 2) % tarfile.BLOCKSIZE:
        raise DataError(f"{name} is cut off: a tar is made of blocks of {tarfile.BLOCKSIZE} bytes; copy it again")


def _is_data_file(member: tarfile.TarInfo) -> bool:
    """Whether a member is a file with data, and not WebDataset's own metadata (`__name__`)."""
    first = _relative_name(member.name).split("/")[0]
    return member.isreg() and not (first.startswith("__") and first.endswith("__"))


def _headers(path: str, name: str) -> Iterator[tuple[str, tuple[int, int]]]:
    """(name, (offset, size)) of each member. Raises DataError where the tar is damaged."""
    try:
        with open_file(path) as file:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    if _is_data_file(member):
                        yield member.name, (member.offset_data, member.size)
                    tar.members = []  # type: ignore[attr-defined]  # or the tar would remember them all
            _check_size(file, name)
    except tarfile.TarError as error:
        raise DataError(f"{name} is not a tar that can be read to its end: {error}") from error


def member_places(path: str) -> Iterator[tuple[str, int, int]]:
    """(name, offset, size) of each file of a tar that is not compressed, in their order; nothing of it stays in memory.

    Raises DataError where the tar is damaged.
    """
    for name, (offset, size) in _headers(path, path):
        if not _is_system_file(name):
            yield _relative_name(name), offset, size


def read_members(path: str) -> Iterator[tuple[str, bytes]]:
    """The names and contents of a tar's files from front to back. Raises DataError where it is damaged."""
    try:
        with open_decompressed(path) as file:
            with tarfile.open(fileobj=file, mode="r|") as tar:
                for member in tar:
                    if _is_data_file(member):
                        content = tar.extractfile(member)
                        assert content is not None
                        yield member.name, content.read()
                    tar.members = []  # type: ignore[attr-defined]
            if path.endswith(".tar") and file.seekable():
                _check_size(file, path)
    except (tarfile.TarError, *DECOMPRESSION_ERRORS) as error:
        raise DataError(f"{path} is not a tar that can be read to its end: {error}") from error
