"""transformers' image encoders: CLIP, SigLIP, SigLIP 2 and DINO v2 and v3, from a folder or a hub name."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmllm.backbone_files.hub import check_source, quiet_transformers
from mmllm.config import ConfigError, TowerConfig
from mmllm.model.tower import LayeredTower, TowerSpec, concatenate

TRANSFORMERS = "transformers:"
RESAMPLINGS = {2: "bilinear", 3: "bicubic"}  # PIL.Image.Resampling -> open_clip's names


_FIXED_POSITIONS = ("clip_vision_model", "siglip_vision_model")  # interpolated only on request


@dataclass(frozen=True)
class Encoder:
    """How to build one of transformers' encoders: its class, and the paths of its layers and its final norm."""

    model_class: str
    layers: str
    norm: str
    num_prefix_tokens: int = 1  # CLS; registers come on top, by config


ENCODERS: dict[str, Encoder] = {
    "clip_vision_model": Encoder("CLIPVisionModel", "encoder.layers", "post_layernorm"),
    "siglip_vision_model": Encoder("SiglipVisionModel", "encoder.layers", "post_layernorm", 0),
    "siglip2_vision_model": Encoder("Siglip2VisionModel", "encoder.layers", "post_layernorm", 0),
    "dinov2": Encoder("Dinov2Model", "encoder.layer", "layernorm"),
    "dinov2_with_registers": Encoder("Dinov2WithRegistersModel", "encoder.layer", "layernorm"),
    "dinov3_vit": Encoder("DINOv3ViTModel", "model.layer", "norm"),
    "dinov3_convnext": Encoder("DINOv3ConvNextModel", "model.stages", "layer_norm"),
}


class TransformersTower(LayeredTower):
    """One of ENCODERS. `spec.model_cfg` is the encoder's own config, `model_type` included."""

    def __init__(self, spec: TowerSpec):
        super().__init__(spec)
        kind = ENCODERS[spec.model_cfg["model_type"]]
        config = _config(spec.model_cfg)
        self.encoder: Any = _class(config)(config)
        layers = self.encoder.get_submodule(kind.layers)
        self._read = self._indices(len(layers))
        del layers[max(self._read) + 1 :]  # later layers would be run and saved for nothing
        setattr(self.encoder, kind.norm, nn.Identity())
        embeddings: Any = getattr(self.encoder, "embeddings", None)
        if getattr(embeddings, "mask_token", None) is not None:
            embeddings.mask_token = None  # only for pretraining with masked patches
        self._num_prefix_tokens = kind.num_prefix_tokens + getattr(config, "num_register_tokens", 0)
        self._probe()

    def blocks(self) -> list[nn.Module]:
        return list(self.encoder.get_submodule(ENCODERS[self.encoder.config.model_type].layers))

    def forward(self, pixels: Tensor) -> Tensor:  # [N, C, H, W] -> [N, P, Dv]
        is_last = set(self._read) == {max(self._read)}
        output = self.encoder(**self._inputs(pixels), output_hidden_states=not is_last)
        if is_last:
            patches: Tensor = output.last_hidden_state[:, self._num_prefix_tokens :]
            return concatenate([patches] * len(self._read))
        states = [output.hidden_states[index + 1] for index in self._read]  # the first is the embedding
        if states[0].ndim == 4:  # ConvNeXt: [N, Dv, rows, columns]
            return concatenate([state.flatten(2).transpose(1, 2) for state in states])
        return concatenate([state[:, self._num_prefix_tokens :] for state in states])

    def _inputs(self, pixels: Tensor) -> dict[str, Any]:
        config = self.encoder.config
        if config.model_type in _FIXED_POSITIONS and tuple(pixels.shape[2:]) != (config.image_size,) * 2:
            return {"pixel_values": pixels, "interpolate_pos_encoding": True}
        if config.model_type != "siglip2_vision_model":
            return {"pixel_values": pixels}
        size = self.encoder.config.patch_size  # SigLIP 2 takes patches, so that any aspect ratio fits one batch
        rows, columns = pixels.shape[2] // size, pixels.shape[3] // size
        cells = pixels[:, :, : rows * size, : columns * size].unflatten(3, (columns, size)).unflatten(2, (rows, size))
        patches = cells.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)  # [N, P, size * size * C]
        return {
            "pixel_values": patches,
            "pixel_attention_mask": None,  # no patch is padding
            # on the CPU: its values are read even while the model is on the meta device
            "spatial_shapes": torch.tensor([[rows, columns]] * len(pixels), dtype=torch.long, device="cpu"),
        }


