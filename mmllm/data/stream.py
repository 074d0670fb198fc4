"""The endless stream of a run's shards, and the readers that divide it, each at an exact position to resume from.

An epoch is a permutation of all shards. Laid end to end, the epochs are one endless sequence: of R readers, reader r
takes its shards r, r + R, r + 2R ... and reads each from front to back. Nothing is buffered for shuffling, so the
position of a reader is (shards begun, row).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mmllm.batch import Example
from mmllm.config import SourceConfig
from mmllm.data.inspection import RowInspector, RowRules
from mmllm.data.mix import epoch_counts, epoch_items
from mmllm.data.shards import ShardedFile
from mmllm.data.sources import BadRow
from mmllm.readers.files import DataError

MIN_SEEN = 1000  # the fraction of bad rows is that of at least so many rows


@dataclass(frozen=True)
class ReaderPosition:
    """The next row that a shard reader takes, and how many rows it has seen and left out so far."""

    shards_begun: int = 0
    row: int = 0
    num_seen: int = 0
    num_bad: int = 0


class Stream:
    """The shards of all streamed sources, in the order of each epoch."""

    def __init__(self, sources: Sequence[SourceConfig], rules: RowRules, *, seed: int, max_bad_fraction: float):
        self.files = [ShardedFile(source) for source in sources]
        self.rules, self.seed, self.max_bad_fraction = rules, seed, max_bad_fraction
        self._shards = [(file, shard) for file in self.files for shard in range(len(file.shards.names))]
        sizes = [len(file.shards.names) for file in self.files]
        self._source_counts = epoch_counts(sizes, [source.weight for source in sources])
        self.num_shards = sum(count for _, count in self._source_counts)  # of an epoch
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def shard(self, number: int) -> tuple[ShardedFile, int]:
        """The file and the shard in it at this place of the endless sequence."""
        epoch, place = divmod(number, self.num_shards)
        if epoch != self._epoch:
            generator = np.random.default_rng((self.seed, epoch))
            self._epoch = epoch
            self._order = generator.permutation(epoch_items(self._source_counts, self.seed, epoch))
        return self._shards[int(self._order[place])]


class ShardReader:
    """Iterates over the usable examples of its shards, pictures not yet read. Several readers work side by side.

    Raises DataError where too many rows are bad, or where no shard has a usable example.
    """

    def __init__(self, stream: Stream, number: int, num_readers: int, position: ReaderPosition):
        self._stream, self._number, self._num_readers = stream, number, num_readers
        self.position = position
        self._examples = self._walk()

    def __next__(self) -> Example:
        return next(self._examples)

    def _walk(self) -> Iterator[Example]:
        num_empty = 0
        while num_empty < self._stream.num_shards:
            file, shard = self._stream.shard(self._number + self._num_readers * self.position.shards_begun)
            name, inspector = file.shards.names[shard], RowInspector(self._stream.rules)
            num_empty += self.position.row == 0  # the rest of a shard, after a resume, may well be empty
            for row, read in file.shards.read(shard, self.position.row):
                example = inspector.inspect(name, row, read, file.lazy_example)
                is_bad = example is None
                self.position = replace(
                    self.position,
                    row=row + 1,
                    num_seen=self.position.num_seen + 1,
                    num_bad=self.position.num_bad + is_bad,
                )
                if example is None:
                    self._report_bad_row(inspector.report.bad[-1])
                else:
                    num_empty = 0
                    yield example
            self.position = replace(self.position, shards_begun=self.position.shards_begun + 1, row=0)
        raise DataError(f"no usable example in any shard of {', '.join(file.path for file in self._stream.files)}")

    def _report_bad_row(self, bad: BadRow) -> None:
        """Prints the 1st, 2nd, 4th, 8th ... row that is left out. Raises DataError past the limit."""
        num_bad, num_seen, limit = self.position.num_bad, self.position.num_seen, self._stream.max_bad_fraction
        row_and_reason = f"{bad.source} row {bad.row} ({bad.id}): {bad.reason}"
        if num_bad > limit * max(num_seen, MIN_SEEN):
            raise DataError(
                f"{num_bad} of {num_seen} streamed rows cannot be used, more than data.max_bad_fraction = "
                f"{limit} allows; `mmllm check` lists them all. The last one: {row_and_reason}"
            )
        if num_bad & (num_bad - 1) == 0:  # a power of two
            print(f"left out, number {num_bad} of {num_seen} rows: {row_and_reason}", file=sys.stderr)
