"""open_clip's image encoders: ViT, ModifiedResNet and every trunk of timm (SigLIP, EVA, ConvNeXt ...)."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from mmllm.config import ConfigError, TowerConfig
from mmllm.kernels.attention import use_self_attention
from mmllm.model.tower import LayeredTower, TowerSpec, concatenate

LOCAL_DIR = "local-dir:"
RESNET_STAGES = ("layer1", "layer2", "layer3", "layer4")  # of ModifiedResNet, after its stem


class OpenClipTower(LayeredTower):
    """One of open_clip's image encoders. `spec.model_cfg` is its model config: embed_dim, vision_cfg, quick_gelu ..."""

    def __init__(self, spec: TowerSpec):
        super().__init__(spec)
        from open_clip.model import _build_vision_tower

        config = spec.model_cfg
        self.encoder: Any = _build_vision_tower(
            config["embed_dim"], config["vision_cfg"], config.get("quick_gelu", False)
        )
        use_self_attention(self.encoder)
        _set_input_size(self.encoder, spec.image_size_px)
        self._read = self._indices(len(_layers(self.encoder)))
        _prune(self.encoder, max(self._read))
        self._probe()

    def blocks(self) -> list[nn.Module]:
        return _layers(self.encoder)

    def forward(self, pixels: Tensor, *, is_placed: bool = False) -> Tensor:  # [N, C, H, W] -> [N, P, Dv]
        if not is_placed and pixels.shape[2:] != (self.spec.image_size_px,) * 2:  # not the encoder's own size
            return functional_call(self, self._placed(pixels), (pixels,), {"is_placed": True})  # type: ignore[no-any-return]
        indices = sorted(set(self._read))
        output = self.encoder.forward_intermediates(pixels, indices=indices, stop_early=True, intermediates_only=True)
        maps = dict(zip(indices, output["image_intermediates"], strict=True))  # layer -> [N, Dv, rows, columns]
        return concatenate([maps[index].flatten(2).transpose(1, 2) for index in self._read])

    def _placed(self, pixels: Tensor) -> dict[str, Tensor]:
        """A ViT's position embeddings, resampled for pictures of this size, by parameter name; empty if it has none."""
        from timm.layers.pos_embed import resample_abs_pos_embed

        trunk = getattr(self.encoder, "trunk", None)
        name = "encoder.positional_embedding" if trunk is None else "encoder.trunk.pos_embed"
        positions = dict(self.named_parameters()).get(name)
        if positions is None or getattr(trunk, "dynamic_img_size", False):  # timm then resamples them itself
            return {}
        sizes: Any = self.encoder.patch_size if trunk is None else trunk.patch_embed.patch_size
        old_grid, new_grid = ([side // size for side, size in zip(px, sizes, strict=True)]
                    for px in ((self.spec.image_size_px,) * 2, pixels.shape[2:]))  # fmt: skip
        table = positions.view(1, -1, positions.shape[-1])
        resampled = resample_abs_pos_embed(
            table, new_size=new_grid, old_size=old_grid, num_prefix_tokens=table.shape[1] - old_grid[0] * old_grid[1]
        )
        return {name: resampled.view(-1, positions.shape[-1]) if positions.ndim == 2 else resampled}


def _set_input_size(encoder: Any, side: int) -> None:
    """Sets the picture size of a timm trunk, which timm builds for the size of its training, to `side` pixels."""
    if hasattr(encoder, "trunk") and hasattr(encoder.trunk, "set_input_size"):
        encoder.trunk.set_input_size(img_size=(side, side))
    patch_embed: Any = getattr(getattr(encoder, "trunk", None), "patch_embed", None)
    if hasattr(patch_embed, "strict_img_size"):
        # no size check: timm wants its own size or a multiple of the patch; SO400M/14 at 384 leaves 6 pixels over
        patch_embed.img_size = None


def _layers(encoder: Any) -> list[nn.Module]:
    """The layers that `forward_intermediates` counts and `_prune` has kept, in order."""
    if hasattr(encoder, "transformer"):
        return list(encoder.transformer.resblocks)
    if hasattr(encoder, "trunk"):
        modules = dict(encoder.trunk.named_modules())
        return [modules[row["module"]] for row in encoder.trunk.feature_info if row["module"] in modules]
    stages = [getattr(encoder, name) for name in RESNET_STAGES]
    return [encoder.act3, *(stage for stage in stages if not isinstance(stage, nn.Identity))]


def _prune(encoder: Any, last: int) -> None:
    """Removes what follows layer `last`: layers, norm, pooling and head. They would be run and saved for nothing."""
    if hasattr(encoder, "transformer"):
        encoder.prune_intermediate_layers(indices=[last], prune_norm=True, prune_head=True)
        encoder.attn_pool = encoder.attn_pool_contrastive = None
    elif hasattr(encoder, "trunk"):  # a timm model
        if not hasattr(encoder.trunk, "prune_intermediate_layers"):
            raise ConfigError(f"model.vision.source: layers of timm's {type(encoder.trunk).__name__} cannot be read")
        encoder.trunk.prune_intermediate_layers(indices=[last], prune_norm=True, prune_head=True)
        encoder.head = nn.Identity()
    else:
        for name in RESNET_STAGES[last:]:
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


def read_model_cfg(source: str) -> dict[str, Any]:
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
            f"model.vision.source: {source} lacks {', '.join(sorted(missing))}: not an open_clip model config"
        )
    return config


