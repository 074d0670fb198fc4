"""The pictures of a row: paths as people write them, bytes, base64, and where a path is found on this disk.

A picture is never fetched from an address: a row must not decide which servers this machine asks.
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

from mmllm.readers.files import RowError, Stored, is_url, join, local_path, read_range

RowPicture = str | bytes | Stored

_BASE64 = re.compile(r"[A-Za-z0-9+/_\-\s]{64,}={0,2}\s*")
# What pictures begin with: PNG, JPEG, GIF, WebP, BMP, TIFF, JPEG 2000, and at the fifth byte AVIF and HEIC.
_PICTURE_HEADS = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*", b"\0\0\0\x0cjP")
_PICTURE_KEYS = {"path", "bytes"}


def kind(value: Any) -> str:
    """What a value is in JSON's words."""
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a truth value", type(None): "null"}
    return kinds.get(type(value), "bytes" if isinstance(value, bytes | Stored) else "a number")


def check_text(value: Any, where: str) -> str:
    """A string that can be tokenised. Raises RowError."""
    if not isinstance(value, str):
        raise RowError(f"{where} is {kind(value)}; it must be a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RowError(f"{where} holds half a character (\\u{ord(value[error.start]):04x}) at {error.start}") from error
    return value


def row_pictures(fields: Mapping[str, Any]) -> list[RowPicture]:
    """What stands beside the turns, paths as they are given. An empty path, list or object is no picture."""
    given = [(key, _listed(fields[key])) for key in ("image", "images") if key in fields]
    given = [(key, values) for key, values in given if values]
    if len(given) > 1:
        raise RowError("the row has image and images; keep one of them")
    return [picture(value, key) for key, values in given for value in values]


def _listed(value: Any) -> list[Any]:
    """The pictures under one key, without those that say nothing."""
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):  # a table of other tools has JSON as text
        try:
            value = json.loads(value)
        except ValueError:
            return [value]
    if isinstance(value, list) and value and all(isinstance(one, int) and not isinstance(one, bool) for one in value):
        value = _bytes_of_numbers(value)
    values = value if isinstance(value, list) else [value]
    return values if any(not _is_nothing(one) for one in values) else []


def _is_nothing(value: Any) -> bool:
    if isinstance(value, dict):
        return all(one is None or one == "" for one in value.values())
    return value is None or value == ""


def _bytes_of_numbers(values: list[int]) -> bytes:
    try:
        return bytes(values)
    except ValueError as error:
        raise RowError("the picture is a list of numbers that are no bytes; write the bytes of a PNG file") from error


def picture(value: Any, where: str) -> RowPicture:
    """A path as it is given, the bytes, or where they are stored. Raises RowError."""
    if isinstance(value, dict) and value.keys() & _PICTURE_KEYS and value.keys() <= _PICTURE_KEYS:
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
        if isinstance(value, list):
            value = next(iter(_listed(value)), None)
    if isinstance(value, bytes | Stored):
        return value
    if isinstance(value, list):
        raise RowError(f"{where} is a list within a list, such as an array of pixels; write the bytes of a PNG file")
    if not isinstance(value, str):
        raise RowError(f"{where} is {kind(value)}; it must be a string, a path, or an object with path or bytes")
    name = check_text(value, where)
    if not name:
        raise RowError(f"{where} has an empty path beside others; leave it out")
    if name.startswith("data:"):
        return _data_url(name, where)
    if _BASE64.fullmatch(name) and (data := _picture_of_base64(name)):
        return data
    return local_path(name)


def _picture_of_base64(text: str) -> bytes | None:
    """The bytes that a text stands for, where they begin as a picture does; a path is not taken for one."""
    try:
        data = decode_base64(text)
    except binascii.Error:
        return None
    return data if data.startswith(_PICTURE_HEADS) or data[4:8] == b"ftyp" else None


def decode_base64(text: str) -> bytes:
    """The bytes of base64 of either alphabet, over any number of lines. Raises binascii.Error."""
    packed = re.sub(r"\s", "", text).translate(str.maketrans("-_", "+/"))
    return base64.b64decode(packed + "=" * (-len(packed) % 4), validate=True)


def picture_of_base64(value: Any, where: str) -> bytes:
    """The picture of a key that must hold base64, bare or as a data: URL. Raises RowError."""
    text = check_text(value, where)
    if text.startswith("data:"):
        return _data_url(text, where)
    try:
        return decode_base64(text)
    except binascii.Error as error:
        raise RowError(f"{where} is base64 that is damaged ({error})") from error


def _data_url(url: str, where: str) -> bytes:
    head, comma, data = url.partition(",")
    if not comma or not head.endswith(";base64"):
        raise RowError(f"{where} begins with {head[:40]!r}; a data: URL must be data:image/...;base64,...")
    try:
        return decode_base64(data)
    except binascii.Error as error:
        raise RowError(f"{where} is a data: URL whose base64 is damaged ({error})") from error


# Where a path is found


def find_picture(name: RowPicture, folder: str) -> RowPicture:
    """The picture where it is: a path that exists, or how its bytes are read. Raises RowError where there is none."""
    if not isinstance(name, str):
        return name
    if is_url(name) and not (is_url(folder) and name.split("://")[0] == folder.split("://")[0]):
        raise RowError(f"{name[:200]} is an address; images are read from where the data is, so download it first")
    path = name if is_url(name) else join(folder, name)
    if is_url(path):
        return Stored(path, functools.partial(read_range, path))
    if _is_file(path):
        return path
    found = list(dict.fromkeys(other for other in map(str, _other_paths(name, folder)) if _is_file(other)))
    if not found:
        is_windows = re.match(r"[A-Za-z]:[\\/]", name)
        hint = ", and this is a path of a Windows disk: write what follows that folder" if is_windows else ""
        raise RowError(
            f"no image file at {path}; image paths start from {folder}, which `images` of the source sets{hint}"
        )
    if len(found) > 1 and not all(Path(found[0]).samefile(other) for other in found):
        raise RowError(f"no image file at {path}, and it is not clear which is meant: {' or '.join(found)}")
    return found[0]


def _is_file(path: str) -> bool:
    try:
        return Path(path).is_file()
    except OSError as error:
        raise RowError(f"{path} cannot be read ({error.strerror})") from error


def _other_paths(name: str, folder: str) -> Iterator[str]:
    """The same name as other systems write it: with backslashes, as in an address, its accents composed or not."""
    names = dict.fromkeys([name, unquote(name)])
    if "\\" in name:
        names |= dict.fromkeys(one.replace("\\", "/") for one in list(names))
    for one in names:
        yield join(folder, one)
        for form in ("NFC", "NFD"):
            yield join(folder, unicodedata.normalize(form, one))
        try:
            yield join(folder, os.fsdecode(unicodedata.normalize("NFC", one).encode("latin-1")))
        except UnicodeEncodeError:
            continue
