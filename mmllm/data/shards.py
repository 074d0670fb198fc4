"""Data too large to index, in shards that are read from front to back: tars, row groups, stretches of JSON lines."""

from __future__ import annotations

import codecs
import functools
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from mmllm.batch import Example
from mmllm.config import SourceConfig
from mmllm.data.formats import to_example
from mmllm.data.sources import source_context
from mmllm.readers.compression import DECOMPRESSION_ERRORS, inner_suffix, is_compressed, open_decompressed
from mmllm.readers.files import DataError, is_folder, join_path, list_folder, local_path, matching_files, open_file
from mmllm.readers.json_rows import parse_row
from mmllm.readers.tables import arrow_to_python, batches_of_group, open_parquet
from mmllm.readers.tars import group_members, read_members, tar_row

SHARD_BYTES = 32 << 20  # of JSON lines in a shard
ROWS_PER_BATCH = 16  # rows of a row group that are in memory at once

ReadRow = Callable[[], Any]  # returns the raw row; raises RowError where it cannot be parsed


class Shards(Protocol):
    """The shards of some files. `names` has one name a shard."""

    names: list[str]

    def read(self, shard: int, start: int) -> Iterator[tuple[int, ReadRow]]:
        """(row number, function that reads the row) for the rows of this shard, from the row `start` on."""
        ...


class JsonLinesShards:
    """JSON lines in stretches of SHARD_BYTES. A line belongs to the stretch that it begins in.

    A compressed file is one stretch.
    """

    def __init__(self, files: list[str]):
        self._places: list[tuple[str, int]] = []
        for path in files:
            _check_lines(path)
            if is_compressed(path):
                self._places.append((path, 0))
                continue
            with open_file(path) as file:
                size = file.seek(0, 2)
            self._places += [(path, start) for start in range(0, size, SHARD_BYTES)]
        self.names = [f"{path}@{start}" for path, start in self._places]

    def read(self, shard: int, start: int) -> Iterator[tuple[int, ReadRow]]:
        path, begin = self._places[shard]
        end = None if is_compressed(path) else begin + SHARD_BYTES
        try:
            with open_decompressed(path) as file:
                if begin:
                    file.seek(begin - 1)
                    file.readline()  # a line that began before this stretch
                row = 0
                while (end is None or file.tell() < end) and (line := file.readline()):
                    if not line.strip():
                        continue
                    if row >= start:
                        yield row, functools.partial(parse_row, line)
                    row += 1
        except DECOMPRESSION_ERRORS as error:
            raise DataError(f"{path} cannot be read to its end ({error}); copy or download it again") from error


def _check_lines(path: str) -> None:
    """Raises DataError for JSON that can be indexed but not streamed: anything but one row a line in UTF-8."""
    with open_decompressed(path) as file:
        head = file.readline(SHARD_BYTES).removeprefix(codecs.BOM_UTF8).strip()
    fault = "is in UTF-16" if b"\0" in head[:4] else "has rows over several lines" if head in (b"{", b"[") else None
    fault = "is one list" if head.startswith(b"[") else fault
    if fault:
        raise DataError(
            f"{path} cannot be streamed, because it {fault}: write one row a line in UTF-8, or remove `streaming`"
        )


class ParquetShards:
    """The row groups of parquet files."""

    def __init__(self, files: list[str]):
        self._places = [(path, group) for path in files for group in range(self._num_groups(path))]
        self.names = [f"{path}#{group}" for path, group in self._places]

    @staticmethod
    def _num_groups(path: str) -> int:
        with open_parquet(path) as file:
            return int(file.num_row_groups)

    def read(self, shard: int, start: int) -> Iterator[tuple[int, ReadRow]]:
        path, group = self._places[shard]
        first = 0
        for batch in batches_of_group(path, group, ROWS_PER_BATCH):
            for number in range(max(0, start - first), batch.num_rows):
                name = f"{self.names[shard]} row {first + number}"
                yield first + number, functools.partial(_row_of, batch, number, name)
            first += batch.num_rows


def _row_of(batch: Any, number: int, name: str) -> dict[str, Any]:
    return {column: arrow_to_python(batch.column(column)[number], f"{name} {column}") for column in batch.schema.names}


class TarShards:
    """WebDataset tars, one shard each, compressed or not."""

    def __init__(self, files: list[str]):
        self.names = files

    def read(self, shard: int, start: int) -> Iterator[tuple[int, ReadRow]]:
        for row, sample in enumerate(group_members(read_members(self.names[shard]))):
            if row >= start:
                yield row, functools.partial(tar_row, sample, bytes)


STREAM_FORMATS: dict[str, Callable[[list[str]], Shards]] = {
    ".jsonl": JsonLinesShards,
    ".parquet": ParquetShards,
    ".tar": TarShards,
}


class ShardedFile:
    """A source that is streamed. Raises DataError where it cannot be streamed."""

    def __init__(self, source: SourceConfig):
        self.path = local_path(source.path)
        names = [self.path]
        if is_folder(self.path):
            names = [join_path(self.path, n) for n in list_folder(self.path) if inner_suffix(n) in STREAM_FORMATS]
        suffixes = {inner_suffix(name) for name in names}
        if len(suffixes) != 1 or not suffixes <= STREAM_FORMATS.keys():
            raise DataError(
                f"{self.path} cannot be streamed: it has {', '.join(sorted(suffixes)) or 'no file'}; give files of "
                f"one of {', '.join(STREAM_FORMATS)}, or remove `streaming`"
            )
        self.shards = STREAM_FORMATS[suffixes.pop()]([file for name in names for file in matching_files(name)])
        self.context = source_context(source)
        if not self.shards.names:
            raise DataError(f"{self.path} holds no rows; give a file with at least one conversation")

    def lazy_example(self, fields: Any, row: int) -> Example:
        """The example of a raw row, with a LazyImage for each picture that is not read yet. Raises RowError."""
        return to_example(fields, row, self.path, self.context)