def _config(model_cfg: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    config = AutoConfig.for_model(**copy.deepcopy(model_cfg))
    config.vision_use_head = False  # drops SigLIP's attention pool, which follows the last layer
    return config


def _class(config: Any) -> Any:
    import transformers

    return getattr(transformers, ENCODERS[config.model_type].model_class)


def load_transformers_tower(config: TowerConfig) -> TransformersTower:
    """The pretrained tower of these settings. Raises ConfigError if it is no encoder, incomplete or lacks the layer.

    Position embeddings are interpolated to `image_size_px` where the encoder was trained at another size.
    """
    from transformers import AutoConfig, AutoImageProcessor

    name = config.source.removeprefix(TRANSFORMERS)
    check_source(name, config.revision, setting="model.vision.source")
    try:
        with quiet_transformers():
            full_config = AutoConfig.from_pretrained(name, revision=config.revision)
            encoder_config = getattr(full_config, "vision_config", full_config)
            if encoder_config.model_type not in ENCODERS:
                raise ConfigError(
                    f"model.vision.source: {name} is of type {encoder_config.model_type!r}, which is no vision encoder "
                    f"that can be read; allowed: {', '.join(ENCODERS)}, or a model with one of them inside"
                )
            transform = AutoImageProcessor.from_pretrained(name, revision=config.revision)
            encoder, report = _class(encoder_config).from_pretrained(
                name, config=encoder_config, revision=config.revision, dtype=torch.float32, output_loading_info=True
            )
    except (OSError, RuntimeError, KeyError) as error:
        raise ConfigError(f"model.vision: cannot load {config.source}: {error}") from error
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"model.vision: cannot load {config.source}: {error}") from error
    if missing := sorted(report["missing_keys"]):
        raise ConfigError(
            f"model.vision.source: {name} lacks {len(missing)} weights of its encoder, such as {missing[0]}; "
            "copy or download it again"
        )
    side = config.image_size_px or _image_size(transform, encoder_config)
    source = config.source + (f"@{config.revision}" if config.revision else "")
    spec = transformers_spec(encoder_config, transform, layer=config.feature_layer, image_size_px=side, source=source)
    weights = encoder.state_dict()
    if (positions := _positions(encoder, side)) is not None:
        spec.model_cfg["image_size"] = side
        weights["embeddings.position_embedding.weight"] = positions
    tower = TransformersTower(spec)
    tower.load_encoder_weights(weights)
    return tower


def transformers_spec(
    config: Any, transform: Any, *, layer: int | tuple[int, ...], image_size_px: int, source: str
) -> TowerSpec:
    """The spec of an encoder of transformers, from its config and its image processor."""
    return TowerSpec(
        model_cfg={**config.to_diff_dict(), "model_type": config.model_type},
        layer=layer,
        image_size_px=image_size_px,
        mean=tuple(transform.image_mean),
        std=tuple(transform.image_std),
        interpolation=RESAMPLINGS[int(transform.resample)],
        source=source,
        family="transformers",
    )


def _image_size(transform: Any, config: Any) -> int:
    """The side in pixels of the pictures that the encoder's own transform makes."""
    for size in (getattr(transform, "crop_size", None), getattr(transform, "size", None)):
        if size is not None and size.get("height"):
            return int(size["height"])
    if hasattr(config, "num_patches"):  # SigLIP 2, which takes patches
        return int(config.patch_size * config.num_patches**0.5)
    return int(config.image_size)


@torch.no_grad()
def _positions(encoder: Any, side: int) -> Tensor | None:
    """CLIP's and SigLIP's position embeddings for another picture size, as transformers interpolates them.

    None at the encoder's own size, and for encoders that interpolate by themselves (SigLIP 2, DINO).
    """
    config = encoder.config
    if config.model_type not in _FIXED_POSITIONS or side == config.image_size:
        return None
    num_tokens = (side // config.patch_size) ** 2 + ENCODERS[config.model_type].num_prefix_tokens
    hidden = torch.zeros(1, num_tokens, config.hidden_size)
    positions: Tensor = encoder.embeddings.interpolate_pos_encoding(hidden, side, side)
    return positions[0]
