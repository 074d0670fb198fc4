"""Data files wherever they are: local paths and fsspec URLs, patterns of several files, pictures inside them."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from mmllm.errors import MmllmError

SAMPLED_BLOCKS = 1024  # of large files, read to tell their contents from others
BLOCK_BYTES = 1 << 20


class DataError(MmllmError):
    """A data file that cannot be used at all; the message names it, says what is wrong and what to do."""


class RowError(MmllmError):
    """Why one row cannot be used."""


@dataclass(frozen=True)
class LazyImage:
    """A picture inside a data file, or behind a URL: `read` gives its bytes, when they are needed."""

    name: str
    read: Callable[[], bytes] = field(compare=False)

    def load(self) -> bytes:
        """The picture's bytes. Raises RowError where they cannot be had."""
        try:
            return self.read()
        except OSError as error:
            raise RowError(f"the picture {self.name} cannot be read ({error.strerror or error})") from error


def is_url(path: str) -> bool:
    """Whether fsspec is needed: `s3://`, `memory://`, `zip://...::` and the like. A plain path needs it not."""
    return "://" in path


def local_path(path: str) -> str:
    """The path of a `file://` URL; anything else as it is."""
    return path.removeprefix("file://") if path.startswith("file:///") else path


def filesystem(path: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the path there. Raises DataError with the name of a missing package."""
    from fsspec.core import url_to_fs

    try:
        fs, inner = url_to_fs(path)
    except ImportError as error:
        raise DataError(f"{path} needs a package that is not installed: {error}") from error
    except ValueError as error:
        raise DataError(f"{path} has an address that fsspec does not know: {error}") from error
    return fs, inner


def open_file(path: str) -> IO[bytes]:
    """A data file for reading. Raises DataError where it is not there or may not be read."""
    try:
        if is_url(path):
            fs, inner = filesystem(path)
            file: IO[bytes] = fs.open(inner, "rb")
            return file
        return Path(path).open("rb")
    except FileNotFoundError as error:
        raise DataError(f"no data file at {path}; check `path` of this source (now in {Path.cwd()})") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error}); check the path and its rights") from error


def read_range(path: str, start: int = 0, end: int | None = None) -> bytes:
    """The bytes of a file from `start` to before `end`. Raises OSError."""
    if is_url(path):
        fs, inner = filesystem(path)
        data: bytes = fs.cat_file(inner, start=start, end=end)
        return data
    with Path(path).open("rb") as file:
        file.seek(start)
        return file.read(-1 if end is None else end - start)


def lazy_image_at(path: str, start: int, size: int, name: str) -> LazyImage:
    """A picture that stands in a file without compression, such as in a tar."""
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
    """The folder that a file, or all files of a pattern, are in."""
    whole = path
    while "{" in path or "*" in path or path == whole:
        path = path.rpartition("/")[0] if is_url(path) else str(Path(path).parent)
    return path


def list_folder(folder: str, *, recursive: bool = False) -> list[str]:
    """The files of a folder, sorted, as paths from there."""
    if is_url(folder):
        fs, inner = filesystem(folder)
        found = fs.find(inner, maxdepth=None if recursive else 1)
        names = [str(path).removeprefix(str(inner)).lstrip("/") for path in found]
    else:
        root = Path(folder)
        names = [
            path.relative_to(root).as_posix() for path in root.glob("**/*" if recursive else "*") if path.is_file()
        ]
    return sorted(names)


def matching_files(path: str) -> list[str]:
    """The files that a path names: itself, those of a brace pattern `{000..123}`, or those of a `*`, sorted.

    Raises DataError where there is none.
    """
    try:
        if _is_file(path):
            return [path]
        paths = _expand_braces(path) if "{" in path else [path]
        files = [file for one in paths for file in (_expand_stars(one) if "*" in one else [one])]
        missing = [file for file in files if not _is_file(file)]
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error}); check the path and its rights") from error
    if missing or not files:
        one = missing[0] if missing else path
        of = f", of {path}" if one != path else ""
        raise DataError(f"no data file at {one}{of}; check `path` of this source (now in {Path.cwd()})")
    return files


def _expand_braces(path: str) -> list[str]:
    try:
        from webdataset.shardlists import expand_urls
    except ImportError as error:
        raise DataError(f"{path} is a pattern of several files: pip install 'mmllm[tars]'") from error
    return [str(one) for one in expand_urls(path)]


def _expand_stars(path: str) -> list[str]:
    if not is_url(path):
        root = Path(path)
        depth = next(number for number, part in enumerate(root.parts) if "*" in part)
        start = Path(*root.parts[:depth])
        return sorted(str(found) for found in start.glob(str(Path(*root.parts[depth:]))))
    fs, inner = filesystem(path)
    return sorted(str(fs.unstrip_protocol(found)) for found in fs.glob(inner))


def fingerprint(files: Sequence[str], names: Sequence[str] = ()) -> str:
    """A hash of what the files hold, and of names. Of more than a gigabyte, blocks are taken that lie evenly."""
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
