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


class RegionWords(nn.Module):
    """Predicts a region's words from the mean of its patches; used in training only.

    Shapes: patches [B, P, D] of a square grid, boxes [B, R, 4] (left < 0 where there is none), words [B, R, W] token
    ids (-1 where there is none) -> mean cross entropy over regions, in nats.
    """

    def __init__(self, width: int, vocab_size: int):
        super().__init__()
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocab_size)

    def forward(self, patches: Tensor, boxes: Tensor, words: Tensor) -> Tensor:
        side = int(patches.shape[1] ** 0.5)
        centers = (torch.arange(side, device=boxes.device) + 0.5) / side
        left, top, right, bottom = boxes[..., None].unbind(2)  # [B, R, 1] each
        across, down = (centers > left) & (centers < right), (centers > top) & (centers < bottom)
        inside = (down[..., :, None] & across[..., None, :]).flatten(2).float()  # [B, R, P]
        there = boxes[..., 0] >= 0
        inside = inside[there] / inside[there].sum(-1, keepdim=True)
        rows = torch.nonzero(there)[:, 0]
        means = torch.einsum("np,npd->nd", inside, patches.float()[rows])
        scores = functional.log_softmax(self.head(self.norm(means)).float(), -1)  # [N, V]
        targets = words[there]
        said = targets >= 0
        share = scores.gather(1, targets.clamp(min=0)) * said
        return -(share.sum(1) / said.sum(1)).mean()
