"""Sources: rows of a data file as examples, made when they are asked for, and those that cannot be used, with why.

`read_source` looks at every row and is enough for most. A run looks at them once, in parallel: see `check.py`.
Rows count from 0; in JSON lines, blank lines are not rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import NDArray

from mmllm.batch import Example
from mmllm.config import SourceConfig
from mmllm.data.formats import row_id, to_example
from mmllm.data.turns import Context
from mmllm.readers.files import DataError, RowError, Stored, is_folder, local_path, parent
from mmllm.readers.rows import FolderRows, open_rows

__all__ = ["BadRow", "DataError", "DataFile", "Examples", "RowError", "Source", "read_source"]


@dataclass(frozen=True)
class BadRow:
    """One row that cannot be used: its file, its place (from 0), the id that it has, and why.

    `because` says what has to change: the row, one of its pictures, or the settings (such as its length in tokens).
    """

    source: str
    row: int
    id: str
    reason: str
    because: Literal["row", "picture", "settings"] = "row"


def hash_of(text: str | bytes) -> int:
    """64 bits that tell texts apart, the same in every process."""
    data = text if isinstance(text, bytes) else text.encode(errors="replace")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big", signed=True)


def later_repeats(hashes: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
    """The places of values that stand earlier too, in order."""
    values = np.asarray(hashes, np.int64)
    first = np.unique(values, return_index=True)[1]
    is_repeat = np.ones(len(values), bool)
    is_repeat[first] = False
    return np.flatnonzero(is_repeat)


def context_of(source: SourceConfig) -> Context:
    """Where a source's image paths start from. Raises DataError where that is no folder."""
    path = local_path(source.path)
    own = path if is_folder(path) else parent(path)
    folder = local_path(source.images) if source.images is not None else own
    if source.images is not None and not is_folder(folder):
        raise DataError(f"no image folder at {folder}, which {path} is to be used with; check `images` of this source")
    return Context(folder, source.prompt)


def load_pictures(example: Example) -> Example:
    """The example with the bytes of pictures that stand inside data files. Raises RowError."""
    if not any(isinstance(image, Stored) for image in example.images):
        return example
    images = tuple(image.load() if isinstance(image, Stored) else image for image in example.images)
    return replace(example, images=images)


class DataFile:
    """An open source: any row by number. Raises DataError where the file, or its image folder, cannot be used."""

    def __init__(self, source: SourceConfig):
        self.path = source.path
        self.max_examples = source.max_examples
        self.rows = open_rows(local_path(source.path))
        self.context = context_of(source)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def passed_over(self) -> Mapping[str, int]:
        """Of a folder of pictures, how many files are no rows, by reason."""
        return self.rows.passed_over if isinstance(self.rows, FolderRows) else {}

    def raw(self, row: int) -> Any:
        """What the file says. Raises RowError where it cannot be parsed, DataError where it is not there any more."""
        try:
            return self.rows[row]
        except OSError as error:
            raise DataError(f"{self.path} row {row} cannot be read any more: {error}") from error

    def peek(self, fields: Any, row: int) -> Example:
        """The example of a raw row, with `Stored` in place of pictures inside the file. Raises RowError."""
        return to_example(fields, row, self.path, self.context)

    def example(self, row: int) -> Example:
        """The example of a row, its pictures' bytes read. Raises RowError."""
        return load_pictures(self.peek(self.raw(row), row))


class Examples(Sequence[Example]):
    """Usable rows of several data files, one behind the other. Each is read when it is asked for.

    An id that an earlier row of the same file has gets `#<row>` behind it.
    """

    def __init__(self, parts: Sequence[tuple[DataFile, NDArray[np.int64], NDArray[np.int64]]] = ()):
        self._files = [file for file, _, _ in parts]
        self._rows = [rows for _, rows, _ in parts]
        self._repeats = [repeats for _, _, repeats in parts]
        self.sizes = [len(rows) for rows in self._rows]
        self._behind = np.cumsum(self.sizes)

    def __len__(self) -> int:
        return sum(self.sizes)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        part, row = self.place(range(len(self))[index])  # as lists do: from the end, and IndexError behind it
        example = self._files[part].example(row)
        return replace(example, id=self._unique(example.id, part, row))

    def _unique(self, own: str, part: int, row: int) -> str:
        repeats = self._repeats[part]
        at = int(np.searchsorted(repeats, row))
        return f"{own}#{row}" if at < len(repeats) and repeats[at] == row else own

    def ids(self) -> Iterator[str]:
        """The id of each example, without a look at its pictures."""
        for part, rows in enumerate(self._rows):
            for row in rows.tolist():
                yield self._unique(row_id(self._files[part].raw(row), row), part, row)

    def __iter__(self) -> Iterator[Example]:
        return (self[number] for number in range(len(self)))

    def place(self, index: int) -> tuple[int, int]:
        """Which of the files an example is in, and its row there."""
        part = int(np.searchsorted(self._behind, index, "right"))
        return part, int(self._rows[part][index - (int(self._behind[part - 1]) if part else 0)])


@dataclass(frozen=True)
class Source:
    """What one data file holds."""

    path: str
    examples: Examples
    bad: list[BadRow]


def read_source(source: SourceConfig) -> Source:
    """All rows of a data file, or those up to the `max_examples`-th usable one.

    A row that cannot be used goes to `bad`. Raises DataError where the file itself cannot be used: it or its image
    folder is missing, it has no known suffix, it holds no rows.
    """
    file = DataFile(source)
    usable: list[int] = []
    ids: list[int] = []
    bad: list[BadRow] = []
    for row in range(len(file)):
        fields = None
        try:
            fields = file.raw(row)
            file.peek(fields, row)
            usable.append(row)
        except RowError as error:
            bad.append(BadRow(file.path, row, row_id(fields, row), str(error)))
        ids.append(hash_of(row_id(fields, row)))
        if len(usable) == source.max_examples:
            break
    return Source(file.path, Examples([(file, np.asarray(usable, np.int64), later_repeats(ids))]), bad)
