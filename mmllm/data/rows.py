"""Rows of data files by number: a raw row is what its file says, parsed when asked for, its pictures not yet read.

JSON is indexed (`index.py`); parquet, arrow and CSV are memory maps of `datasets`; of a tar only the headers are read.
"""

from __future__ import annotations

import json
import re
import tarfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import PurePosixPath
from typing import IO, Any, Protocol

import numpy as np

from mmllm.data.files import (
    DataError,
    RowError,
    Stored,
    expand,
    is_folder,
    is_url,
    join,
    list_folder,
    open_file,
    read_range,
    stored_part,
)
from mmllm.data.folders import (
    PICTURE_ENDINGS,
    SIDECAR_ENDINGS,
    ending_of,
    missing_package,
    sort_files,
    tell_passed_over,
)
from mmllm.data.index import Offsets, line_offsets, list_offsets
from mmllm.locks import NO_LOCKS

PICTURE_SUFFIXES = tuple(ending[1:] for ending in PICTURE_ENDINGS)
CAPTION_SUFFIXES = tuple(ending[1:] for ending in SIDECAR_ENDINGS if ending != ".json")
METADATA = ("metadata.jsonl", "metadata.csv")  # of datasets' imagefolder


class Rows(Protocol):
    """The raw rows of a source. A row that cannot be parsed raises RowError."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Any: ...


def parse_row(data: bytes) -> Any:
    """One row of JSON. Raises RowError."""
    try:
        return json.loads(data.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        at = f"character {error.pos}" if error.lineno == 1 else f"its line {error.lineno}, column {error.colno}"
        raise RowError(f"the row is not JSON at {at}: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise RowError(f"the row is not UTF-8 text at byte {error.start}; save the file as UTF-8") from error
    except (RecursionError, ValueError) as error:  # nested too deep, a number of too many digits
        raise RowError(f"the row cannot be read as JSON: {error}") from error


class JsonRows:
    """JSON lists or JSON lines, held as two positions a row."""

    def __init__(self, files: list[str], find: Callable[[Any, str], Offsets]):
        self._files = files
        found = []
        for path in files:
            with open_file(path) as file:
                found.append(find(file, path))
        self._starts = np.concatenate([starts for starts, _ in found])
        self._ends = np.concatenate([ends for _, ends in found])
        self._behind = np.cumsum([len(starts) for starts, _ in found])  # how many rows lie before each next file

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Any:
        path = self._files[int(np.searchsorted(self._behind, index, "right"))]
        return parse_row(read_range(path, int(self._starts[index]), int(self._ends[index])))


# Arrow


def plain(scalar: Any, name: str) -> Any:
    """An Arrow value as JSON would have it; bytes, which may be a picture, are left where they are."""
    import pyarrow as pa

    if not scalar.is_valid:
        return None
    if isinstance(scalar, pa.ExtensionScalar):
        return plain(scalar.value, name)
    if isinstance(scalar, pa.StructScalar):
        return {key: plain(value, f"{name}.{key}") for key, value in scalar.items()}
    if isinstance(scalar, pa.ListScalar):  # of all kinds: fixed and large ones are its subclasses
        return [plain(value, f"{name}[{number}]") for number, value in enumerate(scalar)]
    if isinstance(scalar, pa.BinaryScalar) and not isinstance(scalar, pa.StringScalar):
        return Stored(name, scalar.as_py)
    return scalar.as_py()


class ArrowRows:
    """A table of `datasets`, memory-mapped."""

    def __init__(self, path: str, dataset: Any):
        self._path, self._dataset = path, dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Any:
        table = self._dataset.data.fast_slice(index, 1)
        names = table.column_names
        return {name: plain(table.column(name)[0], f"{self._path} row {index} {name}") for name in names}


def _load_arrow(builder: str, files: list[str]) -> ArrowRows:
    """`datasets` turns parquet and CSV into Arrow files in its cache (HF_DATASETS_CACHE), once."""
    import datasets
    import pyarrow as pa

    datasets.disable_progress_bars()
    try:
        dataset = datasets.load_dataset(builder, data_files={"train": files}, split="train")
    except (datasets.exceptions.DatasetGenerationError, pa.ArrowInvalid) as error:
        raise DataError(f"{files[0]} is not {builder} that can be read: {error.__cause__ or error}") from error
    return ArrowRows(files[0], dataset)


def _arrow_files(files: list[str]) -> ArrowRows:
    import datasets
    import pyarrow as pa

    if any(map(is_url, files)):
        raise DataError(f"{files[0]} is an .arrow file elsewhere, and those are memory-mapped: copy it to a local disk")
    try:
        parts = [datasets.Dataset.from_file(path) for path in files]
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{files[0]} is not an Arrow stream that `datasets` wrote: {error}") from error
    return ArrowRows(files[0], datasets.concatenate_datasets(parts))


def _saved_dataset(folder: str) -> ArrowRows:
    import datasets

    found = datasets.load_from_disk(folder)
    if isinstance(found, datasets.DatasetDict):
        raise DataError(f"{folder} holds the splits {', '.join(found)}; give the folder of one, such as {folder}/train")
    return ArrowRows(folder, found)


# Folders of pictures


class FolderRows:
    """Pictures with a caption or a row beside each: `a.png` with `a.txt` or `a.json`."""

    def __init__(self, folder: str):
        self.folder = folder
        files = sort_files(list_folder(folder, recursive=True))
        self._pictures = files.pictures
        self._beside = {name[: -len(ending_of(name))] + ending_of(name): name for name in files.sidecars}
        self.passed_over = files.passed_over + files.unread_by_reason()

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, index: int) -> Any:
        name = self._pictures[index]
        if reason := missing_package(name):
            raise RowError(reason)
        stem = name.rsplit(".", 1)[0]
        row: dict[str, Any] = {"id": stem}
        found = [ending for ending in SIDECAR_ENDINGS if stem + ending in self._beside]
        if not found:
            raise RowError(f"no {stem}.txt or {stem}.json beside {name}, so there is nothing to learn about it")
        for ending in found:
            _add_member(row, ending[1:], read_range(join(self.folder, self._beside[stem + ending])))
        return {**{key: value for key, value in row.items() if key not in ("image", "images")}, "image": name}


def _add_member(row: dict[str, Any], suffix: str, data: bytes) -> None:
    """Puts what stands beside a picture into its row: the fields of a .json, or a caption, which goes before theirs."""
    if suffix == "json":
        fields = parse_row(data)
        fields = {"caption": fields} if isinstance(fields, str) else fields
        if not isinstance(fields, dict):
            raise RowError("the .json beside the picture must hold an object or a string")
        row.update({key: value for key, value in fields.items() if key not in row})
        return
    try:
        row["caption"] = data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise RowError(f"the .{suffix} beside the picture is not UTF-8 text at byte {error.start}") from error


class MetadataRows:
    """The rows of an imagefolder's metadata, whose pictures are called `file_name` or `file_names`."""

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
        return _saved_dataset(folder)
    for name in METADATA:
        if name in names:
            return MetadataRows(READERS[PurePosixPath(name).suffix]([join(folder, name)]))
    rows = FolderRows(folder)
    if not len(rows):
        others = tell_passed_over(rows.passed_over)
        raise DataError(
            f"{folder} is a folder without pictures or {', '.join(METADATA)}{f' ({others})' if others else ''}; give a "
            "folder that holds them, one that `datasets` saved, or the path of the data file in it"
        )
    return rows


