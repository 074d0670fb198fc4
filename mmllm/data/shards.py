"""Data too large to index, in shards that are read from front to back: a tar, a row group, megabytes of JSON lines."""

from __future__ import annotations

import codecs
import functools
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from mmllm.batch import Example
from mmllm.config import SourceConfig
from mmllm.data.formats import to_example
from mmllm.data.sources import context_of
from mmllm.readers.arrow_to_python import DAMAGE, inner_suffix, is_compressed, open_decompressed
from mmllm.readers.files import DataError, expand, is_folder, join, list_folder, local_path, open_file
from mmllm.readers.json_rows import parse_row
from mmllm.readers.tables import arrow_to_python, batches_of_group, open_parquet
from mmllm.readers.tars import group_members, read_members, tar_row

SHARD_BYTES = 32 << 20  # of JSON lines
ROWS_AT_ONCE = 16  # of a row group

ReadRow = Callable[[], Any]  # the raw row; raises RowError where it cannot be parsed


class Shards(Protocol):
    """`read` gives the rows of one of the shards in `names`, from the row `start` on, as (number, how to read it)."""

    names: list[str]

    def read(self, shard: int, start: int) -> Iterator[tuple[int, ReadRow]]: ...


class JsonLinesShards:
    """Stretches of JSON lines; a line belongs to the stretch that it begins in. A compressed file is one stretch."""

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
                    file.readline()  # what began before this stretch
                row = 0
                while (end is None or file.tell() < end) and (line := file.readline()):
                    if not line.strip():
                        continue
                    if row >= start:
                        yield row, functools.partial(parse_row, line)
                    row += 1
        except DAMAGE as error:
            raise DataError(f"{path} cannot be read to its end ({error}); copy or download it again") from error


def _check_lines(path: str) -> None:
    """Raises DataError for JSON that is not one row a line in UTF-8, which an index reads and a stream cannot."""
    with open_decompressed(path) as file:
        head = file.readline(SHARD_BYTES).removeprefix(codecs.BOM_UTF8).strip()
    what = "is in UTF-16" if b"\0" in head[:4] else "has rows over several lines" if head in (b"{", b"[") else None
    what = "is one list" if head.startswith(b"[") else what
    if what:
        raise DataError(
            f"{path} cannot be streamed, as it {what}: write a row a line as UTF-8, or take `streaming` out"
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
        for batch in batches_of_group(path, group, ROWS_AT_ONCE):
            for number in range(max(0, start - first), batch.num_rows):
                name = f"{self.names[shard]} row {first + number}"
                yield first + number, functools.partial(_row_of, batch, number, name)
            first += batch.num_rows


def _row_of(batch: Any, number: int, name: str) -> dict[str, Any]:
    return {column: arrow_to_python(batch.column(column)[number], f"{name} {column}") for column in batch.schema.names}


class TarShards:
    """WebDataset tars, one shard each; read as a stream, so also compressed ones."""

    def __init__(self, files: list[str]):
        self.names = files

    def read(self, shard: int, start: int) -> Iterator[tuple[int, ReadRow]]:
        for row, sample in enumerate(group_members(read_members(self.names[shard]))):
            if row >= start:
                yield row, functools.partial(tar_row, sample, bytes)


STREAMS: dict[str, Callable[[list[str]], Shards]] = {
    ".jsonl": JsonLinesShards,
    ".parquet": ParquetShards,
    ".tar": TarShards,
}


class ShardedFile:
    """A source that is streamed. Raises DataError where it cannot be."""

    def __init__(self, source: SourceConfig):
        self.path = local_path(source.path)
        names = [self.path]
        if is_folder(self.path):
            names = [join(self.path, n) for n in list_folder(self.path) if inner_suffix(n) in STREAMS]
        suffixes = {inner_suffix(name) for name in names}
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
