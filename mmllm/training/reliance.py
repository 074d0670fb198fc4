"""Whether a model looks at the picture: its loss with another example's picture, less that with its own.

`image_reliance` is in nats per supervised token. At 0 the pictures might as well be missing: the model answers from
the text alone, however well its loss falls.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from mmllm.batch import Example


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