# Tars


def group_members(members: Iterable[tuple[str, Any]]) -> Iterator[dict[str, Any]]:
    """WebDataset's samples, {"__key__", suffix: value}, out of (name, value) in the order of a tar."""
    try:
        from webdataset.tariterators import group_by_keys
    except ImportError as error:
        raise DataError("tars are read with webdataset: pip install 'mmllm[tars]'") from error
    try:
        yield from group_by_keys({"fname": name, "data": value, "__url__": ""} for name, value in members)
    except DataError:
        raise
    except ValueError as error:
        raise DataError(f"a tar holds the same name twice: {error.args[0]}") from error


def tar_row(sample: dict[str, Any], read: Callable[[Any], bytes]) -> dict[str, Any]:
    """The raw row of a WebDataset sample: pictures in the order of the tar, .json fields, and a caption."""
    row: dict[str, Any] = {"id": sample["__key__"]}
    members = [(suffix, value) for suffix, value in sample.items() if not suffix.startswith("__")]
    row["images"] = [value for suffix, value in members if suffix.split(".")[-1] in PICTURE_SUFFIXES]
    row["image"] = None
    for suffix, value in members:
        last = suffix.split(".")[-1]
        if last == "json" or last in CAPTION_SUFFIXES:
            _add_member(row, last, read(value))
        elif last not in PICTURE_SUFFIXES:
            row[suffix] = suffix
    return row


