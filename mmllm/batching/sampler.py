"""In which order examples are seen: a function of seed and step, and for streamed data of a position that is saved."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from mmllm.batch import Example
from mmllm.data.mix import Parts, epoch_items
from mmllm.data.sources import load_pictures
from mmllm.data.stream import Lane, Position, Stream

MEGABATCH = 32  # batches among which examples of like length are brought together
MAX_LANES = 16  # shards that are open at once

Item = int | Example  # the number of an indexed example, or a streamed one itself
Division = Callable[[Sequence[Item], int], list[Sequence[Item]]]  # a share -> so many micro-batches


_Value = TypeVar("_Value")


def rank_items(items: list[_Value], rank: int, world_size: int) -> list[_Value]:
    """This rank's examples of a global batch: every `world_size`-th, so that lengths are alike on all ranks."""
    return items[rank::world_size]


def seed_of(seed: int, step: int, rank: int) -> int:
    """What random numbers of this step, such as dropout, begin with."""
    return int(np.random.SeedSequence((seed, step, rank)).generate_state(1)[0])


def as_they_come(items: Sequence[Item], count: int) -> list[Sequence[Item]]:
    """Micro-batches of equal size in the order of the examples."""
    size = len(items) // count
    return [items[start : start + size] for start in range(0, len(items), size)]


class Orders(Protocol):
    """What the loop asks: this rank's share of a step's global batch, and where the order stands behind it.

    `divide` makes of a share as many micro-batches as it is told, on every rank: in each, ranks wait for one another.
    """

    divide: Division

    def share(self, step: int, rank: int, world_size: int) -> Sequence[Item]: ...
    def position(self) -> dict[int, Any]: ...
    def go_to(self, position: Mapping[int, Any]) -> None: ...


class Order:
    """The global batch of every step. Each epoch is a new permutation; its incomplete last batch is left out.

    With `lengths`, the batch of the longest example is the very first, so that what does not fit into memory fails at
    once. With `group_by_length` too, each batch holds examples of like length, so little is padded, and batches come in
    random order. `parts` says how often an epoch shows the examples of each source, see `mix`; without it, each once.
    Raises ValueError where there are fewer examples than one batch needs.
    """

    def __init__(
        self,
        num_examples: int,
        batch_size: int,
        seed: int,
        lengths: Sequence[int] | NDArray[np.int64] | None = None,
        parts: Parts | None = None,
        divide: Division = as_they_come,
        *,
        group_by_length: bool = True,
    ):
        self.divide = divide
        self.groups = group_by_length and lengths is not None
        self.parts = [(num_examples, num_examples)] if parts is None else list(parts)
        num_shown = sum(count for _, count in self.parts)
        if num_shown < batch_size:
            raise ValueError(
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
        shown = generator.permutation(epoch_items(self.parts, self.seed, epoch))
        if self.groups and self.lengths is not None:
            size = self.batch_size * MEGABATCH
            chunks = [shown[start : start + size] for start in range(0, len(shown), size)]
            shown = np.concatenate([chunk[np.argsort(self.lengths[chunk], kind="stable")] for chunk in chunks])
        count = self.batches_per_epoch
        batches = list(shown[: count * self.batch_size].reshape(count, self.batch_size))
        if self.groups:
            batches = [batches[i] for i in generator.permutation(count)]
        if epoch == 0 and self.lengths is not None:
            longest = int(np.argmax([self.lengths[batch].max() for batch in batches]))
            batches[0], batches[longest] = batches[longest], batches[0]
        return batches

    def batch(self, step: int) -> list[int]:
        """Indices of the examples of this step's global batch."""
        epoch, position = divmod(step, self.batches_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._epoch_batches(epoch)
        return [int(index) for index in self._batches[position]]

    def share(self, step: int, rank: int, world_size: int) -> list[int]:
        return rank_items(self.batch(step), rank, world_size)

    def position(self) -> dict[int, Any]:
        """Nothing: the step says it all."""
        return {}

    def go_to(self, position: Mapping[int, Any]) -> None:
        """Nothing to do, see `position`."""


class StreamOrder:
    """Global batches out of a stream, whose slots are served by lanes in turn; some slots go to indexed replay.

    `share` must be called step by step. A rank reads the lanes that its slots are in, and pictures of its own alone.
    """

    def __init__(
        self,
        stream: Stream,
        batch_size: int,
        seed: int,
        replay: tuple[int, float] | None = None,
        divide: Division = as_they_come,
    ):
        self.divide = divide
        self.batch_size, self.seed, self.replay = batch_size, seed, replay
        self.stream = stream
        self.num_lanes = min(MAX_LANES, batch_size, stream.num_shards)
        self._begin: dict[int, Position] = {}
        self._lanes: dict[int, Lane] = {}

    def _replayed(self, step: int) -> dict[int, int]:
        """Slot: index of a replayed example. Shares that are no whole numbers even out over the steps."""
        if self.replay is None:
            return {}
        size, fraction = self.replay
        first, behind = (int((step + more) * fraction * self.batch_size) for more in (0, 1))
        slots = np.random.default_rng((self.seed, step)).permutation(self.batch_size)[: behind - first]
        found = {}
        for slot, number in zip(slots, range(first, behind), strict=True):
            epoch, place = divmod(number, size)
            found[int(slot)] = int(np.random.default_rng((self.seed, epoch, size)).permutation(size)[place])
        return found

    def share(self, step: int, rank: int, world_size: int) -> list[Item]:
        mine = set(rank_items(list(range(self.batch_size)), rank, world_size))
        lanes = {slot % self.num_lanes for slot in mine}
        replayed = self._replayed(step)
        items: list[Item] = []
        for slot in range(self.batch_size):
            number = slot % self.num_lanes
            if slot in replayed:
                items += [replayed[slot]] if slot in mine else []
            elif number in lanes:
                example = next(self._lane(number))
                items += [load_pictures(example)] if slot in mine else []
        return items

    def _lane(self, number: int) -> Lane:
        if number not in self._lanes:
            begin = self._begin.get(number, Position())
            self._lanes[number] = Lane(self.stream, number, self.num_lanes, begin)
        return self._lanes[number]

    def position(self) -> dict[int, Any]:
        """Where each lane stands that this rank reads."""
        return {number: list(astuple(lane.position)) for number, lane in self._lanes.items()}

    def go_to(self, position: Mapping[int, Any]) -> None:
        self._begin = {number: Position(*values) for number, values in position.items()}
        self._lanes = {}
