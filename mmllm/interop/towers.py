"""Vision towers under transformers' names: the ViTs of CLIP and SigLIP, also those that open_clip or timm built.

Tables rename the weights. `in_proj` of open_clip and `qkv` of timm hold query, key and value in one tensor, which
transformers keeps as three.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmllm.errors import MmllmError
from mmllm.model.tower import VisionTower


class ExportError(MmllmError):
    """A model that cannot be written in another format; the message says which part and why."""


# name of open_clip or timm -> name of transformers; `#` is the layer's number, `{}` one of q, k and v
CLIP_NAMES = {
    "class_embedding": "embeddings.class_embedding",
    "conv1.": "embeddings.patch_embedding.",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_pre.": "pre_layrnorm.",
    "transformer.resblocks.#.ln_1.": "encoder.layers.#.layer_norm1.",
    "transformer.resblocks.#.attn.in_proj_": "encoder.layers.#.self_attn.{}_proj.",
    "transformer.resblocks.#.attn.out_proj.": "encoder.layers.#.self_attn.out_proj.",
    "transformer.resblocks.#.ln_2.": "encoder.layers.#.layer_norm2.",
    "transformer.resblocks.#.mlp.c_fc.": "encoder.layers.#.mlp.fc1.",
    "transformer.resblocks.#.mlp.c_proj.": "encoder.layers.#.mlp.fc2.",
}
SIGLIP_NAMES = {
    "trunk.patch_embed.proj.": "embeddings.patch_embedding.",
    "trunk.pos_embed": "embeddings.position_embedding.weight",
    "trunk.blocks.#.norm1.": "encoder.layers.#.layer_norm1.",
    "trunk.blocks.#.attn.qkv.": "encoder.layers.#.self_attn.{}_proj.",
    "trunk.blocks.#.attn.proj.": "encoder.layers.#.self_attn.out_proj.",
    "trunk.blocks.#.norm2.": "encoder.layers.#.layer_norm2.",
    "trunk.blocks.#.mlp.fc1.": "encoder.layers.#.mlp.fc1.",
    "trunk.blocks.#.mlp.fc2.": "encoder.layers.#.mlp.fc2.",
}


@dataclass(frozen=True)
class TransformersEncoder:
    """The config and the weights of transformers' class for an encoder."""

    config: dict[str, Any]  # `model_type` included
    weights: dict[str, Tensor]
    has_cls: bool
    layer: int | list[int]  # the layers to read, counted from the last (-1)


