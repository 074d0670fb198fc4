"""Every name that open_clip registers as a small tower: its architecture, few layers, narrow, on a small picture."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator
from typing import Any

import open_clip
import timm
from timm.models.vitamin import VitCfg, VitConvCfg

from mmllm.model.tower import TowerSpec

_SMALL_STEM = VitCfg((8, 16, 32), (1, 1, 1), 8, VitConvCfg(norm_layer="layernorm2d", norm_eps=1e-6), "1d")
# What makes a small model of each of timm's entry points; names begin with these, the first that fits counts.
SMALL_TRUNKS: dict[str, dict[str, Any]] = {
    "eva": {"depth": 2, "embed_dim": 32, "num_heads": 2},
    "vit_pe_core": {"depth": 2, "embed_dim": 32, "num_heads": 2},
    "vit_relpos": {"depth": 2, "embed_dim": 32, "num_heads": 2},
    "vitamin": {"depth": 2, "embed_dim": 32, "num_heads": 2, "embed_cfg": _SMALL_STEM},
    "vit_base_mci": {"depth": 2},  # its stem of convolutions decides the width
    "vit": {"depth": 2, "embed_dim": 32, "num_heads": 2},
    "convnext": {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)},
    "fastvit": {"layers": (1, 1, 1, 1, 1), "embed_dims": (8, 16, 32, 64, 64)},
    "swin": {"depths": (2, 2), "num_heads": (1, 2), "embed_dim": 16},
}
STAGES_OF_FASTVIT = {"fastvit_mci3": 5, "fastvit_mci4": 5}


def small_config(name: str) -> dict[str, Any]:
    """open_clip's config of a name, without its text side and small."""
    config = copy.deepcopy(open_clip.get_model_config(name))
    vision = config["vision_cfg"]
    kept = {"embed_dim": 32, "quick_gelu": config.get("quick_gelu", False), "vision_cfg": vision}
    if "timm_model_name" in vision:
        patch = 14 if "14" in vision["timm_model_name"] else 16
        is_vit = vision["timm_model_name"].startswith(("vit_", "eva", "test_vit"))
        is_whole = vision["image_size"] % patch == 0
        vision["image_size"] = (2 * patch if is_whole else 2 * patch + 6) if is_vit else 112
        if not is_vit and not vision["timm_model_name"].startswith("swin"):
            vision["image_size"] = 64
    elif isinstance(vision["layers"], list):
        vision |= {"layers": [1, 1, 1, 1], "width": 8, "image_size": 64}
    else:
        vision |= {"layers": 2, "width": 32, "head_width": 16, "image_size": 2 * vision["patch_size"], "mlp_ratio": 2.0}
        vision |= {"attn_pooler_heads": 2} if vision.get("attentional_pool") else {}
    return kept


def small_towers() -> dict[str, tuple[TowerSpec, list[str]]]:
    """The first name of each small architecture -> its spec, and all names that are of it."""
    found: dict[str, tuple[TowerSpec, list[str]]] = {}
    by_config: dict[str, str] = {}
    for name in open_clip.list_models():
        config = small_config(name)
        first = by_config.setdefault(json.dumps(config, sort_keys=True), name)
        side = int(config["vision_cfg"]["image_size"])
        spec = TowerSpec(config, -1, side, (0.5,) * 3, (0.5,) * 3, "bicubic", name)
        found.setdefault(first, (spec, []))[1].append(name)
    return found


@contextlib.contextmanager
def small_trunks() -> Iterator[None]:
    """Inside, timm makes small models of these names: open_clip's configs have no words for depth and width."""
    create = timm.create_model

    def create_small(model_name: str, **options: Any) -> Any:
        small = next(values for start, values in SMALL_TRUNKS.items() if model_name.startswith(start))
        if model_name.startswith("fastvit"):
            stages = STAGES_OF_FASTVIT.get(model_name, 4)
            small = {key: values[:stages] for key, values in small.items()}
        return create(model_name, **options, **small)

    timm.create_model = create_small
    try:
        yield
    finally:
        timm.create_model = create
