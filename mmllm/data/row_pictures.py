"""The pictures of a row: paths as people write them, bytes or base64; and how a path is located on this disk.

A picture is never fetched from a web address: a row must not decide which servers this machine contacts.
"""

from __future__ import annotations

import base64
import binascii
import functools
import json
import os
import re
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from mmllm.data.row_values import check_text, json_type
from mmllm.readers.files import LazyImage, RowError, is_url, join_path, local_path, read_range

RowPicture = str | bytes | LazyImage

_BASE64 = re.compile(r"[A-Za-z0-9+/_\-\s]{64,}={0,2}\s*")
# The first bytes of pictures: PNG, JPEG, GIF, WebP, BMP, TIFF, JPEG 2000, and at the fifth byte AVIF and HEIC.
_PICTURE_HEADS = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*", b"\0\0\0\x0cjP")
_PICTURE_KEYS = {"path", "bytes"}


def row_pictures(fields: Mapping[str, Any]) -> list[RowPicture]:
    """The pictures beside the turns, paths as they are written. An empty path, list or object counts as none."""
    by_key = {key: _pictures_under_key(fields[key]) for key in ("image", "images") if key in fields}
    by_key = {key: values for key, values in by_key.items() if values}
    if len(by_key) > 1:
        raise RowError("the row has image and images; keep one of them")
    return [parse_picture(value, key) for key, values in by_key.items() for value in values]


def _pictures_under_key(value: Any) -> list[Any]:
    """The values under one key as a list; an empty one where all of them are empty."""
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):  # some tools write JSON as text into tables
        try:
            value = json.loads(value)
        except ValueError:
            return [value]
    if isinstance(value, list) and value and all(type(number) is int for number in value):
        value = _bytes_of_numbers(value)
    values = value if isinstance(value, list) else [value]
    return values if any(not _is_empty(value) for value in values) else []


def _is_empty(value: Any) -> bool:
    if isinstance(value, dict):
        return all(field is None or field == "" for field in value.values())
    return value is None or value == ""


def _bytes_of_numbers(values: list[int]) -> bytes:
    try:
        return bytes(values)
    except ValueError as error:
        raise RowError("the picture is a list of numbers beyond bytes; write the bytes of a PNG file") from error


def parse_picture(value: Any, where: str) -> RowPicture:
    """A picture of a row: a path as it is written, bytes, or a LazyImage. Raises RowError."""
    if isinstance(value, dict) and value.keys() & _PICTURE_KEYS and value.keys() <= _PICTURE_KEYS:
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
        if isinstance(value, list):
            value = next(iter(_pictures_under_key(value)), None)
    if isinstance(value, bytes | LazyImage):
        return value
    if isinstance(value, list):
        raise RowError(f"{where} is a list within a list, such as an array of pixels; write the bytes of a PNG file")
    if not isinstance(value, str):
        raise RowError(f"{where} is {json_type(value)}; it must be a string, a path, or an object with path or bytes")
    name = check_text(value, where)
    if not name:
        raise RowError(f"{where} has an empty path beside others; leave it out")
    if name.startswith("data:"):
        return _parse_data_url(name, where)
    if _BASE64.fullmatch(name) and (data := _guess_base64(name)):
        return data
    return local_path(name)


def _guess_base64(text: str) -> bytes | None:
    """The decoded bytes where they begin as a picture does, else None: a long path may look like base64."""
    try:
        data = decode_base64(text)
    except binascii.Error:
        return None
    return data if data.startswith(_PICTURE_HEADS) or data[4:8] == b"ftyp" else None


def decode_base64(text: str) -> bytes:
    """The bytes of base64 in the standard or URL alphabet, over any number of lines. Raises binascii.Error."""
    packed = re.sub(r"\s", "", text).translate(str.maketrans("-_", "+/"))
    return base64.b64decode(packed + "=" * (-len(packed) % 4), validate=True)


def parse_base64_picture(value: Any, where: str) -> bytes:
    """The picture of a key that must hold base64, bare or as a data: URL. Raises RowError."""
    text = check_text(value, where)
    if text.startswith("data:"):
        return _parse_data_url(text, where)
    try:
        return decode_base64(text)
    except binascii.Error as error:
        raise RowError(f"{where} is base64 that is damaged ({error})") from error


def _parse_data_url(url: str, where: str) -> bytes:
    head, comma, data = url.partition(",")
    if not comma or not head.endswith(";base64"):
        raise RowError(f"{where} begins with {head[:40]!r}; a data: URL must be data:image/...;base64,...")
    try:
        return decode_base64(data)
    except binascii.Error as error:
        raise RowError(f"{where} is a data: URL whose base64 is damaged ({error})") from error


# Where a path leads


def locate_picture(name: RowPicture, folder: str) -> RowPicture:
    """The picture with its path resolved: an existing file, or a LazyImage behind a URL. Raises RowError otherwise."""
    if not isinstance(name, str):
        return name
    if is_url(name) and not (is_url(folder) and name.split("://")[0] == folder.split("://")[0]):
        raise RowError(f"{name[:200]} is an address; images are read from where the data is, so download it first")
    path = name if is_url(name) else join_path(folder, name)
    if is_url(path):
        return LazyImage(path, functools.partial(read_range, path))
    if _is_file(path):
        return path
    files = list(dict.fromkeys(other for other in map(str, _other_paths(name, folder)) if _is_file(other)))
    if not files:
        is_windows = re.match(r"[A-Za-z]:[\\/]", name)
        hint = ", and this is a path of a Windows disk: write what follows that folder" if is_windows else ""
        raise RowError(
            f"no image file at {path}; image paths start from {folder}, which `images` of the source sets{hint}"
        )
    if len(files) > 1 and not all(Path(files[0]).samefile(other) for other in files):
        raise RowError(f"no image file at {path}, and it is not clear which is meant: {' or '.join(files)}")
    return files[0]


def _is_file(path: str) -> bool:
    try:
        return Path(path).is_file()
    except OSError as error:
        raise RowError(f"{path} cannot be read ({error.strerror})") from error


def _other_paths(name: str, folder: str) -> Iterator[str]:
    """Paths that other systems may have meant by a name.

    Backslashes become slashes, `%20` and the like are unquoted, accents are composed or decomposed, and the name on the
    disk may be in Latin-1.
    """
    names = dict.fromkeys([name, unquote(name)])
    if "\\" in name:
        names |= dict.fromkeys(spelling.replace("\\", "/") for spelling in list(names))
    for spelling in names:
        yield join_path(folder, spelling)
        for form in ("NFC", "NFD"):
            yield join_path(folder, unicodedata.normalize(form, spelling))
        try:
            yield join_path(folder, os.fsdecode(unicodedata.normalize("NFC", spelling).encode("latin-1")))
        except UnicodeEncodeError:
            continue
