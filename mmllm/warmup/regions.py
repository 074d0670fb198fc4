"""Words for regions of a picture: what a small CLIP learns shapes and letters from, beside its contrastive loss.

A contrastive loss alone is content with color, size and place for thousands of steps, since these tell most pictures
of a batch apart. After learning visual features from words, https://arxiv.org/abs/1511.02251, region by region.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmllm.scenes.world import PLACES, Bar, Line, Scene, Thing

MAX_REGIONS = 5  # of one scene
Box = tuple[float, float, float, float]  # left, top, right, bottom, in shares of the picture


def words_of(part: Thing | Line | Bar) -> str:
    """The words that say what this part is."""
    if isinstance(part, Thing):
        return f"{part.size} {part.color} {part.shape} {part.place}"
    if isinstance(part, Line):
        return f"{part.kind} {part.text} {part.color}"
    return f"{part.color} {part.value}"


def boxes_of(scene: Scene) -> list[Box]:
    """Where each part of the scene (`Scene.parts`) is drawn, give or take its jitter."""
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
    """Box and words of every part; of a number with two digits also its halves, since 37 is not 73."""
    boxes = boxes_of(scene)
    regions = [(box, words_of(part)) for box, part in zip(boxes, scene.parts, strict=True)]
    for (left, top, right, bottom), line in zip(boxes, scene.lines, strict=False):
        if line.kind == "number" and len(line.text) == 2:
            middle = (left + right) / 2
            regions += [((left, top, middle, bottom), line.text[0]), ((middle, top, right, bottom), line.text[1])]
    return regions


def _overlap(start: Tensor, end: Tensor, count: int) -> Tensor:
    """What share of each stretch [N] from `start` to `end` lies in each of `count` equal parts of 0-1: [N, count]."""
    edges = torch.arange(count + 1, device=start.device) / count
    overlap = torch.minimum(end[:, None], edges[1:]) - torch.maximum(start[:, None], edges[:-1])
    return overlap.clamp(min=0) / (end - start)[:, None]


class RegionWords(nn.Module):
    """Predicts a region's words from the mean of what a layer sees there; used in training only.

    Shapes: maps [B, D, rows, columns], boxes [B, R, 4] (left < 0 where there is none), words [B, R, W] token ids (-1
    where there is none) -> mean cross entropy over regions, in nats.
    """

    def __init__(self, width: int, vocab_size: int):
        super().__init__()
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocab_size)

    def forward(self, maps: Tensor, boxes: Tensor, words: Tensor) -> Tensor:
        there = boxes[..., 0] >= 0
        left, top, right, bottom = boxes[there].unbind(1)  # [N] each
        rows, columns = maps.shape[2:]
        weights = _overlap(top, bottom, rows)[:, :, None] * _overlap(left, right, columns)[:, None]
        means = torch.einsum("nyx,ndyx->nd", weights, maps.float()[torch.nonzero(there)[:, 0]])
        scores = functional.log_softmax(self.head(self.norm(means)).float(), -1)  # [N, V]
        targets = words[there]
        said = targets >= 0
        share = scores.gather(1, targets.clamp(min=0)) * said
        return -(share.sum(1) / said.sum(1)).mean()
