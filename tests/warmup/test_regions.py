"""Where the parts of a picture are, and the loss on their words."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from mmllm.config import VisionConfig, WarmupVisionConfig
from mmllm.model.vision import load_tower
from mmllm.scenes.draw import draw
from mmllm.scenes.world import Line, Scene, sample_scene
from mmllm.warmup.regions import MAX_REGIONS, RegionWords, boxes_of, regions_of, words_of
from mmllm.warmup.vision import MAX_WORDS, WarmupVision
from tests.builders.tiny import make_language

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


def test_a_number_is_also_read_digit_by_digit() -> None:
    scene = Scene("text", lines=(Line("word", "sun", "red"), Line("number", "37", "blue")))
    halves = [((0, 0.5, 0.5, 1), "3"), ((0.5, 0.5, 1, 1), "7")]
    assert regions_of(scene) == [((0, 0, 1, 0.5), "word sun red"), ((0, 0.5, 1, 1), "number 37 blue"), *halves]
    one_digit = Scene("text", lines=(Line("number", "3", "blue"),))
    assert len(regions_of(one_digit)) == 1
    assert len(regions_of(sample_scene(random.Random(0), "train", "chart"))) <= MAX_REGIONS


def test_the_words_of_each_region_are_learnt_from_its_own_patches() -> None:
    torch.manual_seed(0)
    module = RegionWords(8, 6)
    maps = torch.randn(2, 8, 4, 4)
    maps[0, :, :2, :2] = 3 * torch.eye(8)[0][:, None, None]  # the top left quarter
    maps[0, :, 2:, 2:] = 3 * torch.eye(8)[1][:, None, None]
    boxes = torch.tensor([[[0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1]], [[-1.0] * 4, [-1.0] * 4]])
    words = torch.tensor([[[2, -1], [4, 5]], [[-1, -1], [-1, -1]]])
    optimizer = torch.optim.Adam(module.parameters(), 0.05)
    for _ in range(150):
        loss = module(maps, boxes, words)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() == pytest.approx(torch.tensor(2.0).log().item() / 2, abs=0.02), "one word, and two equal ones"
    elsewhere = maps.clone()
    elsewhere[1] += 5
    elsewhere[0, :, :2, 2:] -= 5
    assert module(elsewhere, boxes, words).item() == pytest.approx(loss.item(), abs=0.02)


def test_a_region_is_the_mean_of_what_it_covers() -> None:
    torch.manual_seed(0)
    module = RegionWords(3, 4)
    maps = torch.randn(1, 3, 2, 4)
    box, word = torch.tensor([[[0.25, 0.0, 0.625, 0.5]]]), torch.tensor([[[2]]])  # one column, and half of the next
    mean = (maps[0, :, 0, 1] * 2 + maps[0, :, 0, 2]) / 3
    wanted = nn.functional.cross_entropy(module.head(module.norm(mean)), torch.tensor(2))
    assert module(maps, box, word).item() == pytest.approx(wanted.item(), rel=1e-5)


VISION = {
    "vit": {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32},
    "resnet": {"layers": [1, 1, 1, 1], "width": 8, "head_width": 16, "image_size": 64},
    "timm": {"timm_model_name": "test_convnext", "timm_pool": "avg", "timm_proj": "linear", "image_size": 64},
}


def small_settings(folder: Path, out: Path, kind: str) -> dict[str, Any]:
    """Settings of a small warm-up from random weights, whose tokenizer is made in `folder`."""
    make_language(folder / "tokenizer")
    text_cfg = {
        "context_length": 60, "vocab_size": 400, "width": 16, "heads": 2, "layers": 1, "pool_type": "eos", "eos_id": 4,
    }  # fmt: skip
    return {
        "stage": "warmup_vision", "out": str(out), "tokenizer": str(folder / "tokenizer"),
        "clip": {"embed_dim": 16, "vision_cfg": VISION[kind], "text_cfg": text_cfg},
        "num_scenes": 6, "num_val_scenes": 50, "optim": {"learning_rates": {"vision": 1e-3}, "max_steps": 2},
        "compute": {"batch_size": 2},
    }  # fmt: skip


@pytest.mark.parametrize("kind", VISION)
def test_a_small_warm_up_sees_words_and_pairs(kind: str, tmp_path: Path) -> None:
    tree = small_settings(tmp_path, tmp_path / "out", kind)
    stage = WarmupVision(WarmupVisionConfig.model_validate(tree))
    stage.sampler(2)
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
    figures = stage.validate(1)
    assert 0 <= figures["retrieval_at_1_of_200"] <= 1
    (tmp_path / "out").mkdir(exist_ok=True)
    stage.save(tmp_path / "out", [figures])
    tower = load_tower(
        VisionConfig(source=f"local-dir:{tmp_path / 'out'}", feature_layer=-2, image_mode="stretch")
    ).eval()
    with torch.no_grad():
        seen = tower(batch["pixels"])
        maps = stage.model.eval().forward_intermediates(batch["pixels"], image_indices=2)["image_intermediates"][0]
    assert torch.allclose(seen, maps.flatten(2).transpose(1, 2), atol=0.05), "saved in bf16, and read again"


def test_a_warm_up_goes_on_from_a_trained_clip(tmp_path: Path) -> None:
    tree = small_settings(tmp_path, tmp_path / "first", "resnet")
    first = WarmupVision(WarmupVisionConfig.model_validate(tree))
    (tmp_path / "first").mkdir()
    first.save(tmp_path / "first", [first.validate(1)])
    tree |= {"clip": None, "tokenizer": None, "source": str(tmp_path / "first"), "shown": {"text": 1}, "seed": 3}
    second = WarmupVision(WarmupVisionConfig.model_validate(tree))
    assert second.tokenizer.get_vocab() == first.tokenizer.get_vocab()
    theirs = first.model.state_dict()
    for name, weight in second.model.state_dict().items():
        assert torch.equal(weight, theirs[name].to(torch.bfloat16).to(weight.dtype)), name
    words = second.tokenizer.batch_decode(second.pairs.texts[:, 0])
    assert all("word" in text or "number" in text for text in words), "nothing but writing is shown"
    (tmp_path / "second").mkdir()
    second.save(tmp_path / "second", [{}])
    configs = [(tmp_path / name / "open_clip_config.json").read_text() for name in ("first", "second")]
    assert configs[0] == configs[1]
    for wrong in ({"source": None}, {"tokenizer": str(tmp_path / "tokenizer")}):
        with pytest.raises(ValidationError, match="give source, or clip and tokenizer"):
            WarmupVisionConfig.model_validate(tree | wrong)


def test_a_scene_of_another_kind_has_no_boxes() -> None:
    assert boxes_of(Scene("objects")) == []
