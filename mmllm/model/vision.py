"""The vision tower: any open_clip image encoder, read at one layer, as patch tokens without CLS.

A tower is described by a plain dict (`TowerSpec.to_json`) that is stored in the checkpoint, so that it is built
again without open_clip's registry, weights or network.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmllm.config import ConfigError, VisionConfig

LOCAL_DIR = "local-dir:"
INTERPOLATIONS = {"bicubic": 3, "bilinear": 2}  # open_clip's names -> PIL.Image.Resampling


@dataclass(frozen=True)
class TowerSpec:
    """What a tower is: open_clip's model config, the layer that is read, and the image transform of its training."""

    model_cfg: dict[str, Any]  # open_clip's model config: embed_dim, vision_cfg, quick_gelu, ...
    layer: int  # negative, counted from the last
    image_size_px: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    source: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> TowerSpec:
        return TowerSpec(**{**data, "mean": tuple(data["mean"]), "std": tuple(data["std"])})


class VisionTower(nn.Module):
    """open_clip's image encoder up to the layer that is read; layers behind it, and the head, do not exist.

    LLaVA reads the last layer but one, https://arxiv.org/abs/2304.08485
    """

    def __init__(self, spec: TowerSpec):
        super().__init__()
        from open_clip.model import _build_vision_tower

        self.spec = spec
        config = spec.model_cfg
        self.encoder: Any = _build_vision_tower(
            config["embed_dim"], config["vision_cfg"], config.get("quick_gelu", False)
        )
        num_layers = _num_layers(self.encoder)
        if not -num_layers <= spec.layer < 0:
            raise ConfigError(f"model.vision.layer: {spec.layer} is not a layer; this tower has -{num_layers} to -1")
        _prune(self.encoder, num_layers + spec.layer)
        self.num_patches, self.width = self._probe()

    @torch.no_grad()
    def _probe(self) -> tuple[int, int]:
        side = self.spec.image_size_px
        parameter = next(self.parameters())
        if parameter.is_meta:  # built without memory by from_pretrained: ask a copy that has some
            with torch.device("cpu"):
                twin = VisionTower(self.spec)
            return twin.num_patches, twin.width
        was_training = self.training
        self.eval()
        patches = self(torch.zeros(1, 3, side, side, dtype=parameter.dtype, device=parameter.device))
        self.train(was_training)
        return patches.shape[1], patches.shape[2]

    def forward(self, pixels: Tensor) -> Tensor:  # [N, C, H, W] -> [N, P, Dv]
        output = self.encoder.forward_intermediates(pixels, indices=1, stop_early=True, intermediates_only=True)
        maps: Tensor = output["image_intermediates"][0]  # [N, Dv, rows, columns]
        return maps.flatten(2).transpose(1, 2)


RESNET_STAGES = ("layer1", "layer2", "layer3", "layer4")  # of open_clip's ModifiedResNet, behind its stem


def _num_layers(encoder: Any) -> int:
    if hasattr(encoder, "transformer"):
        return len(encoder.transformer.resblocks)
    if hasattr(encoder, "trunk"):
        return len(encoder.trunk.feature_info)
    return 1 + len(RESNET_STAGES)


def _prune(encoder: Any, index: int) -> None:
    """Takes away what stands behind layer `index`: layers, norm, pooling and head. It would only be run and saved."""
    if hasattr(encoder, "transformer"):
        encoder.prune_intermediate_layers(indices=[index], prune_norm=True, prune_head=True)
        encoder.attn_pool = encoder.attn_pool_contrastive = None
    elif hasattr(encoder, "trunk"):  # a timm model
        if not hasattr(encoder.trunk, "prune_intermediate_layers"):
            raise ConfigError(f"model.vision.source: layers of timm's {type(encoder.trunk).__name__} cannot be read")
        encoder.trunk.prune_intermediate_layers(indices=[index], prune_norm=True, prune_head=True)
        encoder.head = nn.Identity()
    else:
        for name in RESNET_STAGES[index:]:
            setattr(encoder, name, nn.Identity())
        encoder.attnpool = nn.Identity()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.vision.source: cannot read {path}: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"model.vision.source: {path} must hold an open_clip config, got {type(data).__name__}")
    return data


