"""Where the parts of a picture are, the loss on their words, and patches that start out white."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import make_language
from torch import nn

from mmllm.config import WarmupVisionConfig
from mmllm.scenes.draw import draw
from mmllm.scenes.world import Scene, sample_scene
from mmllm.training.regions import MAX_REGIONS, RegionWords, boxes_of, words_of
from mmllm.training.warmup_vision import MAX_WORDS, WarmupVision, init_patches

SIDE = 64


@pytest.mark.parametrize("kind", ["objects", "text", "chart"])
def test_a_part_is_drawn_in_its_box(kind: Any) -> None:
    """The picture without the part differs from the one with it inside the box, and hardly anywhere else."""
    rng = random.Random(kind)
    inside, everywhere = 0.0, 0.0
    for number in range(30):
        scene = sample_scene(rng, "train", kind)
        assert len(boxes_of(scene)) == len(scene.parts) <= MAX_REGIONS
        picture = draw(scene, random.Random(number)).resize((SIDE, SIDE))
        colors = np.asarray(picture, np.float32)
        background = np.median(colors.reshape(-1, 3), axis=0)
        drawn = np.abs(colors - background).max(-1) > 60
        covered = np.zeros((SIDE, SIDE), bool)
        for left, top, right, bottom in boxes_of(scene):
            part = np.zeros_like(covered)
            part[round(top * SIDE) : round(bottom * SIDE), round(left * SIDE) : round(right * SIDE)] = True
            assert drawn[part].any() or kind == "chart"
            covered |= part
        inside += drawn[covered].sum()
        everywhere += drawn.sum()
    assert inside / everywhere > 0.9


def test_words_say_what_a_part_is() -> None:
    rng = random.Random(0)
    for _ in range(50):
        scene = sample_scene(rng, "train")
        for part in scene.parts:
            assert set(words_of(part).split()) == {word for value in vars(part).values() for word in str(value).split()}


def test_the_words_of_each_region_are_learnt_from_its_own_patches() -> None:
    torch.manual_seed(0)
    module = RegionWords(8, 6)
    patches = torch.randn(2, 16, 8)
    patches[0].view(4, 4, 8)[:2, :2] = 3 * torch.eye(8)[0]  # the top left quarter
    patches[0].view(4, 4, 8)[2:, 2:] = 3 * torch.eye(8)[1]
    boxes = torch.tensor([[[0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1]], [[-1.0] * 4, [-1.0] * 4]])
    words = torch.tensor([[[2, -1], [4, 5]], [[-1, -1], [-1, -1]]])
    optimizer = torch.optim.Adam(module.parameters(), 0.05)
    for _ in range(150):
        loss = module(patches, boxes, words)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() == pytest.approx(torch.tensor(2.0).log().item() / 2, abs=0.02), "one word, and two equal ones"
    elsewhere = patches.clone()
    elsewhere[1] += 5
    elsewhere[0].view(4, 4, 8)[:2, 2:] -= 5
    assert module(elsewhere, boxes, words).item() == pytest.approx(loss.item(), abs=0.02)


def test_patches_start_out_white() -> None:
    torch.manual_seed(0)
    rng = random.Random(0)
    pictures = [draw(sample_scene(rng, "train"), rng).resize((SIDE, SIDE)) for _ in range(60)]
    pixels = torch.stack([torch.from_numpy(np.array(p)) for p in pictures]).permute(0, 3, 1, 2).float() / 255
    conv = nn.Conv2d(3, 32, 8, 8, bias=False)
    spread = [conv(pixels).transpose(0, 1).flatten(1).cov().diagonal()]
    init_patches(conv, pixels)
    values = conv(pixels).transpose(0, 1).flatten(1).cov()
    spread.append(values.diagonal())
    assert spread[1].max() / spread[1].min() < 30 < spread[0].max() / spread[0].min() or spread[1].max() < 1.1
    off = values - torch.diag(values.diagonal())
    assert off.abs().max() < 0.05


def test_a_small_warm_up_sees_words_and_pairs(tmp_path: Path) -> None:
    make_language(tmp_path / "tokenizer")
    tree = {
        "stage": "warmup_vision", "out": str(tmp_path / "out"), "tokenizer": str(tmp_path / "tokenizer"),
        "clip": {
            "embed_dim": 16,
            "vision_cfg": {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32},
            "text_cfg": {
                "context_length": 60, "vocab_size": 400, "width": 16, "heads": 2, "layers": 1, "pool_type": "eos",
                "eos_id": 4,
            },
        },
        "lessons": [{"steps": 2, "num_scenes": 6}], "num_val_scenes": 50,
        "optim": {"learning_rates": {"vision": 1e-3}, "max_steps": 2, "batch_size": 2},
    }  # fmt: skip
    stage = WarmupVision(WarmupVisionConfig.model_validate(tree))
    stage.order(2)
    batch = stage.batch([0, 1])
    there = batch["boxes"][..., 0] >= 0
    assert ((batch["words"] >= 0).sum(-1)[there] > 1).all()
    assert (batch["words"][~there] == -1).all()
    assert batch["words"].shape[1:] == (MAX_REGIONS, MAX_WORDS)
    with_words = stage.module(batch).item()
    stage.module.words_weight = 0.0
    assert 0 < stage.module(batch).item() < with_words
    ends = (batch["texts"] == stage.tokenizer.eos_token_id).sum(-1)
    assert (ends == 1).all(), "the text tower reads the caption where it ends"
    assert 0 <= stage.validate(1)["retrieval_at_1_of_200"] <= 1


def test_a_scene_of_another_kind_has_no_boxes() -> None:
    assert boxes_of(Scene("objects")) == []
