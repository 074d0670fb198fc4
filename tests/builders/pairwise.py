"""Pairwise testing: few combinations of choices that together hold every pair of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence, Set

Choices = dict[str, str]  # {axis: value}


def covering_combinations(
    axes: Mapping[str, Sequence[str]], is_refused: Callable[[Choices], bool] = lambda choices: False
) -> list[Choices]:
    """Few combinations that together hold every pair of values that is not refused, none of which is refused.

    Greedy: each begins with a pair that none holds yet, and takes the values that hold the most new pairs with it. The
    values of the first axis are in the fewest combinations.
    """
    pairs = [
        {one: first, other: second}
        for one, other in itertools.combinations(axes, 2)
        for first in axes[one]
        for second in axes[other]
    ]
    left = {frozenset(pair.items()) for pair in pairs if not is_refused(pair)}
    combinations: list[Choices] = []
    for pair in pairs:
        if frozenset(pair.items()) not in left:
            continue
        chosen = dict(pair)
        for axis in [axis for axis in axes if axis not in pair]:
            allowed = [value for value in axes[axis] if not is_refused({**chosen, axis: value})]
            chosen[axis] = max(allowed, key=lambda value, axis=axis: _num_new(axis, value, chosen, left))  # type: ignore[misc]
        chosen = {axis: chosen[axis] for axis in axes}
        left -= {frozenset(pair) for pair in itertools.combinations(chosen.items(), 2)}
        combinations.append(chosen)
    return combinations


def _num_new(axis: str, value: str, chosen: Choices, left: Set[frozenset[tuple[str, str]]]) -> int:
    return sum(frozenset([(axis, value), other]) in left for other in chosen.items())
