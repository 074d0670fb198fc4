"""Sources: the rows of a data file as examples, each made when it is needed, and the rows that cannot be used.

`read_source` reads every row, which is enough for most purposes. A run inspects its rows once, in parallel: `check.py`.
Rows are numbered from 0; blank lines of JSON lines are not rows.
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
from mmllm.data.turns import SourceContext
from mmllm.readers.files import DataError, LazyImage, RowError, is_folder, local_path, parent_folder
from mmllm.readers.rows import FolderRows, open_rows

__all__ = ["BadRow", "DataError", "DataFile", "Examples", "LoadedSource", "RowError", "read_source"]


@dataclass(frozen=True)
class BadRow:
    """One row that cannot be used: its file, its number (from 0), its id, and the reason.

    `because` is what has to change: the row, one of its pictures, or the settings (such as the length limit).
    """

    source: str
    row: int
    id: str
    reason: str
    because: Literal["row", "picture", "settings"] = "row"


def hash64(text: str | bytes) -> int:
    """A 64-bit hash of a text, the same in every process."""
    data = text if isinstance(text, bytes) else text.encode(errors="replace")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big", signed=True)


def later_duplicates(hashes: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
    """The indices of values that an earlier index has too, in order."""
    values = np.asarray(hashes, np.int64)
    first_indices = np.unique(values, return_index=True)[1]
    is_duplicate = np.ones(len(values), bool)
    is_duplicate[first_indices] = False
    return np.flatnonzero(is_duplicate)


def source_context(source: SourceConfig) -> SourceContext:
    """A source's image folder and caption prompt. Raises DataError where the folder does not exist."""
    path = local_path(source.path)
    data_folder = path if is_folder(path) else parent_folder(path)
    image_folder = local_path(source.images) if source.images is not None else data_folder
    if source.images is not None and not is_folder(image_folder):
        raise DataError(f"no image folder at {image_folder}, which {path} needs; check `images` of this source")
    return SourceContext(image_folder, source.prompt)


def load_pictures(example: Example) -> Example:
    """The example with its lazy images read into bytes. Raises RowError."""
    if not any(isinstance(image, LazyImage) for image in example.images):
        return example
    images = tuple(image.load() if isinstance(image, LazyImage) else image for image in example.images)
    return replace(example, images=images)


class DataFile:
    """An open source, whose rows are read by number. Raises DataError where its file or image folder cannot be used."""

    def __init__(self, source: SourceConfig):
        self.path = source.path
        self.max_examples = source.max_examples
        self.rows = open_rows(local_path(source.path))
        self.context = source_context(source)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def passed_over(self) -> Mapping[str, int]:
        """{reason: number of files} of the files in a folder of pictures that are not rows."""
        return self.rows.passed_over if isinstance(self.rows, FolderRows) else {}

    def raw_row(self, row: int) -> Any:
        """The row as its file has it. Raises RowError where it cannot be parsed, DataError where the file is gone."""
        try:
            return self.rows[row]
        except OSError as error:
            raise DataError(f"{self.path} row {row} can no longer be read: {error}") from error

    def lazy_example(self, fields: Any, row: int) -> Example:
        """The example of a raw row, with a LazyImage for each picture inside the file. Raises RowError."""
        return to_example(fields, row, self.path, self.context)

    def example(self, row: int) -> Example:
        """The example of a row, with lazy images read into bytes. Raises RowError."""
        return load_pictures(self.lazy_example(self.raw_row(row), row))


# A file, the numbers of its usable rows, and the numbers of its rows whose id an earlier row has.
UsableRows = tuple[DataFile, NDArray[np.int64], NDArray[np.int64]]


class Examples(Sequence[Example]):
    """The usable rows of several data files, one file after another. Each is read when it is indexed.

    `#<row>` is appended to an id that an earlier row of the same file has.
    """

    def __init__(self, usable: Sequence[UsableRows] = ()):
        self._files = [file for file, _, _ in usable]
        self._rows = [rows for _, rows, _ in usable]
        self._duplicate_ids = [duplicates for _, _, duplicates in usable]
        self.sizes = [len(rows) for rows in self._rows]
        self._ends = np.cumsum(self.sizes)  # of each file, among all examples

    def __len__(self) -> int:
        return sum(self.sizes)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        file, row = self.locate(range(len(self))[index])  # a range takes negative indices and raises IndexError
        example = self._files[file].example(row)
        return replace(example, id=self._unique_id(example.id, file, row))

    def _unique_id(self, id_in_file: str, file: int, row: int) -> str:
        duplicates = self._duplicate_ids[file]
        place = int(np.searchsorted(duplicates, row))
        is_duplicate = place < len(duplicates) and duplicates[place] == row
        return f"{id_in_file}#{row}" if is_duplicate else id_in_file

    def ids(self) -> Iterator[str]:
        """The id of each example, without reading its pictures."""
        for file, rows in enumerate(self._rows):
            for row in rows.tolist():
                yield self._unique_id(row_id(self._files[file].raw_row(row), row), file, row)

    def __iter__(self) -> Iterator[Example]:
        return (self[number] for number in range(len(self)))

    def locate(self, index: int) -> tuple[int, int]:
        """The number of the file that an example is in, and its row there."""
        file = int(np.searchsorted(self._ends, index, "right"))
        return file, int(self._rows[file][index - (int(self._ends[file - 1]) if file else 0)])


@dataclass(frozen=True)
class LoadedSource:
    """The examples of one data file, and its rows that cannot be used."""

    path: str
    examples: Examples
    bad: list[BadRow]


def read_source(source: SourceConfig) -> LoadedSource:
    """All rows of a data file, or those up to the `max_examples`-th usable one.

    A row that cannot be used goes to `bad`. Raises DataError where the file itself cannot be used: it or its image
    folder is missing, its suffix is unknown, or it has no rows.
    """
    file = DataFile(source)
    usable: list[int] = []
    ids: list[int] = []
    bad: list[BadRow] = []
    for row in range(len(file)):
        fields = None
        try:
            fields = file.raw_row(row)
            file.lazy_example(fields, row)
            usable.append(row)
        except RowError as error:
            bad.append(BadRow(file.path, row, row_id(fields, row), str(error)))
        ids.append(hash64(row_id(fields, row)))
        if len(usable) == source.max_examples:
            break
    return LoadedSource(file.path, Examples([(file, np.asarray(usable, np.int64), later_duplicates(ids))]), bad)
