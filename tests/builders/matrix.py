"""Small runs of any combination of the compatibility matrix: real classes, random weights, two steps."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from mmllm.compatibility import AXES
from tests.builders.tiny import CLIP, PREPROCESS, SIDE_PX
from tests.builders.tiny_backbones import make_backbone_parts
from tests.builders.tiny_runs import write_settings
from tests.builders.towers import OPEN_CLIP, folder_of

OPEN_CLIP_KINDS = {
    "open_clip ViT": {**CLIP["vision_cfg"]},
    "timm ViT": OPEN_CLIP["timm"] | {"image_size": 160},  # the size of timm's model; the run's is smaller
    "timm ConvNeXt": {"timm_model_name": "test_convnext", "timm_pool": "avg", "timm_proj": "linear", "image_size": 64},
}
TRANSFORMERS_KINDS = {
    "CLIP": "clip_vision_model", "SigLIP": "siglip_vision_model", "SigLIP 2": "siglip2_vision_model",
    "DINOv2": "dinov2",
}  # fmt: skip
PROJECTOR_OPTIONS: dict[str, dict[str, Any]] = {
    "downsample": {"factor": 2}, "resampler": {"num_queries": 4, "depth": 1, "num_heads": 2},
    "c_abstractor": {"depth": 1},
}  # fmt: skip
TRAINED = {"projector": ["projector"], "all parts": ["vision", "projector", "language"]}
LORA = {"rank": 2, "alpha": 4}


def make_open_clip(folder: Path, vision_cfg: Mapping[str, Any]) -> Path:
    """A folder that `local-dir:` reads, of any encoder that open_clip builds."""
    import open_clip
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    config = {**CLIP, "vision_cfg": dict(vision_cfg)}
    preprocess = {**PREPROCESS, "size": vision_cfg["image_size"], "resize_mode": "squash"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    model = open_clip.create_model(f"local-dir:{folder}", pretrained=None, load_weights=False)
    weights = {name: value.contiguous().clone() for name, value in model.state_dict().items()}
    save_file(weights, str(folder / "open_clip_model.safetensors"))
    return folder


def encoder_settings(kind: str, folder: Path) -> dict[str, Any]:
    """`model.vision` of this value of the axis, its files in `folder`."""
    path = folder / kind.replace(" ", "_")
    if kind in OPEN_CLIP_KINDS:
        if not path.is_dir():
            make_open_clip(path, OPEN_CLIP_KINDS[kind])
        smaller = {"image_size_px": SIDE_PX} if kind == "timm ViT" else {}
        return {"source": f"local-dir:{path}", "feature_layer": -1, **smaller}
    if kind in TRANSFORMERS_KINDS:
        if not path.is_dir():
            folder_of(TRANSFORMERS_KINDS[kind], path)
        return {"source": f"transformers:{path}", "feature_layer": -1}
    if kind == "two encoders":
        return {**encoder_settings("open_clip ViT", folder), "fuse_with": encoder_settings("DINOv2", folder)}
    return {"source": "patches:8", "image_size_px": SIDE_PX}


def combination(choices: Mapping[str, str], folder: Path, parts: Path, data: Path) -> Path:
    """The YAML of two steps with these choices; for axes that are not named, with the first value. Files are shared."""
    chosen = {axis: choices.get(axis, values[0]) for axis, values in AXES.items()}
    backbone = folder / chosen["llm"]
    if not (backbone / "language").is_dir():
        make_backbone_parts(backbone, chosen["llm"], parts)
    trains = chosen["trains"]
    train = TRAINED.get(trains, ["projector", "language"])
    path = folder / f"{'-'.join(chosen.values()).replace(' ', '_')}.yaml"
    write_settings(path, parts, data, train=("projector",))
    values = yaml.safe_load(path.read_text())
    values["model"]["vision"] = {**encoder_settings(chosen["encoder"], folder), "image_mode": chosen["image mode"]}
    values["model"]["projector"] = {"kind": chosen["projector"],
                                    "options": PROJECTOR_OPTIONS.get(chosen["projector"], {})}  # fmt: skip
    values["model"]["language"]["source"] = str(backbone / "language")
    if "LoRA" in trains:
        quantise = trains.partition("LoRA ")[2]
        values["lora"] = {**LORA, **({"quantise": quantise} if quantise else {})}
    values["train"] = train
    values["data"]["packing"] = chosen["packing"]
    values["optim"] |= {"max_steps": 2, "learning_rates": dict.fromkeys(train, 0.01)}
    values["validation"] = {"num_samples": 0}
    path.write_text(yaml.safe_dump(values))
    return path
