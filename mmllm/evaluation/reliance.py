"""Whether a model uses the picture: its loss with another example's picture minus its loss with the right one.

`image_reliance` is in nats per supervised token. At 0 the pictures make no difference: the model answers from the text
alone, however low its loss is.
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
MIN_EXAMPLES = 8  # with fewer no standard error is given: it would say little


def exchange_pictures(
    examples: Sequence[Example], seed: int, fits: Callable[[Example], bool] = lambda example: True
) -> dict[int, Example]:
    """`{index: the example with another example's pictures}`: a derangement, the same for the same seed.

    Pictures are exchanged among examples with the same number of them, and never for equal pictures. Left out are
    examples without pictures, those that have no partner, and those that do not fit with the other pictures, which may
    take more tokens.
    """
    groups: dict[int, list[tuple[Any, ...]]] = defaultdict(list)
    for example in examples:
        if example.images and example.images not in groups[len(example.images)]:
            groups[len(example.images)].append(example.images)
    rng = random.Random(seed)
    exchanges: list[tuple[tuple[Any, ...], tuple[Any, ...]]] = []  # (right pictures, other pictures)
    for _, pictures in sorted(groups.items()):
        rng.shuffle(pictures)
        if len(pictures) > 1:
            exchanges += zip(pictures, pictures[1:] + pictures[:1], strict=True)
    exchanged = {}
    for index, example in enumerate(examples):
        other = next((other for right, other in exchanges if right == example.images), None)
        if other is not None and fits(candidate := replace(example, images=other)):
            exchanged[index] = candidate
    return exchanged


def reliance_of(
    right_losses: Sequence[float], other_losses: Sequence[float], num_tokens: Sequence[int]
) -> dict[str, float]:
    """Image reliance and its standard error.

    Args:
        right_losses: of each example the loss with its own pictures, summed over its supervised tokens.
        other_losses: the same with another example's pictures.
        num_tokens: the number of supervised tokens of each example.

    The standard error is that of a ratio of two means over examples, since tokens of one example are not independent.
    """
    total = max(1, sum(num_tokens))
    reliance = (sum(other_losses) - sum(right_losses)) / total
    metrics = {RELIANCE: reliance}
    if (number := len(num_tokens)) >= MIN_EXAMPLES:
        triples = zip(right_losses, other_losses, num_tokens, strict=True)
        residuals = [other - right - reliance * count for right, other, count in triples]
        sum_of_squares = sum(residual * residual for residual in residuals)
        metrics[RELIANCE_ERROR] = math.sqrt(number / (number - 1) * sum_of_squares) / total
    return metrics
