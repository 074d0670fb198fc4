"""Data too large to index, in shards that are read from front to back: a tar, a row group, megabytes of JSON lines."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from typing import Any, Protocol

from mmllm.batch import Example
from mmllm.config import SourceConfig
from mmllm.data.files import DataError, expand, is_folder, join, list_folder, local_path, open_file
from mmllm.data.formats import to_example
from mmllm.data.rows import check_tar_size, group_members, parse_row, plain, tar_row
from mmllm.data.sources import context_of

SHARD_BYTES = 32 << 20  # of JSON lines
ROWS_AT_ONCE = 16  # of a row group

ReadRow = Callable[[], Any]  # the raw row; raises RowError where it cannot be parsed


class Shards(Protocol):
    """`read` gives the rows of one of the shards in `names`, from the row `start` on, as (number, how to read it)."""

    names: list[str]

    def read(self, shard: int, start: int) -> Iterator[tuple[int, ReadRow]]: ...


class JsonLinesShards:
    """Stretches of JSON lines; a line belongs to the stretch that it begins in."""

    def __init__(self, files: list[str]):
        self._places: list[tuple[str, int]] = []
        for path in files:
            with open_file(path) as file:
                size = file.seek(0, 2)
            self._places += [(path, start) for start in range(0, size, SHARD_BYTES)]
        self.names = [f"{path}@{start}" for path, start in self._places]

    def read(self, shard: int, start: int) -> Iterator[tuple[int, ReadRow]]:
        path, begin = self._places[shard]
        with open_file(path) as file:
            if begin:
                file.seek(begin - 1)
                file.readline()  # what began before this stretch
            row = 0
            while file.tell() < begin + SHARD_BYTES and (line := file.readline()):
                if not line.strip():
                    continue
                if row >= start:
                    yield row, functools.partial(parse_row, line)
                row += 1


class ParquetShards:
    """The row groups of parquet files."""

    def __init__(self, files: list[str]):
        self._places = [(path, group) for path in files for group in range(self._open(path).num_row_groups)]
        self.names = [f"{path}#{group}" for path, group in self._places]

    @staticmethod
    def _open(path: str) -> Any:
        import pyarrow as pa
        import pyarrow.parquet

        try:
            return pa.parquet.ParquetFile(open_file(path))
        except pa.ArrowInvalid as error:
            raise DataError(f"{path} is not parquet that can be read: {error}") from error

    def read(self, shard: int, start: int) -> Iterator[tuple[int, ReadRow]]:
        path, group = self._places[shard]
        first = 0
        with self._open(path) as file:
            for batch in file.iter_batches(batch_size=ROWS_AT_ONCE, row_groups=[group]):
                for number in range(max(0, start - first), batch.num_rows):
                    name = f"{self.names[shard]} row {first + number}"
                    yield first + number, functools.partial(_row_of, batch, number, name)
                first += batch.num_rows


def _row_of(batch: Any, number: int, name: str) -> dict[str, Any]:
    return {column: plain(batch.column(column)[number], f"{name} {column}") for column in batch.schema.names}


class TarShards:
    """WebDataset tars, one shard each; read as a stream, so also compressed ones."""

    def __init__(self, files: list[str]):
        self.names = files

    def read(self, shard: int, start: int) -> Iterator[tuple[int, ReadRow]]:
        for row, sample in enumerate(group_members(self._members(self.names[shard]))):
            if row >= start:
                yield row, functools.partial(tar_row, sample, bytes)

    @staticmethod
    def _members(path: str) -> Iterator[tuple[str, bytes]]:
        import tarfile

        from webdataset.tariterators import tar_file_iterator

        try:
            with open_file(path) as file:
                for member in tar_file_iterator(file):
                    yield member["fname"], member["data"]
                if path.endswith(".tar"):
                    check_tar_size(file, path)
        except (tarfile.TarError, EOFError) as error:
            raise DataError(f"{path} is not a tar that can be read to its end: {error}") from error


STREAMS: dict[str, Callable[[list[str]], Shards]] = {
    ".jsonl": JsonLinesShards,
    ".parquet": ParquetShards,
    ".tar": TarShards,
    ".tgz": TarShards,
    ".gz": TarShards,
}


class ShardedFile:
    """A source that is streamed. Raises DataError where it cannot be."""

    def __init__(self, source: SourceConfig):
        self.path = local_path(source.path)
        names = [self.path]
        if is_folder(self.path):
            names = [join(self.path, n) for n in list_folder(self.path) if PurePosixPath(n).suffix.lower() in STREAMS]
        suffixes = {PurePosixPath(name).suffix.lower() for name in names}
        if len(suffixes) != 1 or not suffixes <= STREAMS.keys():
            raise DataError(
                f"{self.path} cannot be streamed: it has {', '.join(sorted(suffixes)) or 'no file'}; give files of "
                f"one of {', '.join(STREAMS)}, or take `streaming` out"
            )
        self.shards = STREAMS[suffixes.pop()]([file for name in names for file in expand(name)])
        self.context = context_of(source)
        if not self.shards.names:
            raise DataError(f"{self.path} holds no rows; give a file with at least one conversation")

    def peek(self, fields: Any, row: int) -> Example:
        """The example of a raw row, with `Stored` in place of pictures that are not read yet. Raises RowError."""
        return to_example(fields, row, self.path, self.context)