def _model_cfg(source: str) -> dict[str, Any]:
    """open_clip's config of a registered name, a `local-dir:FOLDER` or a `FILE.json`."""
    import open_clip

    if source.startswith(LOCAL_DIR):
        folder = Path(source.removeprefix(LOCAL_DIR))
        if not folder.is_dir():
            raise ConfigError(f"model.vision.source: no folder {folder}")
        data = _read_json(folder / "open_clip_config.json")
    elif source.endswith(".json"):
        data = _read_json(Path(source))
    elif source.startswith("hf-hub:") or source in open_clip.list_models():
        data = open_clip.get_model_config(source)
    else:
        from difflib import get_close_matches

        near = get_close_matches(source, open_clip.list_models(), n=5, cutoff=0.4)
        raise ConfigError(
            f"model.vision.source: open_clip has no model {source!r}; near it: {', '.join(near) or 'nothing'}. "
            f"Also allowed: {LOCAL_DIR}FOLDER, FILE.json, hf-hub:ORG/NAME"
        )
    config: dict[str, Any] = data.get("model_cfg", data)
    if missing := {"embed_dim", "vision_cfg"} - set(config):
        raise ConfigError(
            f"model.vision.source: {source} lacks {', '.join(sorted(missing))}: no open_clip model config"
        )
    return config


def needs_quick_gelu(name: str, pretrained: str | None) -> bool:
    """Whether these weights were trained with QuickGELU, as all of OpenAI's; open_clip would build GELU and warn."""
    import open_clip

    known = open_clip.get_pretrained_cfg(name, pretrained) if pretrained else {}
    return bool(known.get("quick_gelu", False))


def load_tower(config: VisionConfig) -> VisionTower:
    """The pretrained tower of a run's settings. Raises ConfigError where it has no weights or no such layer."""
    import open_clip

    model_cfg = _model_cfg(config.source)
    is_local = config.source.startswith((LOCAL_DIR, "hf-hub:"))
    if not is_local and not config.pretrained:
        tags = open_clip.list_pretrained_tags_by_model(config.source) if not config.source.endswith(".json") else []
        raise ConfigError(
            f"model.vision.pretrained: {config.source} needs a weights file or one of open_clip's tags "
            f"({', '.join(tags) or 'none known'}); an untrained tower sees nothing"
        )
    name = config.source
    if name.endswith(".json"):
        open_clip.add_model_config(Path(name))
        name = Path(name).stem
    try:
        clip: Any = open_clip.create_model(
            name,
            pretrained=None if is_local else config.pretrained,
            require_pretrained=True,
            force_quick_gelu=needs_quick_gelu(name, config.pretrained),
        )
    except (RuntimeError, FileNotFoundError, OSError) as error:
        raise ConfigError(f"model.vision: cannot load {config.source}: {error}") from error
    model_cfg["quick_gelu"] = any(type(module).__name__ == "QuickGELU" for module in clip.visual.modules())
    preprocess = open_clip.get_model_preprocess_cfg(clip)
    size = preprocess["size"]
    spec = TowerSpec(
        model_cfg={key: value for key, value in model_cfg.items() if key != "text_cfg"},
        layer=config.layer,
        image_size_px=int(size[0] if isinstance(size, list | tuple) else size),
        mean=tuple(preprocess["mean"]),
        std=tuple(preprocess["std"]),
        interpolation=preprocess.get("interpolation", "bicubic"),
        source=config.source if not config.pretrained else f"{config.source} {config.pretrained}",
    )
    tower = VisionTower(spec)
    weights = clip.visual.state_dict()
    tower.encoder.load_state_dict({key: weights[key] for key in tower.encoder.state_dict()})
    return tower
