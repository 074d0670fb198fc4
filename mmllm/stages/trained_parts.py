"""Which weights a stage trains: whole parts, the last layers of the tower, or adapters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mmllm.config import ConfigError, LanguageLoraConfig, StageConfig
from mmllm.model.vlm import VisionLanguageModel
from mmllm.optimizers.optim import match
from mmllm.readers.files import DataError
from mmllm.training.lora import add_lora, add_tower_lora
from mmllm.training.quantised_base import quantise_language

_PREFIXES: dict[str, tuple[str, ...]] = {  # of the names of each part's parameters
    "vision": ("vision_tower.",),
    "projector": ("projector.", "image_newline"),
    "language": ("language_model.",),
}


@dataclass(frozen=True)
class TrainedParts:
    """The trained parameters with their names, by part, and the adapters of the tower if it has any."""

    parts: dict[str, list[tuple[str, nn.Parameter]]]
    tower_adapters: Any = None


def choose_trained(model: VisionLanguageModel, config: StageConfig, *, may_have_images: bool) -> TrainedParts:
    """Freezes all but what the settings name. With LoRA, only the adapters of LLM or tower get gradients.

    Raises ConfigError for parts that have nothing to train, DataError where no example has a picture to learn from.
    """
    needs_pictures = {"vision", "projector"} & set(config.train)
    if needs_pictures and not may_have_images:
        listed = " and ".join(sorted(needs_pictures))
        raise DataError(f"train lists {listed}, but no example of data.train has an image")
    model.requires_grad_(False)
    tower_adapters = _unfreeze_tower(model, config) if "vision" in config.train else None
    if "projector" in config.train:
        model.projector.requires_grad_(True)
        if model.image_newline is not None:
            model.image_newline.requires_grad_(True)
    if "language" in config.train:
        if config.lora:
            _quantise(model, config, config.lora)
            add_lora(model, config.lora)
        else:
            model.language_model.requires_grad_(True)
    _freeze_named(model, config)
    return TrainedParts(_parts(model, config), tower_adapters)


def _quantise(model: VisionLanguageModel, config: StageConfig, lora: LanguageLoraConfig) -> None:
    if lora.quantise:
        compute_dtype = torch.bfloat16 if config.compute.precision == "bf16" else torch.float32
        quantise_language(model.language_model, lora.quantise, compute_dtype=compute_dtype)


def _unfreeze_tower(model: VisionLanguageModel, config: StageConfig) -> Any:
    """Makes the tower trainable and returns its adapters; None where its own weights are trained."""
    tower, last_layers = model.vision_tower, config.vision_last_layers
    if not any(True for _ in tower.parameters()):
        raise ConfigError(f"train lists vision, but {tower.spec.source} has no encoder to train")
    if config.vision_lora:
        return add_tower_lora(tower, config.vision_lora)
    blocks = tower.blocks()
    if last_layers and last_layers > len(blocks):
        raise ConfigError(f"vision_last_layers: {last_layers}, but the tower runs {len(blocks)} layers")
    for module in blocks[-last_layers:] if last_layers else [tower]:
        module.requires_grad_(True)
    return None


def _freeze_named(model: VisionLanguageModel, config: StageConfig) -> None:
    """The parameters that `freeze` matches get no gradient."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name in match(config.freeze, list(trained), setting="freeze"):
        trained[name].requires_grad_(False)


def _parts(model: VisionLanguageModel, config: StageConfig) -> dict[str, list[tuple[str, nn.Parameter]]]:
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    parts: dict[str, list[tuple[str, nn.Parameter]]] = {
        part: [(name, parameter) for name, parameter in trained if name.startswith(_PREFIXES[part])]
        for part in config.train
    }
    if empty := [part for part, named in parts.items() if not named]:
        raise ConfigError(f"freeze leaves nothing of {' and '.join(empty)} to train; take the part out of train")
    return parts