def rename_weights(weights: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """The weights under transformers' names. Raises ExportError for one that is not in `names`."""
    patterns = {re.compile(re.escape(old).replace(r"\#", r"(\d+)") + "(.*)"): new for old, new in names.items()}
    renamed: dict[str, Tensor] = {}
    for name, value in weights.items():
        matches = ((match, new) for pattern, new in patterns.items() if (match := pattern.fullmatch(name)))
        match, new = next(matches, (None, ""))
        if match is None:
            raise ExportError(f"vision tower: transformers' class has no weight that corresponds to {name}")
        *layer, rest = match.groups()
        new = (new.replace("#", layer[0]) if layer else new) + rest
        if "{}" in new:
            renamed |= {new.format(part): chunk.clone() for part, chunk in zip("qkv", value.chunk(3), strict=True)}
        else:
            renamed[new] = value.squeeze(0) if name.endswith("pos_embed") else value
    return renamed


def encoder_in_transformers(tower: VisionTower) -> TransformersEncoder:
    """The tower's encoder as CLIPVisionModel or SiglipVisionModel. Raises ExportError where it is neither.

    A tower has no layers after the last one that is read. The final norm, which is not read, gets ones and zeros.
    """
    encoder: Any = getattr(tower, "encoder", None)
    if tower.spec.family == "transformers":
        converted = _from_transformers(tower)
    elif tower.spec.family != "open_clip":
        raise ExportError(f"vision tower: {tower.spec.source} is not an encoder of transformers' CLIP or SigLIP")
    elif hasattr(encoder, "transformer"):
        converted = _from_open_clip(tower)
    elif type(getattr(encoder, "trunk", None)).__name__ == "VisionTransformer":
        converted = _from_timm(tower)
    else:
        kind = type(getattr(encoder, "trunk", encoder)).__name__
        raise ExportError(
            f"vision tower: {tower.spec.source} is a {kind}, and transformers' Llava takes CLIP or SigLIP"
        )
    width = converted.config["hidden_size"]
    converted.weights["post_layernorm.weight"] = torch.ones(width)
    converted.weights["post_layernorm.bias"] = torch.zeros(width)
    return converted


def _layers(tower: VisionTower) -> int | list[int]:
    """The layers that are read, counted from the tower's last one (-1)."""
    last = max(tower.spec.layers)
    layers = [layer - last - 1 for layer in tower.spec.layers]
    return layers[0] if len(layers) == 1 else layers


def _from_transformers(tower: VisionTower) -> TransformersEncoder:
    encoder: Any = tower.encoder
    config = encoder.config.to_diff_dict()
    kind = encoder.config.model_type
    if kind not in ("clip_vision_model", "siglip_vision_model"):
        raise ExportError(f"vision tower: {tower.spec.source} is of type {kind}, and Llava's processor counts the "
                          "tokens of CLIP and SigLIP only")  # fmt: skip
    values = {"num_hidden_layers": len(tower.blocks()), "image_size": tower.spec.image_size_px, "model_type": kind}
    is_clip = kind == "clip_vision_model"
    if not is_clip:
        values["vision_use_head"] = False
    config = {key: value for key, value in config.items() if key not in ("architectures", "dtype")}
    return TransformersEncoder({**config, **values}, dict(encoder.state_dict()), is_clip, _layers(tower))


def _activation(module: nn.Module) -> str:
    """transformers' name of an activation. Raises ExportError where it has none."""
    name = type(module).__name__
    if isinstance(module, nn.GELU):
        return "gelu" if module.approximate == "none" else "gelu_pytorch_tanh"
    if name in ("QuickGELU", "GELUTanh"):
        return {"QuickGELU": "quick_gelu", "GELUTanh": "gelu_pytorch_tanh"}[name]
    raise ExportError(f"vision tower: its activation {name} has no name in transformers")


def _vit_config(tower: VisionTower, model_type: str, num_heads: int, patch: Any, fc: Any, norm: Any) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "hidden_size": tower.width // len(tower.spec.layers),
        "intermediate_size": fc.out_features,
        "num_hidden_layers": len(tower.blocks()),
        "num_attention_heads": num_heads,
        "patch_size": patch.kernel_size[0],
        "image_size": tower.spec.image_size_px,
        "layer_norm_eps": norm.eps,
    }


def _from_open_clip(tower: VisionTower) -> TransformersEncoder:
    encoder: Any = tower.encoder
    block = encoder.transformer.resblocks[0]
    config = _vit_config(tower, "clip_vision_model", block.attn.num_heads, encoder.conv1, block.mlp.c_fc, block.ln_1)
    config["hidden_act"] = _activation(block.mlp.gelu)
    weights = rename_weights(encoder.state_dict(), CLIP_NAMES)
    if "pre_layrnorm.weight" not in weights:
        raise ExportError("vision tower: it has no norm before its layers, which transformers' CLIP always has")
    return TransformersEncoder(config, weights, True, _layers(tower))


def _from_timm(tower: VisionTower) -> TransformersEncoder:
    encoder: Any = tower.encoder
    block = encoder.trunk.blocks[0]
    patch = encoder.trunk.patch_embed.proj
    config = _vit_config(tower, "siglip_vision_model", block.attn.num_heads, patch, block.mlp.fc1, block.norm1)
    config |= {"hidden_act": _activation(block.mlp.act), "vision_use_head": False}
    return TransformersEncoder(config, rename_weights(encoder.state_dict(), SIGLIP_NAMES), False, _layers(tower))
