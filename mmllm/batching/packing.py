"""Which examples of a step share a micro-batch, and which share a row.

A packed row holds whole examples, one after another, and the position ids of each begin at 0. No example is split or
dropped: every function here returns each example number exactly once. Lengths are in tokens, image tokens included.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush, heapreplace
from typing import Literal

import torch
from torch import Tensor

Groups = list[list[int]]  # example numbers

WIDTH_FACTORS = (1.0, 1.25, 1.5, 2.0, 3.0, 4.0, 8.0)  # row lengths that are tried, as multiples of the longest example
MIN_GAIN = 0.05  # fraction of the cost; a smaller gain on paper is lost again to building the mask


@dataclass(frozen=True)
class RowCost:
    """What rows cost an LLM. The unit is one token of a very short row: its layers, without attention.

    `even_width` is the row length at which attention costs as much as everything else. None: attention skips what is
    masked, so long rows cost nothing extra. `one_row`: the attention kernel supports packed examples only in a batch of
    one row.
    """

    even_width: float | None = None
    one_row: bool = False

    def of(self, num_rows: int, width: int) -> float:
        return num_rows * width * (1 + (width / self.even_width if self.even_width else 0.0))


def best_fit(lengths: Sequence[int], capacity: int) -> Groups:
    """Rows of at most `capacity` tokens: each example, longest first, goes into the fullest row that has room for it.

    This is best fit decreasing, which needs at most 11/9 of the optimal number of rows:
    https://doi.org/10.1137/0203025
    """
    rows: Groups = []
    room: list[tuple[int, int]] = []  # (free tokens, row), sorted
    for number in sorted(range(len(lengths)), key=lambda number: (-lengths[number], number)):
        length = lengths[number]
        if (place := bisect_left(room, (length, 0))) < len(room):
            free, row = room.pop(place)
            rows[row].append(number)
        else:
            free, row = max(capacity, length), len(rows)
            rows.append([number])
        insort(room, (free - length, row))
    return rows


def longest_row(rows: Groups, lengths: Sequence[int]) -> int:
    """Tokens of the longest row."""
    return max(sum(lengths[number] for number in row) for row in rows)


def rows_within(lengths: Sequence[int], capacity: int) -> Groups:
    """Few rows of at most `capacity` tokens, evened out where that makes the longest row shorter."""
    packed = best_fit(lengths, capacity)
    even = split_by_tokens(lengths, [0] * len(lengths), len(packed))
    return min(packed, even, key=lambda rows: longest_row(rows, lengths))


def plan_rows(
    lengths: Sequence[int], packing: Literal["auto", "always"], cost: RowCost, max_width: int
) -> Groups | None:
    """The rows of a micro-batch; None where a row for each example is as cheap.

    `always` makes as few rows as possible, of at most `max_width` tokens. `auto` tries several row lengths and takes
    the cheapest.
    """
    if cost.one_row:
        return [list(range(len(lengths)))]
    if packing == "always":
        return rows_within(lengths, max_width)
    longest = max(lengths)
    if sum(lengths) > (1 - MIN_GAIN) * len(lengths) * longest:  # padding is less than MIN_GAIN, so packing cannot win
        return None
    candidates = [rows_within(lengths, int(longest * factor)) for factor in WIDTH_FACTORS]
    costs = [cost.of(len(rows), longest_row(rows, lengths)) for rows in candidates]
    padded_cost = cost.of(len(lengths), longest)
    return candidates[costs.index(min(costs))] if min(costs) <= (1 - MIN_GAIN) * padded_cost else None


def split_step(lengths: Sequence[int], num_images: Sequence[int], count: int, packing: str, cost: RowCost) -> Groups:
    """`count` micro-batches of packed rows: by tokens, or for `auto` by length where that is much cheaper.

    Splitting by length is cheaper where attention dominates the cost, since short examples then share short rows.
    Splitting by tokens needs less memory.
    """
    by_tokens = split_by_tokens(lengths, num_images, count)
    if packing == "always":
        return by_tokens
    by_length = split_by_length(lengths, count)
    is_cheaper = _packed_cost(by_length, lengths, cost) < (1 - MIN_GAIN) * _packed_cost(by_tokens, lengths, cost)
    return by_length if is_cheaper else by_tokens


def _packed_cost(groups: Groups, lengths: Sequence[int], cost: RowCost) -> float:
    """The cost of these micro-batches when `auto` packs each of them."""
    total = 0.0
    for group in groups:
        group_lengths = [lengths[number] for number in group]
        rows = plan_rows(group_lengths, "auto", cost, 0) or [[number] for number in range(len(group))]
        total += cost.of(len(rows), longest_row(rows, group_lengths))
    return total


def split_by_tokens(lengths: Sequence[int], num_images: Sequence[int], count: int) -> Groups:
    """`count` micro-batches of about equally many tokens, none of them empty.

    Each example, longest first, goes into the micro-batch with the fewest tokens. Pictures fill memory too: no
    micro-batch gets more of them than an equal share plus one example's.
    """
    max_images = -(-sum(num_images) // count) + max(num_images) - 1 if any(num_images) else 0
    groups: Groups = [[] for _ in range(count)]
    group_images = [0] * count
    fewest = [(0, group) for group in range(count)]  # a heap of (tokens, group)
    for number in sorted(range(len(lengths)), key=lambda number: (-lengths[number], number)):
        full = []
        while group_images[fewest[0][1]] + num_images[number] > max_images:
            full.append(heappop(fewest))
        tokens, group = fewest[0]
        groups[group].append(number)
        group_images[group] += num_images[number]
        heapreplace(fewest, (tokens + lengths[number], group))
        for entry in full:
            heappush(fewest, entry)
    return [sorted(group) for group in groups]


def split_by_length(lengths: Sequence[int], count: int) -> Groups:
    """`count` micro-batches of equally many examples of similar length, the longest first."""
    order = sorted(range(len(lengths)), key=lambda number: (-lengths[number], number))
    size = len(lengths) // count
    return [sorted(order[start : start + size]) for start in range(0, len(order), size)]


def packed_position_ids(rows: Sequence[Sequence[int]], width: int) -> Tensor:
    """Position ids [B, T] of rows of examples of these lengths, T = `width`.

    They restart at 0 in each example, and in the padding too, so that the padding belongs to no example.
    """
    ids = [torch.cat([torch.arange(length) for length in (*lengths, width - sum(lengths))]) for lengths in rows]
    return torch.stack(ids)
