"""Where each row of a JSON file begins and ends, found in one pass over its bytes; rows are parsed when needed.

An index is two arrays of byte positions, int64 [rows]; nothing else of the file stays in memory. Both scans look at
bytes alone, so what is wrong inside one row costs that row and no other.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

import numpy as np
from numpy.typing import NDArray

from mmllm.readers.files import DataError

CHUNK_BYTES = 4 << 20
Offsets = tuple[NDArray[np.int64], NDArray[np.int64]]

# Lists that a row itself has: an object with one of them is a row, and does not hold the rows.
ROW_LISTS = {"conversations", "messages", "texts"}
_KEY = re.compile(rb'"((?:[^"\\]|\\.)*)"\s*:\s*$')
_KEY_BYTES = 200  # before a bracket, where its key is looked for
_QUOTE, _COMMA = b'",'
_DEPTH_CHANGE = np.zeros(256, np.int8)  # what a byte outside of strings does to the depth
_DEPTH_CHANGE[list(b"[{")] = 1
_DEPTH_CHANGE[list(b"]}")] = -1
_IS_DELIMITER = _DEPTH_CHANGE != 0
_IS_DELIMITER[[_QUOTE, _COMMA]] = True


def _skip_mark(file: IO[bytes]) -> int:
    """Seeks past a byte order mark, if there is one, and returns the position."""
    file.seek(0)
    return file.seek(len(codecs.BOM_UTF8) if file.read(3) == codecs.BOM_UTF8 else 0)


def _concatenate(parts: list[NDArray[np.int64]]) -> NDArray[np.int64]:
    return np.concatenate([np.empty(0, np.int64), *parts])


def line_offsets(file: IO[bytes], name: str) -> Offsets:
    """The lines that are not blank."""
    offset = _skip_mark(file)
    starts: list[NDArray[np.int64]] = []
    ends: list[NDArray[np.int64]] = []
    while chunk := file.read(CHUNK_BYTES):
        chunk += file.readline()  # whole lines
        codes = np.frombuffer(chunk, np.uint8)
        breaks = np.flatnonzero(codes == ord("\n"))
        begin = np.concatenate([[0], breaks + 1])
        end = np.concatenate([breaks, [len(chunk)]])
        begin, end = begin[begin < len(chunk)], end[begin < len(chunk)]
        is_row = np.logical_or.reduceat(codes > ord(" "), begin)
        starts.append(begin[is_row] + offset)
        ends.append(end[is_row] + offset)
        offset += len(chunk)
    return _concatenate(starts), _concatenate(ends)


def _read_unbroken(file: IO[bytes]) -> bytes:
    """The next chunk of bytes, which ends at no place inside an escape."""
    chunk = file.read(CHUNK_BYTES)
    while chunk.endswith(b"\\") and (more := file.read(1)):
        chunk += more
    return chunk


@dataclass(frozen=True)
class _Delimiters:
    """The commas and brackets of a chunk that are outside of strings."""

    chunk: bytes
    offset: int  # of the chunk, in the file
    at: NDArray[np.int64]  # positions in the chunk
    codes: NDArray[np.uint8]  # the bytes there
    depths: NDArray[np.int64]  # nesting depth after each of them


def _iterate_delimiters(file: IO[bytes], offset: int, depth: int) -> Iterator[_Delimiters]:
    """The delimiters from `offset` on, where the nesting has this depth. `offset` must be outside of strings."""
    num_quotes = 0
    while chunk := _read_unbroken(file):
        # JSON has backslashes only in strings. Without escapes, every quote begins or ends a string.
        plain = chunk.replace(rb"\\", b"  ").replace(rb"\"", b"  ")
        codes = np.frombuffer(plain, np.uint8)
        at = np.flatnonzero(_IS_DELIMITER[codes])
        is_quote = codes[at] == _QUOTE
        quotes = np.cumsum(is_quote) + num_quotes
        at = at[~is_quote & (quotes % 2 == 0)]
        depths = np.cumsum(_DEPTH_CHANGE[codes[at]], dtype=np.int64) + depth
        yield _Delimiters(chunk, offset, at, codes[at], depths)
        num_quotes = int(quotes[-1]) % 2 if len(quotes) else num_quotes
        depth = int(depths[-1]) if len(depths) else depth
        offset += len(chunk)


def list_offsets(file: IO[bytes], name: str, *, begin: int | None = None) -> Offsets:
    """The elements of one JSON list, bounded by the commas and the closing bracket at its depth.

    `begin` is the position after its opening bracket, for a list inside an object. Without it, raises DataError where
    the file is not exactly one list.
    """
    offset = _enter_list(file, name) if begin is None else file.seek(begin)
    bounds = [np.asarray([offset - 1])]
    is_closed = False
    for delimiters in _iterate_delimiters(file, offset, 1):
        closing = delimiters.at[delimiters.depths == 0]
        rest = delimiters.chunk[0 if is_closed else int(closing[0]) + 1 :] if is_closed or len(closing) else b""
        if begin is None and (rest := rest.strip()):
            raise DataError(f"{name} is not one JSON list: its end is followed by {rest[:30]!r}")
        is_bound = ((delimiters.codes == _COMMA) & (delimiters.depths == 1)) | (delimiters.depths == 0)
        if begin is not None and len(closing):
            is_bound &= delimiters.at <= closing[0]
        bounds.append(delimiters.at[is_bound] + delimiters.offset)
        is_closed = is_closed or len(closing) > 0
        if is_closed and begin is not None:
            break
    if not is_closed:
        raise DataError(f"{name} is not JSON: the list that it begins with is never closed; is the file cut off?")
    borders = _concatenate(bounds)
    starts, ends = borders[:-1] + 1, borders[1:]
    if len(starts) == 1:
        file.seek(int(starts[0]))
        if not file.read(int(ends[0] - starts[0])).strip():
            return starts[:0], ends[:0]
    return starts, ends


def object_offsets(file: IO[bytes], name: str) -> Offsets:
    """Objects one after another over any number of lines; or the rows of a single object that holds a list of them.

    Raises DataError where the last object is not closed, or where a single object has several lists of objects.
    """
    offset, depth = _skip_mark(file), 0
    starts: list[NDArray[np.int64]] = []
    ends: list[NDArray[np.int64]] = []
    lists: dict[str, int] = {}  # of the first object: {key: position after the bracket}
    num_begun, before = 0, b""
    for delimiters in _iterate_delimiters(file, offset, 0):
        opens = (_DEPTH_CHANGE[delimiters.codes] == 1) & (delimiters.depths == 1)
        starts.append(delimiters.at[opens] + delimiters.offset)
        ends.append(
            delimiters.at[(_DEPTH_CHANGE[delimiters.codes] == -1) & (delimiters.depths == 0)] + delimiters.offset + 1
        )
        num_begun += len(starts[-1])
        if num_begun == 1:
            for place in delimiters.at[(delimiters.codes == ord("[")) & (delimiters.depths == 2)].tolist():
                if key := _KEY.search((before + delimiters.chunk[:place])[-_KEY_BYTES:]):
                    lists[key[1].decode(errors="replace")] = place + 1 + delimiters.offset
        before = delimiters.chunk[-_KEY_BYTES:]
        depth = int(delimiters.depths[-1]) if len(delimiters.depths) else depth
    objects = _concatenate(starts), _concatenate(ends)
    if depth or len(objects[0]) != len(objects[1]):
        raise DataError(f"{name} is not JSON: the last object in it is never closed; is the file cut off?")
    if len(objects[0]) != 1 or ROW_LISTS & lists.keys():
        return objects
    rows = {key: place for key, place in lists.items() if _begins_object(file, place)}
    if len(rows) > 1:
        raise DataError(
            f"{name} is an object with lists under {', '.join(rows)}; it is not clear which of them are the rows: put "
            "those in a file of their own, as one list"
        )
    if not rows or "images" in rows:  # the object is itself a row
        return objects
    return list_offsets(file, name, begin=rows.popitem()[1])


def _begins_object(file: IO[bytes], place: int) -> bool:
    file.seek(place)
    return file.read(CHUNK_BYTES).lstrip().startswith(b"{")


def json_offsets(file: IO[bytes], name: str, *, is_lines: bool) -> Offsets:
    """The rows of a JSON file of any layout: a list, lines, objects over several lines, or an object with the list.

    `is_lines`: a file that begins with neither a list nor an object has one row a line. Raises DataError for a file of
    no such layout.
    """
    _skip_mark(file)
    head = file.read(CHUNK_BYTES).lstrip()
    if head.startswith(b"[") or not (is_lines or head.startswith(b"{")):
        return list_offsets(file, name)
    starts, ends = line_offsets(file, name)
    if head.startswith(b"{") and (len(starts) == 1 or not any(map(_is_object, _lines(file, starts[:2], ends[:2])))):
        return object_offsets(file, name)
    return starts, ends


def _lines(file: IO[bytes], starts: NDArray[np.int64], ends: NDArray[np.int64]) -> Iterator[bytes]:
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        file.seek(start)
        yield file.read(end - start)


def _is_object(line: bytes) -> bool:
    """Whether a line is a whole row. A damaged row differs from the first line of a longer one by its closing brace."""
    return line.strip().startswith(b"{") and line.strip().endswith(b"}")


def _enter_list(file: IO[bytes], name: str) -> int:
    """Seeks past the bracket that opens the list. Raises DataError where the file begins with something else."""
    begin = _skip_mark(file)
    head = file.read(CHUNK_BYTES)
    text = head.lstrip()
    if text.startswith(b"["):
        return file.seek(begin + len(head) - len(text) + 1)
    if not text:
        raise DataError(f"{name} is empty; give a file with at least one conversation")
    got = "a string" if text.startswith(b'"') else f"something that begins with {text[:20]!r}"
    raise DataError(f"{name} must hold a list of rows, or one row a line, got {got}; put the rows in [ ]")
