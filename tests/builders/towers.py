"""One small tower of each kind that open_clip and transformers build, with random weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers

from mmllm.model.tower import TowerSpec
from mmllm.model.vision import FusedTower, build_tower
from mmllm.model.vision_transformers import ENCODERS

SIDE_PX = 32
SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64, "patch_size": 8}
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "clip_vision_model": {**SMALL, "image_size": SIDE_PX},
    "siglip_vision_model": {**SMALL, "image_size": SIDE_PX},
    "siglip2_vision_model": {**SMALL, "num_patches": 16},
    "dinov2": {**SMALL, "image_size": SIDE_PX},
    "dinov2_with_registers": {**SMALL, "image_size": SIDE_PX, "num_register_tokens": 4},
    "dinov3_vit": {**SMALL, "image_size": SIDE_PX, "num_register_tokens": 4},
    "dinov3_convnext": {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "image_size": SIDE_PX},
}
TRANSFORMS = {"siglip_vision_model": "SiglipImageProcessor", "siglip2_vision_model": "Siglip2ImageProcessor"}


def encoder_of(model_type: str) -> Any:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **TRANSFORMERS[model_type])
    encoder = getattr(transformers, ENCODERS[model_type].model_class)(config).eval()
    for parameter in encoder.parameters():  # layer scales and tokens start so small that a mistake would not show
        torch.nn.init.normal_(parameter, std=0.3)
    return encoder


def folder_of(model_type: str, folder: Path) -> Path:
    encoder_of(model_type).save_pretrained(folder)
    transform = getattr(transformers, TRANSFORMS.get(model_type, "CLIPImageProcessor"))
    if "Siglip2" in transform.__name__:
        transform(patch_size=8, max_num_patches=16).save_pretrained(folder)
    else:
        side = {"height": SIDE_PX, "width": SIDE_PX}
        size = side if "Siglip" in transform.__name__ else {"shortest_edge": SIDE_PX}
        transform(size=size, crop_size=side, image_mean=[0.4, 0.5, 0.6], resample=3).save_pretrained(folder)
    return folder


# One config of each kind of encoder that open_clip builds.
OPEN_CLIP: dict[str, dict[str, Any]] = {
    "vit": {"layers": 3, "width": 16, "head_width": 8, "patch_size": 8, "image_size": 32},
    "vit without ln_pre, average pool": {
        "layers": 3, "width": 16, "head_width": 8, "patch_size": 16, "image_size": 32, "no_ln_pre": True,
        "pool_type": "avg", "final_ln_after_pool": True,
    },
    "vit with attentional pool": {
        "layers": 2, "width": 16, "head_width": 8, "patch_size": 8, "image_size": 32, "attentional_pool": True,
        "attn_pooler_heads": 2,
    },
    "resnet": {"layers": [1, 1, 1, 1], "width": 8, "image_size": 64},
    "timm": {"timm_model_name": "test_vit", "timm_pool": "avg", "timm_proj": "linear", "image_size": 32},
}  # fmt: skip


def spec_of(vision_cfg: dict[str, Any], layer: int) -> TowerSpec:
    config = {"embed_dim": 16, "vision_cfg": vision_cfg}
    side = int(vision_cfg["image_size"])
    return TowerSpec(config, layer, side, (0.5,) * 3, (0.5,) * 3, "bicubic", "a test")


def _transformers_spec(kind: str, layer: int | tuple[int, ...] = -1) -> TowerSpec:
    config = {"model_type": kind, **TRANSFORMERS[kind]}
    return TowerSpec(config, layer, SIDE_PX, (0.5,) * 3, (0.5,) * 3, "bicubic", "a test", "transformers")


def _fused() -> FusedTower:
    return FusedTower.join(build_tower(spec_of(OPEN_CLIP["vit"], -1)), build_tower(_transformers_spec("dinov2")))


TOWERS: dict[str, Any] = {
    **{f"open_clip {kind}": lambda cfg=cfg: build_tower(spec_of(cfg, -1)) for kind, cfg in OPEN_CLIP.items()
       if kind != "resnet"},
    **{f"transformers {kind}": lambda kind=kind: build_tower(_transformers_spec(kind)) for kind in TRANSFORMERS},
    "transformers, two layers read": lambda: build_tower(_transformers_spec("clip_vision_model", (-1, -2))),
    "open_clip, two layers read": lambda: build_tower(replace(spec_of(OPEN_CLIP["vit"], -1), layer=(-1, -3))),
    "fused": _fused,
}  # fmt: skip