def needs_quick_gelu(name: str, pretrained: str | None) -> bool:
    """Whether these weights need QuickGELU, as all of OpenAI's do; open_clip would build GELU and only warn."""
    import open_clip

    pretrained_cfg = open_clip.get_pretrained_cfg(name, pretrained) if pretrained else {}
    return bool(pretrained_cfg.get("quick_gelu", False))


def load_open_clip_tower(config: TowerConfig) -> OpenClipTower:
    """The pretrained tower of these settings. Raises ConfigError where it has no weights or no such layer.

    Position embeddings are interpolated to `image_size_px` where the encoder was trained at another size.
    """
    import open_clip

    model_cfg = read_model_cfg(config.source)
    is_local = config.source.startswith((LOCAL_DIR, "hf-hub:"))
    if config.revision:
        raise ConfigError(
            f"model.vision.revision: open_clip reads no revisions ({config.source}@{config.revision}); download that "
            f"revision into a folder and give {LOCAL_DIR}FOLDER"
        )
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
            force_image_size=config.image_size_px,
        )
    except (RuntimeError, FileNotFoundError, OSError, ValueError) as error:
        raise ConfigError(f"model.vision: cannot load {config.source}: {error}") from error
    tower = OpenClipTower(_spec(config, model_cfg, clip))
    tower.load_encoder_weights(clip.visual.state_dict())
    return tower


def _spec(config: TowerConfig, model_cfg: dict[str, Any], clip: Any) -> TowerSpec:
    import open_clip

    preprocess = open_clip.get_model_preprocess_cfg(clip)
    size = preprocess["size"]
    side = config.image_size_px or int(size[0] if isinstance(size, list | tuple) else size)
    tower_cfg = copy.deepcopy({key: value for key, value in model_cfg.items() if key != "text_cfg"})
    tower_cfg["quick_gelu"] = any(type(module).__name__ == "QuickGELU" for module in clip.visual.modules())
    tower_cfg["vision_cfg"]["image_size"] = side
    return TowerSpec(
        model_cfg=tower_cfg,
        layer=config.feature_layer,
        image_size_px=side,
        mean=tuple(preprocess["mean"]),
        std=tuple(preprocess["std"]),
        interpolation=preprocess.get("interpolation", "bicubic"),
        source=config.source if not config.pretrained else f"{config.source} {config.pretrained}",
    )
