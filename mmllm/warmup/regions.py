"""A loss on words for regions of a picture, from which a small CLIP learns shapes and letters.

With the contrastive loss alone it uses color, size and place for thousands of steps, since these tell most pictures of
a batch apart. After learning visual features from words, https://arxiv.org/abs/1511.02251, applied to each region.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmllm.scenes.world import PLACES, Bar, Line, Scene, Thing

MAX_REGIONS = 5  # per scene
Box = tuple[float, float, float, float]  # left, top, right, bottom, as fractions of the picture


def words_of(part: Thing | Line | Bar) -> str:
    """The words that describe this part."""
    if isinstance(part, Thing):
        return f"{part.size} {part.color} {part.shape} {part.place}"
    if isinstance(part, Line):
        return f"{part.kind} {part.text} {part.color}"
    return f"{part.color} {part.value}"


def boxes_of(scene: Scene) -> list[Box]:
    """The box in which each part of the scene (`Scene.parts`) is drawn, without its jitter."""
    boxes: list[Box] = []
    for thing in scene.things:
        left, top = (half / 4 for half in PLACES[thing.place])
        boxes.append((left, top, left + 0.5, top + 0.5))
    for index in range(len(scene.lines)):
        top = 0.25 if len(scene.lines) == 1 else index / 2
        boxes.append((0, top, 1, top + 0.5))
    slot = 0.8 / len(scene.bars) if scene.bars else 0
    boxes += [(0.125 + slot * index, 0, 0.125 + slot * (index + 1), 1) for index in range(len(scene.bars))]
    return boxes


def regions_of(scene: Scene) -> list[tuple[Box, str]]:
    """(box, words) of every part, and of each half of a two-digit number, since 37 is not 73."""
    boxes = boxes_of(scene)
    regions = [(box, words_of(part)) for box, part in zip(boxes, scene.parts, strict=True)]
    for (left, top, right, bottom), line in zip(boxes, scene.lines, strict=False):
        if line.kind == "number" and len(line.text) == 2:
            middle = (left + right) / 2
            regions += [((left, top, middle, bottom), line.text[0]), ((middle, top, right, bottom), line.text[1])]
    return regions


def _overlap(start: Tensor, end: Tensor, count: int) -> Tensor:
    """The share of each interval [N] from `start` to `end` that is in each of `count` equal bins of 0-1: [N, count]."""
    edges = torch.arange(count + 1, device=start.device) / count
    overlap = torch.minimum(end[:, None], edges[1:]) - torch.maximum(start[:, None], edges[:-1])
    return overlap.clamp(min=0) / (end - start)[:, None]


class RegionWords(nn.Module):
    """Predicts a region's words from the mean of a layer's features there; used in training only.

    Shapes: maps [B, D, rows, columns], boxes [B, R, 4] (padding: left < 0), words [B, R, W] token ids (padding: -1) ->
    mean cross entropy over regions, in nats: [].
    """

    def __init__(self, width: int, vocab_size: int):
        super().__init__()
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocab_size)

    def forward(self, maps: Tensor, boxes: Tensor, words: Tensor) -> Tensor:
        has_box = boxes[..., 0] >= 0
        left, top, right, bottom = boxes[has_box].unbind(1)  # [N] each
        rows, columns = maps.shape[2:]
        weights = _overlap(top, bottom, rows)[:, :, None] * _overlap(left, right, columns)[:, None]
        means = torch.einsum("nyx,ndyx->nd", weights, maps.float()[torch.nonzero(has_box)[:, 0]])
        scores = functional.log_softmax(self.head(self.norm(means)).float(), -1)  # [N, V]
        targets = words[has_box]
        is_word = targets >= 0
        share = scores.gather(1, targets.clamp(min=0)) * is_word
        return -(share.sum(1) / is_word.sum(1)).mean()
