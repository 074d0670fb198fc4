"""Samplers: which examples make each global batch, as a function of seed and step, or of a saved state where data is
streamed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from mmllm.batch import Example
from mmllm.data.mix import SourceCounts, epoch_items
from mmllm.data.sources import load_pictures
from mmllm.data.stream import ReaderPosition, ShardReader, Stream
from mmllm.readers.files import DataError

MEGABATCH = 32  # batches that are sorted by length together
MAX_SHARD_READERS = 16  # shards that are open at once

Item = int | Example  # the index of an indexed example, or a streamed example itself
StepSplitter = Callable[[Sequence[Item], int], list[Sequence[Item]]]  # (rank items, count) -> `count` micro-batches


_Value = TypeVar("_Value")


def rank_slice(items: list[_Value], rank: int, world_size: int) -> list[_Value]:
    """This rank's items of a global list: every `world_size`-th one, so that all ranks get similar lengths."""
    return items[rank::world_size]


def step_seed(seed: int, step: int, rank: int) -> int:
    """The seed of the random numbers, such as those of dropout, that one rank draws in one step."""
    return int(np.random.SeedSequence((seed, step, rank)).generate_state(1)[0])


def in_order(items: Sequence[Item], count: int) -> list[Sequence[Item]]:
    """`count` micro-batches of equal size, in the order of the items."""
    size = len(items) // count
    return [items[start : start + size] for start in range(0, len(items), size)]


class Sampler(Protocol):
    """What the training loop needs: this rank's examples for a step, and the state to resume from after it.

    `split_step` divides the rank's examples into micro-batches. Every rank must make the same number of them, because
    ranks wait for each other in each micro-batch.
    """

    split_step: StepSplitter

    def rank_items(self, step: int, rank: int, world_size: int) -> Sequence[Item]: ...
    def state(self) -> dict[int, Any]: ...
    def load_state(self, state: Mapping[int, Any]) -> None: ...


