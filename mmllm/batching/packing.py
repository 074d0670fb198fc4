"""Which examples of a step stand in one micro-batch, and which in one row.

A packed row holds whole examples one behind the other, each at positions that begin with 0. Nothing is split or left
out: every function here returns each number of its examples once. Lengths are in tokens, image tokens included.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush, heapreplace
from typing import Literal

import torch
from torch import Tensor

Groups = list[list[int]]  # numbers of examples

WIDTHS = (1.0, 1.25, 1.5, 2.0, 3.0, 4.0, 8.0)  # lengths of a packed row that are tried, in those of the longest example
MIN_GAIN = 0.05  # of the cost: what is won on paper by less is lost to building the mask


@dataclass(frozen=True)
class RowCost:
    """What rows cost an LLM, in tokens of very short rows: each token its layers, and attention to the whole row.

    `even_width` is the row length at which attention costs as much as all else; None: attention skips what is masked,
    so that rows may be as long as they like. `one_row`: attention knows packed examples in a single row alone.
    """

    even_width: float | None = None
    one_row: bool = False

    def of(self, num_rows: int, width: int) -> float:
        return num_rows * width * (1 + (width / self.even_width if self.even_width else 0.0))


def best_fit(lengths: Sequence[int], capacity: int) -> Groups:
    """Rows of at most `capacity` tokens, the fullest that still has room first (best fit, decreasing lengths).

    It needs at most 11/9 of the fewest rows possible: https://doi.org/10.1137/0203025
    """
    rows: Groups = []
    room: list[tuple[int, int]] = []  # what is left in a row and which one it is, in order
    for number in sorted(range(len(lengths)), key=lambda number: (-lengths[number], number)):
        length = lengths[number]
        if (place := bisect_left(room, (length, 0))) < len(room):
            left, row = room.pop(place)
            rows[row].append(number)
        else:
            left, row = max(capacity, length), len(rows)
            rows.append([number])
        insort(room, (left - length, row))
    return rows


def width_of(rows: Groups, lengths: Sequence[int]) -> int:
    """Tokens of the longest row."""
    return max(sum(lengths[number] for number in row) for row in rows)


def rows_within(lengths: Sequence[int], capacity: int) -> Groups:
    """Few rows of at most `capacity` tokens, and of about as many where that makes the longest one shorter."""
    packed = best_fit(lengths, capacity)
    even = balanced(lengths, [0] * len(lengths), len(packed))
    return min(packed, even, key=lambda rows: width_of(rows, lengths))


def plan_rows(
    lengths: Sequence[int], packing: Literal["auto", "always"], cost: RowCost, max_width: int
) -> Groups | None:
    """The rows of a micro-batch; None: each example in a row of its own is as cheap.

    `always` fills as few rows as it can, of at most `max_width` tokens. `auto` takes the cheapest of several widths.
    """
    if cost.one_row:
        return [list(range(len(lengths)))]
    if packing == "always":
        return rows_within(lengths, max_width)
    longest = max(lengths)
    if sum(lengths) > (1 - MIN_GAIN) * len(lengths) * longest:  # less padding than that: not worth a try
        return None
    tried = [rows_within(lengths, int(longest * times)) for times in WIDTHS]
    costs = [cost.of(len(rows), width_of(rows, lengths)) for rows in tried]
    padded = cost.of(len(lengths), longest)
    return tried[costs.index(min(costs))] if min(costs) <= (1 - MIN_GAIN) * padded else None


def divided(lengths: Sequence[int], num_images: Sequence[int], count: int, packing: str, cost: RowCost) -> Groups:
    """`count` micro-batches of packed rows: `balanced`, but `alike` where `auto` finds that much cheaper.

    It is where attention is dear, since short examples then stand in short rows; balanced ones need less memory.
    """
    even = balanced(lengths, num_images, count)
    if packing == "always":
        return even
    by_length = alike(lengths, count)
    return by_length if _total(by_length, lengths, cost) < (1 - MIN_GAIN) * _total(even, lengths, cost) else even


def _total(groups: Groups, lengths: Sequence[int], cost: RowCost) -> float:
    """What these micro-batches cost when `auto` packs each."""
    total = 0.0
    for group in groups:
        own = [lengths[number] for number in group]
        rows = plan_rows(own, "auto", cost, 0) or [[number] for number in range(len(own))]
        total += cost.of(len(rows), width_of(rows, own))
    return total


def balanced(lengths: Sequence[int], num_images: Sequence[int], count: int) -> Groups:
    """`count` micro-batches of about as many tokens, none empty: the longest example goes to the one that has fewest.

    None gets more pictures than its equal share and those of one example more, since pictures fill memory as well.
    """
    most = -(-sum(num_images) // count) + max(num_images) - 1 if any(num_images) else 0
    found: Groups = [[] for _ in range(count)]
    images = [0] * count
    fewest = [(0, group) for group in range(count)]  # a heap of tokens and group
    for number in sorted(range(len(lengths)), key=lambda number: (-lengths[number], number)):
        full = []
        while images[fewest[0][1]] + num_images[number] > most:
            full.append(heappop(fewest))
        tokens, group = fewest[0]
        found[group].append(number)
        images[group] += num_images[number]
        heapreplace(fewest, (tokens + lengths[number], group))
        for one in full:
            heappush(fewest, one)
    return [sorted(group) for group in found]


def alike(lengths: Sequence[int], count: int) -> Groups:
    """`count` micro-batches of equal size and examples of like length, the longest first."""
    order = sorted(range(len(lengths)), key=lambda number: (-lengths[number], number))
    size = len(lengths) // count
    return [sorted(order[start : start + size]) for start in range(0, len(order), size)]


def positions(rows: Sequence[Sequence[int]], width: int) -> Tensor:
    """[B, T] of rows of examples of these lengths, T = `width`. Padding begins with 0 too, so it belongs to nobody."""
    found = [torch.cat([torch.arange(length) for length in (*lengths, width - sum(lengths))]) for lengths in rows]
    return torch.stack(found)
