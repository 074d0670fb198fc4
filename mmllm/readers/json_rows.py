"""Rows of JSON: a list, lines, objects over several lines, or an object that holds the list, compressed or not."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from mmllm.readers.compression import decoded_copy
from mmllm.readers.files import RowError, open_file, read_range
from mmllm.readers.index import json_offsets

_BLOCK_BYTES = 1 << 20


def parse_row(data: bytes, line: Callable[[], int] = lambda: 1) -> Any:
    """One row of JSON. NaN and Infinity, which some programs write, become null.

    `line` returns the number of the line that the row begins in, for errors. Raises RowError.
    """
    try:
        text = data.decode("utf-8-sig")
        if not text.strip():
            raise RowError(f"a value is missing before a comma or a bracket in line {line()}; remove the comma")
        return json.loads(text, parse_constant=lambda _: None)
    except json.JSONDecodeError as error:
        place = f"line {line() + error.lineno - 1}, column {error.colno}"
        raise RowError(f"the row is not JSON at {place}: {error.msg}{_hint(text, error.pos)}") from error
    except UnicodeDecodeError as error:
        raise RowError(
            f"the row is not UTF-8 text at byte {error.start} (line {line()}); save the file as UTF-8, such as with "
            "`iconv -f cp1252 -t utf-8` where it comes from Windows"
        ) from error
    except RowError:
        raise
    except (RecursionError, ValueError) as error:  # nested too deeply, or a number with too many digits
        raise RowError(f"the row cannot be read as JSON: {error}") from error


def _hint(text: str, at: int) -> str:
    if re.search(r",\s*$", text[:at]) or text[at : at + 1] == ",":
        return " (JSON has no comma before a closing bracket)"
    return " (JSON has double quotes alone)" if text[at : at + 1] == "'" else ""


class JsonRows:
    """JSON of any layout, as two byte positions a row. `is_lines`: as in `json_offsets`."""

    def __init__(self, files: list[str], *, is_lines: bool):
        self._files = [decoded_copy(path) for path in files]
        offsets = []
        for name, path in zip(files, self._files, strict=True):
            with open_file(path) as file:
                offsets.append(json_offsets(file, name, is_lines=is_lines))
        self._starts = np.concatenate([starts for starts, _ in offsets])
        self._ends = np.concatenate([ends for _, ends in offsets])
        self._file_ends = np.cumsum([len(starts) for starts, _ in offsets])  # the row after the last one of each file
        self._last_line = ("", 0, 1)  # (file, place, line): up to where lines were last counted

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Any:
        path = self._files[int(np.searchsorted(self._file_ends, index, "right"))]
        start = int(self._starts[index])
        return parse_row(read_range(path, start, int(self._ends[index])), lambda: self._line(path, start))

    def _line(self, path: str, place: int) -> int:
        """The line number of a byte position. Counting goes on from the last call, since rows mostly come in order."""
        last_path, position, line = self._last_line
        if last_path != path or position > place:
            position, line = 0, 1
        while position < place:
            block = read_range(path, position, min(place, position + _BLOCK_BYTES))
            line += block.count(b"\n")
            position += len(block)
        self._last_line = (path, place, line)
        return line
