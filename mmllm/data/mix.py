"""How often each source is shown: an epoch takes `count` items of a source that has `size`, in turn over the epochs.

Items are rows, or shards of streamed data.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Parts = Sequence[tuple[int, int]]  # (size, count) of each source; items are numbered through all of them


def epoch_items(parts: Parts, seed: int, epoch: int) -> NDArray[np.int64]:
    """The items of an epoch, not yet shuffled. A part that is not shown whole goes on where the last epoch ended."""
    items: list[NDArray[np.int64]] = []
    first = 0
    for size, count in parts:
        if count == 0:
            continue
        if count % size == 0:
            chosen = np.tile(np.arange(size), count // size)
        else:
            turn = np.random.default_rng((seed, size)).permutation(size)
            chosen = turn[(epoch * count + np.arange(count)) % size]
        items.append(chosen + first)
        first += size
    return np.concatenate(items)


def mix(
    sizes: Sequence[int], weights: Sequence[float], replay: tuple[int, float] | None = None
) -> list[tuple[int, int]]:
    """(size, count) of each source. `replay` is (size, share of all that is shown) of one more, which comes last."""
    parts = [(size, _count(size, weight * size)) for size, weight in zip(sizes, weights, strict=True)]
    if replay is not None:
        size, fraction = replay
        parts.append((size, _count(size, fraction / (1 - fraction) * sum(count for _, count in parts))))
    return parts


def _count(size: int, wanted: float) -> int:
    return max(1, round(wanted)) if size else 0