class TarRows:
    """WebDataset tars without compression: where each member lies, three numbers a member."""

    def __init__(self, files: list[str]):
        self._files = files
        self._suffixes: dict[str, int] = {}
        keys, ends, tars = bytearray(), array("q"), array("q")
        members, first = array("q"), array("q", [0])
        for number, path in enumerate(files):
            for sample in group_members(_headers(path)):
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
        self._names = list(self._suffixes)

    def __len__(self) -> int:
        return len(self._tars)

    def __getitem__(self, index: int) -> Any:
        path = self._files[int(self._tars[index])]
        begin = int(self._ends[index - 1]) if index else 0
        sample: dict[str, Any] = {"__key__": self._keys[begin : int(self._ends[index])].decode()}
        for suffix_id, start, size in self._members[self._first[index] : self._first[index + 1]].tolist():
            suffix = self._names[suffix_id]
            sample[suffix] = stored_part(path, start, size, f"{path}/{sample['__key__']}.{suffix}")
        return tar_row(sample, lambda stored: stored.load())


_SKIPPED = re.compile(r"__[^/]*__($|/)")  # webdataset's own notes in a tar


def check_tar_size(file: IO[bytes], path: str) -> None:
    """Raises DataError for a tar that is cut off; `tarfile` takes a header that is cut in two for the end."""
    if file.seek(0, 2) % tarfile.BLOCKSIZE:
        raise DataError(f"{path} is cut off: a tar is made of blocks of {tarfile.BLOCKSIZE} bytes; copy it again")


def _headers(path: str) -> Iterator[tuple[str, tuple[int, int]]]:
    try:
        with open_file(path) as file:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    if member.isreg() and not _SKIPPED.match(member.name):
                        yield member.name, (member.offset_data, member.size)
                    tar.members = []  # type: ignore[attr-defined]  # it would keep them all
            check_tar_size(file, path)
    except tarfile.TarError as error:
        raise DataError(f"{path} is not a tar without compression: {error}") from error


# Which reader


def _json_lines(files: list[str]) -> Rows:
    return JsonRows(files, line_offsets)


def _json_lists(files: list[str]) -> Rows:
    return JsonRows(files, list_offsets)


def _parquet(files: list[str]) -> Rows:
    return _load_arrow("parquet", files)


def _csv(files: list[str]) -> Rows:
    return _load_arrow("csv", files)


READERS: dict[str, Callable[[list[str]], Rows]] = {
    ".json": _json_lists,
    ".jsonl": _json_lines,
    ".parquet": _parquet,
    ".arrow": _arrow_files,
    ".csv": _csv,
    ".tar": TarRows,
}


def suffix_of(path: str, allowed: Sequence[str]) -> str:
    """The suffix that decides the reader. Raises DataError for another one."""
    suffix = PurePosixPath(path).suffix.lower()
    if suffix not in allowed:
        raise DataError(f"{path} has the suffix {suffix!r}; allowed: {', '.join(allowed)}")
    return suffix


def open_rows(path: str) -> Rows:
    """The rows of a file, a pattern of files, or a folder. Raises DataError where they cannot be used at all."""
    try:
        rows = _open_folder(path) if is_folder(path) else _open_files(path)
    except OSError as error:
        if error.errno in NO_LOCKS:  # of `datasets`, which locks its cache
            raise DataError(
                f"{path} needs a cache on a disk with locks, and that of `datasets` has none ({error.strerror}); set "
                "HF_DATASETS_CACHE to a folder of a local disk"
            ) from error
        raise DataError(f"{path} cannot be read ({error.strerror or error}); check the path and its rights") from error
    if not len(rows):
        raise DataError(f"{path} holds no rows; give a file with at least one conversation")
    return rows


def _open_files(path: str) -> Rows:
    reader = READERS[suffix_of(path, list(READERS))]
    return reader(expand(path))
