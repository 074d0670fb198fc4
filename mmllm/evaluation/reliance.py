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


def exchange_partners(pictures: Sequence[tuple[Any, ...]], seed: int) -> list[tuple[tuple[Any, ...], tuple[Any, ...]]]:
    """(pictures, other pictures) for each distinct entry: its partner is an entry with the same number of pictures.

    Entries without a partner are left out. The pairs are a derangement, which depends on the seed alone.
    """
    groups: dict[int, list[tuple[Any, ...]]] = defaultdict(list)
    for entry in pictures:
        if entry not in groups[len(entry)]:
            groups[len(entry)].append(entry)
    rng = random.Random(seed)
    exchanges: list[tuple[tuple[Any, ...], tuple[Any, ...]]] = []
    for _, group in sorted(groups.items()):
        rng.shuffle(group)
        if len(group) > 1:
            exchanges += zip(group, group[1:] + group[:1], strict=True)
    return exchanges


def exchange_pictures(
    examples: Sequence[Example], seed: int, fits: Callable[[Example], bool] = lambda example: True
) -> dict[int, Example]:
    """`{index: the example with another example's pictures}`, by `exchange_partners`.

    Pictures are exchanged among examples with the same number of them, and never for equal pictures. Examples without
    pictures or without a partner are left out, and those that are too long with the other pictures.
    """
    exchanges = exchange_partners([example.images for example in examples if example.images], seed)
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
        right_losses: each example's loss with its own pictures, summed over its supervised tokens.
        other_losses: the same with another example's pictures.
        num_tokens: the number of supervised tokens of each example.

    The standard error is that of a ratio of two means over examples, because tokens of one example are not independent.
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
