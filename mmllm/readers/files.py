"""Data files: local paths and fsspec URLs, patterns of several files, and pictures inside data files."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from mmllm.errors import MmllmError

SAMPLED_BLOCKS = 1024  # blocks of a source's files that its fingerprint reads
BLOCK_BYTES = 1 << 20


class DataError(MmllmError):
    """A data file that cannot be used at all; the message names it, says what is wrong and what to do."""


class RowError(MmllmError):
    """Why one row cannot be used."""


@dataclass(frozen=True)
class LazyImage:
    """A picture inside a data file or behind a URL, whose bytes are read only when they are needed.

    In tables any column of bytes is one: whether it is a picture shows later.
    """

    name: str
    read: Callable[[], bytes] = field(compare=False)

    def load(self) -> bytes:
        """The picture's bytes. Raises RowError where they cannot be read."""
        try:
            return self.read()
        except OSError as error:
            raise RowError(f"the picture {self.name} cannot be read ({error.strerror or error})") from error


def is_url(path: str) -> bool:
    """Whether fsspec is needed: for `s3://`, `memory://`, `zip://...::` and the like, but not for a plain path."""
    return "://" in path


def local_path(path: str) -> str:
    """The path of a `file://` URL; anything else as it is."""
    return path.removeprefix("file://") if path.startswith("file:///") else path


def filesystem(path: str) -> tuple[Any, str]:
    """(fsspec's file system, path in it) of a URL. Raises DataError, with the name of a package that is missing."""
    from fsspec.core import url_to_fs

    try:
        fs, inner = url_to_fs(path)
    except ImportError as error:
        raise DataError(f"{path} needs a package that is not installed: {error}") from error
    except ValueError as error:
        raise DataError(f"{path} is a URL that fsspec does not know: {error}") from error
    return fs, inner


def open_file(path: str) -> IO[bytes]:
    """A data file for reading. Raises DataError where it does not exist or may not be read."""
    try:
        if is_url(path):
            fs, inner = filesystem(path)
            file: IO[bytes] = fs.open(inner, "rb")
            return file
        return Path(path).open("rb")
    except FileNotFoundError as error:
        raise DataError(f"no data file at {path}; check `path` of this source (now in {Path.cwd()})") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error}); check the path and permissions") from error


def read_range(path: str, start: int = 0, end: int | None = None) -> bytes:
    """The bytes of a file from `start` up to `end`, exclusive. Raises OSError."""
    if is_url(path):
        fs, inner = filesystem(path)
        data: bytes = fs.cat_file(inner, start=start, end=end)
        return data
    with Path(path).open("rb") as file:
        file.seek(start)
        return file.read(-1 if end is None else end - start)


def lazy_image_at(path: str, start: int, size: int, name: str) -> LazyImage:
    """A picture that is stored uncompressed inside a file, such as a tar."""
    return LazyImage(name, functools.partial(read_range, path, start, start + size))


def is_folder(path: str) -> bool:
    if is_url(path):
        fs, inner = filesystem(path)
        return bool(fs.isdir(inner))
    return Path(path).is_dir()


def _is_file(path: str) -> bool:
    if is_url(path):
        fs, inner = filesystem(path)
        return bool(fs.isfile(inner))
    return Path(path).is_file()


def join_path(folder: str, name: str) -> str:
    """A path inside a folder or under a URL; an absolute local path stays as it is."""
    return f"{folder.rstrip('/')}/{name}" if is_url(folder) else str(Path(folder) / name)


def parent_folder(path: str) -> str:
    """The folder of a file, or of all files of a pattern."""
    original = path
    while "{" in path or "*" in path or path == original:
        path = path.rpartition("/")[0] if is_url(path) else str(Path(path).parent)
    return path


def list_folder(folder: str, *, recursive: bool = False) -> list[str]:
    """The files of a folder, sorted, as paths relative to it."""
    if is_url(folder):
        fs, inner = filesystem(folder)
        paths = fs.find(inner, maxdepth=None if recursive else 1)
        names = [str(path).removeprefix(str(inner)).lstrip("/") for path in paths]
    else:
        root = Path(folder)
        names = [
            path.relative_to(root).as_posix() for path in root.glob("**/*" if recursive else "*") if path.is_file()
        ]
    return sorted(names)


def matching_files(path: str) -> list[str]:
    """The files that a path stands for: itself, those of a brace pattern `{000..123}`, or those of a `*`, sorted.

    Raises DataError where there is no file, or one of a brace pattern is missing.
    """
    try:
        if _is_file(path):
            return [path]
        paths = _expand_braces(path) if "{" in path else [path]
        files = [file for each in paths for file in (_expand_stars(each) if "*" in each else [each])]
        missing = [file for file in files if not _is_file(file)]
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error}); check the path and permissions") from error
    if missing or not files:
        first = missing[0] if missing else path
        of_pattern = f", of {path}" if first != path else ""
        raise DataError(f"no data file at {first}{of_pattern}; check `path` of this source (now in {Path.cwd()})")
    return files


def _expand_braces(path: str) -> list[str]:
    try:
        from webdataset.shardlists import expand_urls
    except ImportError as error:
        raise DataError(f"{path} is a pattern of several files: pip install 'mmllm[tars]'") from error
    return [str(file) for file in expand_urls(path)]


def _expand_stars(path: str) -> list[str]:
    if not is_url(path):
        root = Path(path)
        depth = next(number for number, part in enumerate(root.parts) if "*" in part)
        start = Path(*root.parts[:depth])
        return sorted(str(file) for file in start.glob(str(Path(*root.parts[depth:]))))
    fs, inner = filesystem(path)
    return sorted(str(fs.unstrip_protocol(file)) for file in fs.glob(inner))


def fingerprint(files: Sequence[str], names: Sequence[str] = ()) -> str:
    """A hash of the contents of files, and of names. Of more than a gigabyte, evenly spaced blocks are hashed."""
    digest = hashlib.blake2b("\0".join(names).encode(errors="replace"), digest_size=16)
    num_blocks = max(1, SAMPLED_BLOCKS // max(1, len(files)))
    for path in files:
        with open_file(path) as file:
            size = file.seek(0, 2)
            digest.update(size.to_bytes(8, "big"))
            for start in range(0, size, max(BLOCK_BYTES, size // num_blocks)):
                file.seek(start)
                digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()
