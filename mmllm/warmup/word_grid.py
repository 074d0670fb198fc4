"""Scenes shown to a small LM without a picture: a grid of tokens that are mixtures of words, as an image's are.

After `word_start` an image token lies between the embeddings of a few words: of one or two facts of what is drawn
there, in no fixed order, and of words that mean nothing. An LM that has learnt to read such grids needs few steps to
read a picture's tokens. After training a decoder on noisy embeddings of texts alone, https://arxiv.org/abs/2211.00575.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from mmllm.scenes.world import Bar, Line, Scene, Thing
from mmllm.warmup.regions import boxes_of

SIDE = 4  # tokens along a side of the grid; the small CLIP gives as many
NUM_CELLS = SIDE * SIDE
MAX_WORDS = 20  # tokens mixed in a cell at most
NAMES_PLACES = 0.5  # of scenes, where words tell the place too
TOGETHER = 0.5  # of scenes, where all facts of a thing stand in the same cell
IN_ITS_CELL = 0.95  # of facts; the others stand in another cell of their thing
TWICE = 0.3  # of kinds of fact in a scene, each in a second cell too
FILLERS = (" in", " at", " is", " a", " the", " of", " chart", " bar")

Ids = Callable[[str], Sequence[int]]


def _facts(part: Thing | Line | Bar, *, names_place: bool) -> list[tuple[str, str]]:
    """(kind of fact, its words) of a part of a scene."""
    if isinstance(part, Thing):
        facts = [("color", part.color), ("shape", part.shape), ("size", part.size)]
        return [*facts, ("place", part.place)] if names_place else facts
    if isinstance(part, Line):
        return [("kind", part.kind), ("text", part.text), ("color", part.color)]
    return [("color", part.color), ("value", str(part.value))]


def _span(start: float, end: float) -> list[int]:
    """The rows or columns that a box reaches, from `start` to `end` as fractions: those most of which it covers.

    A bar may cover most of none; then the one that it covers most of.
    """
    shares = [max(0.0, min(SIDE * end, place + 1) - max(SIDE * start, place)) for place in range(SIDE)]
    return [place for place in range(SIDE) if shares[place] > 0.99] or [shares.index(max(shares))]


def word_grid(scene: Scene, rng: random.Random, ids_of: Ids, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """The words of each cell, as token ids [NUM_CELLS, MAX_WORDS], and their weights; a cell's sum to its norm.

    A kind of fact, such as the color, mostly stands in the same cell of each thing of a scene; in which differs from
    scene to scene. Every fact is in the grid, and its place follows from where its cell is.
    """
    words: dict[int, list[tuple[int, float]]] = defaultdict(list)
    names_place = rng.random() < NAMES_PLACES
    # {kind of fact: which of the cells of a thing have it, as fractions of its height and width}
    usual: dict[str, list[tuple[float, float]]] = defaultdict(
        lambda: [(rng.random(), rng.random()) for _ in range(2 if rng.random() < TWICE else 1)]
    )
    is_together = rng.random() < TOGETHER
    for part, (left, top, right, bottom) in zip(scene.parts, boxes_of(scene), strict=True):
        rows, columns = _span(top, bottom), _span(left, right)
        for kind, text in _facts(part, names_place=names_place):
            tokens = ids_of(f" {text}")
            for number, token in enumerate(tokens):
                sides = columns
                if text.isdigit() and len(tokens) == 2:  # 37 is not 73
                    sides = columns[: SIDE // 2] if number == 0 else columns[SIDE // 2 :]
                for y, x in usual["all" if is_together else kind]:
                    if rng.random() > IN_ITS_CELL:
                        y, x = rng.random(), rng.random()
                    cell = rows[int(y * len(rows))] * SIDE + sides[int(x * len(sides))]
                    words[cell].append((token, rng.uniform(0.5, 1.0)))
    ids, weights = np.zeros((NUM_CELLS, MAX_WORDS), np.int32), np.zeros((NUM_CELLS, MAX_WORDS), np.float32)
    for cell in range(NUM_CELLS):
        mixed = words[cell]
        mixed += [(rng.randrange(vocab_size), rng.uniform(0.0, 0.5)) for _ in range(2)]
        mixed.append((ids_of(rng.choice(FILLERS))[0], rng.uniform(0.0, 0.6)))
        total = sum(weight for _, weight in mixed) / rng.uniform(0.5, 1.1)
        ids[cell, : len(mixed)] = [token for token, _ in mixed]
        weights[cell, : len(mixed)] = [weight / total for _, weight in mixed]
    return ids, weights


def grid_tokens(embeddings: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """The mixtures of the rows of `embeddings` [V, D] for cells of `word_grid`, ids and weights [N, MAX_WORDS]: [N, D].

    The norm of each is the sum of its weights times the average norm of an embedding.
    """
    mixtures = torch.einsum("nwd,nw->nd", embeddings[ids], weights.to(embeddings.dtype))
    norms = weights.sum(-1, keepdim=True) * embeddings.norm(dim=-1).mean()
    tokens: Tensor = functional.normalize(mixtures, dim=-1) * norms.to(embeddings.dtype)
    return tokens
