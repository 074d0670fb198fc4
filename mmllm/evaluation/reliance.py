"""Whether a model looks at the picture: its loss with another example's picture, less that with its own.

`image_reliance` is in nats per supervised token. At 0 the pictures might as well be missing: the model answers from
the text alone, however well its loss falls.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from mmllm.batch import Example

RELIANCE, RELIANCE_ERROR = "image_reliance", "image_reliance_error"
MIN_EXAMPLES = 8  # with fewer a standard error says little, and none is given


def exchange_pictures(
    examples: Sequence[Example], seed: int, fits: Callable[[Example], bool] = lambda example: True
) -> dict[int, Example]:
    """`{index: the example with the pictures of another}`: a derangement, the same for the same seed.

    Pictures go round among examples with as many of them, so that no example gets its own, nor the same pictures that
    another example has too. One without pictures, one that nobody can exchange with, and one that would not fit with
    the other's pictures (whose tokens may be more) is left out.
    """
    groups: dict[int, list[tuple[Any, ...]]] = defaultdict(list)
    for example in examples:
        if example.images and example.images not in groups[len(example.images)]:
            groups[len(example.images)].append(example.images)
    rng = random.Random(seed)
    others: list[tuple[tuple[Any, ...], tuple[Any, ...]]] = []
    for _, pictures in sorted(groups.items()):
        rng.shuffle(pictures)
        if len(pictures) > 1:
            others += zip(pictures, pictures[1:] + pictures[:1], strict=True)
    exchanged = {}
    for index, example in enumerate(examples):
        other = next((other for own, other in others if own == example.images), None)
        if other is not None and fits(shown := replace(example, images=other)):
            exchanged[index] = shown
    return exchanged


def reliance_of(own: Sequence[float], others: Sequence[float], counts: Sequence[int]) -> dict[str, float]:
    """Image reliance and its standard error, from the losses of each example summed over its `counts` tokens.

    `own` are those with its own pictures, `others` those with another example's. The error is that of a ratio of two
    means over examples: the tokens of one example are not independent of each other.
    """
    total = max(1, sum(counts))
    reliance = (sum(others) - sum(own)) / total
    found = {RELIANCE: reliance}
    if (number := len(counts)) >= MIN_EXAMPLES:
        rests = [other - one - reliance * count for one, other, count in zip(own, others, counts, strict=True)]
        found[RELIANCE_ERROR] = math.sqrt(number / (number - 1) * sum(rest * rest for rest in rests)) / total
    return found
