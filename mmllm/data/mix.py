"""How often an epoch shows the items of each source. Items are rows, or the shards of streamed data.

A source of `size` items is shown `count` times in an epoch. Where `count` is no multiple of `size`, each epoch goes on
in the source where the last one stopped.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

SourceCounts = Sequence[tuple[int, int]]  # (size, count) of each source; items are numbered across all sources


def epoch_items(source_counts: SourceCounts, seed: int, epoch: int) -> NDArray[np.int64]:
    """The item numbers of an epoch, not yet shuffled."""
    items: list[NDArray[np.int64]] = []
    first = 0
    for size, count in source_counts:
        if count == 0:
            continue
        if count % size == 0:
            chosen = np.tile(np.arange(size), count // size)
        else:
            order = np.random.default_rng((seed, size)).permutation(size)
            chosen = order[(epoch * count + np.arange(count)) % size]
        items.append(chosen + first)
        first += size
    return np.concatenate(items)


def epoch_counts(
    sizes: Sequence[int], weights: Sequence[float], replay: tuple[int, float] | None = None
) -> list[tuple[int, int]]:
    """(size, count) of each source, `count` being its weight times its size.

    `replay` is (size, fraction of all that is shown) of one more source, which comes last.
    """
    counts = [(size, _epoch_count(size, weight * size)) for size, weight in zip(sizes, weights, strict=True)]
    if replay is not None:
        size, fraction = replay
        counts.append((size, _epoch_count(size, fraction / (1 - fraction) * sum(count for _, count in counts))))
    return counts


def _epoch_count(size: int, exact: float) -> int:
    return max(1, round(exact)) if size else 0
