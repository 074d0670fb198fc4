"""Reads compressed data files and UTF-16 text: from front to back, or through a decoded copy in the cache.

The first bytes of a file decide what it is, never its name. A copy is named after a hash of the file's contents, so a
file that changes gets a new copy.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import IO, Any

from mmllm.readers.files import DataError, fingerprint, open_file

_COMPRESSION_ENDINGS = (".gz", ".bz2", ".xz", ".zst", ".zstd")
# By a byte order mark, or in a file without one by where the zero bytes of its first character are.
_ENCODING_BY_HEAD = {
    codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16", b"{\0": "utf-16-le", b"[\0": "utf-16-le", b"\0{": "utf-16-be", b"\0[": "utf-16-be",
}  # fmt: skip
# What decompressors raise for damaged files.
DECOMPRESSION_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError)


def inner_suffix(path: str) -> str:
    """The suffix without that of a compression: `.jsonl` of `x.jsonl.gz`, `.tar` of `x.tgz`."""
    name = path.lower()
    if name.endswith(".tgz"):
        return ".tar"
    for ending in _COMPRESSION_ENDINGS:
        name = name.removesuffix(ending)
    return PurePosixPath(name).suffix


def _open_zstd(file: IO[bytes]) -> Any:
    import pyarrow as pa

    return io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(file), "zstd"))


# By the first bytes of a compressed file. "BZh1" alone could begin a text, so bzip2's block header belongs to it.
_OPENERS: dict[bytes, Callable[[IO[bytes]], Any]] = {
    b"\x1f\x8b": gzip.open,
    **{b"BZh%d1AY&SY" % level: bz2.open for level in range(1, 10)},
    b"\xfd7zXZ\0": lzma.open,
    b"\x28\xb5\x2f\xfd": _open_zstd,
}
_MAGIC_BYTES = max(map(len, _OPENERS))


def _opener_of(file: IO[bytes]) -> Callable[[IO[bytes]], Any] | None:
    head = file.read(_MAGIC_BYTES)
    file.seek(0)
    return next((opener for magic, opener in _OPENERS.items() if head.startswith(magic)), None)


def open_decompressed(path: str) -> IO[bytes]:
    """A data file, decompressed while it is read from front to back. Raises DataError as `open_file` does."""
    file = open_file(path)
    opener = _opener_of(file)
    opened: IO[bytes] = opener(file) if opener else file
    return opened


def is_compressed(path: str) -> bool:
    with open_file(path) as file:
        return _opener_of(file) is not None


def _encoding_of(head: bytes) -> str | None:
    """The encoding of a text that begins with these bytes, if it is UTF-16 or UTF-32."""
    return next((name for mark, name in _ENCODING_BY_HEAD.items() if head.startswith(mark)), None)


def decoded_copy(path: str, *, is_text: bool = True) -> str:
    """The path of the same data, decompressed and with text in UTF-8: the file itself, or a copy in the cache.

    Raises DataError where the file cannot be read to its end.
    """
    try:
        with open_decompressed(path) as file:
            encoding = _encoding_of(file.read(4)) if is_text else None
        if encoding is None and not is_compressed(path):
            return path
        copy = _cache_folder() / f"{fingerprint([path])}{inner_suffix(path)}"
        if not copy.is_file():
            _write_copy(path, copy, encoding)
    except UnicodeError as error:
        raise DataError(f"{path} is not {encoding} text to its end ({error}); save it as UTF-8") from error
    except DECOMPRESSION_ERRORS as error:
        if isinstance(error, OSError) and error.errno:
            raise DataError(
                f"{path} is read through a copy in {_cache_folder()}, which failed ({error.strerror}); make room "
                "there, or name another folder in HF_DATASETS_CACHE"
            ) from error
        raise DataError(f"{path} is compressed, and damaged or cut off ({error}); copy or download it again") from error
    return str(copy)


def _cache_folder() -> Path:
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE) / "mmllm"


def _write_copy(path: str, copy: Path, encoding: str | None) -> None:
    copy.parent.mkdir(parents=True, exist_ok=True)
    partial = copy.with_name(f"{copy.name}.{os.getpid()}.part")
    try:
        with open_decompressed(path) as file, partial.open("wb") as out:
            if encoding is None:
                shutil.copyfileobj(file, out)
            else:
                text = io.TextIOWrapper(file, encoding, newline="")
                shutil.copyfileobj(text, io.TextIOWrapper(out, "utf-8", newline="", write_through=True))
        partial.replace(copy)
    finally:
        partial.unlink(missing_ok=True)
