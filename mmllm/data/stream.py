"""The endless stream of a run's shards, divided into lanes, each with an exact position that a resumed run takes up.

An epoch is a permutation of all shards. Lane `l` of `L` takes the shards l, l + L, l + 2L ... of the epochs laid end to
end, and reads each from front to back; nothing is held back for shuffling, so a position is (shards begun, row).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mmllm.batch import Example
from mmllm.config import SourceConfig
from mmllm.data.inspection import Inspector, Rules
from mmllm.data.mix import epoch_items, mix
from mmllm.data.shards import ShardedFile
from mmllm.readers.files import DataError

MIN_SEEN = 1000  # rows, before the share of bad ones is judged by what was seen


@dataclass(frozen=True)
class Position:
    """Where a lane stands, and what it has met so far."""

    shards_begun: int = 0
    row: int = 0
    num_seen: int = 0
    num_bad: int = 0


class Stream:
    """The shards of all streamed sources, in the order of each epoch."""

    def __init__(self, sources: Sequence[SourceConfig], rules: Rules, *, seed: int, max_bad_fraction: float):
        self.files = [ShardedFile(source) for source in sources]
        self.rules, self.seed, self.max_bad_fraction = rules, seed, max_bad_fraction
        self._shards = [(file, shard) for file in self.files for shard in range(len(file.shards.names))]
        self._parts = mix([len(file.shards.names) for file in self.files], [source.weight for source in sources])
        self.num_shards = sum(count for _, count in self._parts)
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def shard(self, number: int) -> tuple[ShardedFile, int]:
        """The shard at a place of the endless sequence."""
        epoch, place = divmod(number, self.num_shards)
        if epoch != self._epoch:
            generator = np.random.default_rng((self.seed, epoch))
            self._epoch = epoch
            self._order = generator.permutation(epoch_items(self._parts, self.seed, epoch))
        return self._shards[int(self._order[place])]


class Lane:
    """One of the strands that are read side by side; iterate it for usable examples, pictures unread."""

    def __init__(self, stream: Stream, lane: int, num_lanes: int, position: Position):
        self._stream, self._lane, self._num_lanes = stream, lane, num_lanes
        self.position = position
        self._examples = self._walk()

    def __next__(self) -> Example:
        return next(self._examples)

    def _walk(self) -> Iterator[Example]:
        num_empty = 0
        while num_empty < self._stream.num_shards:
            file, shard = self._stream.shard(self._lane + self._num_lanes * self.position.shards_begun)
            name, inspector = file.shards.names[shard], Inspector(self._stream.rules)
            num_empty += self.position.row == 0  # the rest of a shard may well be empty
            for row, read in file.shards.read(shard, self.position.row):
                example = inspector.look(name, row, read, file.peek)
                is_bad = example is None
                self.position = replace(
                    self.position,
                    row=row + 1,
                    num_seen=self.position.num_seen + 1,
                    num_bad=self.position.num_bad + is_bad,
                )
                if example is None:
                    self._judge(inspector)
                else:
                    num_empty = 0
                    yield example
            self.position = replace(self.position, shards_begun=self.position.shards_begun + 1, row=0)
        raise DataError(f"no usable example in any shard of {', '.join(file.path for file in self._stream.files)}")

    def _judge(self, inspector: Inspector) -> None:
        """Says what is left out. Raises DataError past the limit."""
        bad, limit, at = inspector.part.bad[-1], self._stream.max_bad_fraction, self.position
        what = f"{bad.source} row {bad.row} ({bad.id}): {bad.reason}"
        if at.num_bad > limit * max(at.num_seen, MIN_SEEN):
            raise DataError(
                f"{at.num_bad} of {at.num_seen} streamed rows cannot be used, more than data.max_bad_fraction = "
                f"{limit} allows; `mmllm check` lists them all. The last one: {what}"
            )
        if at.num_bad & (at.num_bad - 1) == 0:  # the 1st, 2nd, 4th, 8th ...
            print(f"left out, number {at.num_bad} of {at.num_seen} rows: {what}", file=sys.stderr)
