"""Where each row of a JSON file begins and ends, found in one pass over its bytes; rows are parsed when needed.

An index is two arrays of byte positions, int64 [rows]; nothing else of the file stays in memory. Both scans look at
bytes alone, so what is wrong inside one row costs that row and no other.
"""

from __future__ import annotations

import codecs
from typing import IO

import numpy as np
from numpy.typing import NDArray

from mmllm.data.files import DataError

CHUNK_BYTES = 4 << 20
Offsets = tuple[NDArray[np.int64], NDArray[np.int64]]

_QUOTE, _COMMA = b'",'
_STEP = np.zeros(256, np.int8)  # what a byte outside of strings does to the depth
_STEP[list(b"[{")] = 1
_STEP[list(b"]}")] = -1
_IS_MARK = _STEP != 0
_IS_MARK[[_QUOTE, _COMMA]] = True


def _skip_mark(file: IO[bytes]) -> int:
    """Goes behind a byte order mark, where there is one."""
    file.seek(0)
    return file.seek(len(codecs.BOM_UTF8) if file.read(3) == codecs.BOM_UTF8 else 0)


def _joined(parts: list[NDArray[np.int64]]) -> NDArray[np.int64]:
    return np.concatenate([np.empty(0, np.int64), *parts])


def line_offsets(file: IO[bytes], name: str) -> Offsets:
    """The lines of JSON lines that are not blank."""
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
    found = _joined(starts), _joined(ends)
    if len(found[0]):
        file.seek(int(found[0][0]))
        first = file.read(int(found[1][0] - found[0][0])).strip()
        if first == b"[":
            raise DataError(f"{name} is not JSON lines: a list over several lines is plain JSON: name the file .json")
    return found


def _read_unbroken(file: IO[bytes]) -> bytes:
    """The next bytes, cut where no escape is cut in two."""
    chunk = file.read(CHUNK_BYTES)
    while chunk.endswith(b"\\") and (more := file.read(1)):
        chunk += more
    return chunk


def list_offsets(file: IO[bytes], name: str) -> Offsets:
    """The elements of one JSON list, from the commas and the bracket that stand outside of strings at its depth.

    Raises DataError where the file does not hold exactly one list.
    """
    offset = _enter_list(file, name)
    bounds = [np.asarray([offset - 1])]
    depth, num_quotes, is_closed = 1, 0, False
    while chunk := _read_unbroken(file):
        # JSON has backslashes in strings alone; without escapes every quote that is left begins or ends a string
        plain = chunk.replace(rb"\\", b"  ").replace(rb"\"", b"  ")
        codes = np.frombuffer(plain, np.uint8)
        at = np.flatnonzero(_IS_MARK[codes])
        is_quote = codes[at] == _QUOTE
        quotes = np.cumsum(is_quote) + num_quotes
        at = at[~is_quote & (quotes % 2 == 0)]
        depths = np.cumsum(_STEP[codes[at]], dtype=np.int64) + depth
        closing = at[depths == 0]
        if is_closed or len(closing):
            if rest := chunk[0 if is_closed else int(closing[0]) + 1 :].strip():
                raise DataError(f"{name} is not one JSON list: behind its end stands {rest[:30]!r}")
            is_closed = True
        bounds.append(at[((codes[at] == _COMMA) & (depths == 1)) | (depths == 0)] + offset)
        num_quotes = int(quotes[-1]) % 2 if len(quotes) else num_quotes
        depth = int(depths[-1]) if len(depths) else depth
        offset += len(chunk)
    if not is_closed:
        raise DataError(f"{name} is not JSON: the list that it begins with is never closed; is the file cut off?")
    found = _joined(bounds)
    starts, ends = found[:-1] + 1, found[1:]
    if len(starts) == 1:
        file.seek(int(starts[0]))
        if not file.read(int(ends[0] - starts[0])).strip():
            return starts[:0], ends[:0]
    return starts, ends


def _enter_list(file: IO[bytes], name: str) -> int:
    """Goes behind the bracket that opens the list. Raises DataError where the file begins with something else."""
    begin = _skip_mark(file)
    head = file.read(CHUNK_BYTES)
    text = head.lstrip()
    if text.startswith(b"["):
        return file.seek(begin + len(head) - len(text) + 1)
    if not text:
        raise DataError(f"{name} is empty; give a file with at least one conversation")
    kinds = {b"{": "an object", b'"': "a string"}
    hint = "put the rows in [ ]"
    if text.startswith(b"{") and b"\n{" in text:
        hint += ", or name the file .jsonl where each row is one line"
    raise DataError(f"{name} must hold a list of rows, got {kinds.get(text[:1], 'something else')}; {hint}")