class IndexedSampler:
    """The global batch of every step. Each epoch is a new permutation; its incomplete last batch is dropped.

    Args:
        num_examples: all examples; used where `source_counts` is not given.
        batch_size: examples in a global batch, over all ranks and accumulation steps.
        lengths: tokens of each example. With them, the first batch of all is the one with the longest example, so that
            a batch that does not fit into memory fails at once.
        source_counts: how many examples of each source an epoch shows, see `epoch_counts`. Default: each example once.
        group_by_length: with `lengths`, each batch holds examples of similar length, so that little is padded. The
            batches themselves come in random order.

    Raises ValueError where there are fewer examples than one batch needs.
    """

    def __init__(
        self,
        num_examples: int,
        batch_size: int,
        seed: int,
        lengths: Sequence[int] | NDArray[np.int64] | None = None,
        source_counts: SourceCounts | None = None,
        split_step: StepSplitter = in_order,
        *,
        group_by_length: bool = True,
    ):
        self.split_step = split_step
        self.groups_by_length = group_by_length and lengths is not None
        self.source_counts = [(num_examples, num_examples)] if source_counts is None else list(source_counts)
        num_shown = sum(count for _, count in self.source_counts)
        if num_shown < batch_size:
            raise DataError(
                f"{num_shown} usable examples are fewer than one global batch of {batch_size} "
                "(ranks x batch_size x accumulate_steps); lower compute.batch_size or add data"
            )
        self.batch_size, self.seed = batch_size, seed
        self.lengths = None if lengths is None else np.asarray(lengths)
        self.batches_per_epoch = num_shown // batch_size
        self._epoch = -1
        self._batches: list[np.ndarray] = []

    def _epoch_batches(self, epoch: int) -> list[np.ndarray]:
        generator = np.random.default_rng((self.seed, epoch))
        indices = generator.permutation(epoch_items(self.source_counts, self.seed, epoch))
        if self.groups_by_length and self.lengths is not None:
            size = self.batch_size * MEGABATCH
            chunks = [indices[start : start + size] for start in range(0, len(indices), size)]
            indices = np.concatenate([chunk[np.argsort(self.lengths[chunk], kind="stable")] for chunk in chunks])
        num_batches = self.batches_per_epoch
        batches = list(indices[: num_batches * self.batch_size].reshape(num_batches, self.batch_size))
        if self.groups_by_length:
            batches = [batches[i] for i in generator.permutation(num_batches)]
        if epoch == 0 and self.lengths is not None:
            longest = int(np.argmax([self.lengths[batch].max() for batch in batches]))
            batches[0], batches[longest] = batches[longest], batches[0]
        return batches

    def batch(self, step: int) -> list[int]:
        """Indices of the examples in the global batch of this step."""
        epoch, place = divmod(step, self.batches_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._epoch_batches(epoch)
        return [int(index) for index in self._batches[place]]

    def rank_items(self, step: int, rank: int, world_size: int) -> list[int]:
        return rank_slice(self.batch(step), rank, world_size)

    def state(self) -> dict[int, Any]:
        """Empty: the step alone decides the batch."""
        return {}

    def load_state(self, state: Mapping[int, Any]) -> None:
        """Does nothing, since the state is empty."""


class StreamSampler:
    """Global batches from a stream. Each slot of a batch belongs to one shard reader, in turn; replay fills some slots.

    `rank_items` must be called step by step. A rank runs the shard readers that serve its slots, and loads the pictures
    of its own slots only. `replay` is (number of indexed examples, their fraction of all examples shown).
    """

    def __init__(
        self,
        stream: Stream,
        batch_size: int,
        seed: int,
        replay: tuple[int, float] | None = None,
        split_step: StepSplitter = in_order,
    ):
        self.split_step = split_step
        self.batch_size, self.seed, self.replay = batch_size, seed, replay
        self.stream = stream
        self.num_readers = min(MAX_SHARD_READERS, batch_size, stream.num_shards)
        self._resume_positions: dict[int, ReaderPosition] = {}
        self._readers: dict[int, ShardReader] = {}

    def _replayed(self, step: int) -> dict[int, int]:
        """{slot: index of a replayed example}. Fractions of an example even out over the steps."""
        if self.replay is None:
            return {}
        num_replay, fraction = self.replay
        first, end = (int(number * fraction * self.batch_size) for number in (step, step + 1))
        slots = np.random.default_rng((self.seed, step)).permutation(self.batch_size)[: end - first]
        replayed = {}
        for slot, number in zip(slots, range(first, end), strict=True):
            epoch, place = divmod(number, num_replay)
            order = np.random.default_rng((self.seed, epoch, num_replay)).permutation(num_replay)
            replayed[int(slot)] = int(order[place])
        return replayed

    def rank_items(self, step: int, rank: int, world_size: int) -> list[Item]:
        rank_slots = set(rank_slice(list(range(self.batch_size)), rank, world_size))
        rank_readers = {slot % self.num_readers for slot in rank_slots}
        replayed = self._replayed(step)
        items: list[Item] = []
        for slot in range(self.batch_size):
            number = slot % self.num_readers
            if slot in replayed:
                items += [replayed[slot]] if slot in rank_slots else []
            elif number in rank_readers:
                example = next(self._reader(number))
                items += [load_pictures(example)] if slot in rank_slots else []
        return items

    def _reader(self, number: int) -> ShardReader:
        if number not in self._readers:
            position = self._resume_positions.get(number, ReaderPosition())
            self._readers[number] = ShardReader(self.stream, number, self.num_readers, position)
        return self._readers[number]

    def state(self) -> dict[int, Any]:
        """{shard reader: the fields of its ReaderPosition}, of the readers that this rank runs."""
        return {number: list(astuple(reader.position)) for number, reader in self._readers.items()}

    def load_state(self, state: Mapping[int, Any]) -> None:
        self._resume_positions = {number: ReaderPosition(*values) for number, values in state.items()}
        self._readers = {}
