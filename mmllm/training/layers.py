"""The layers of tower and LLM: which there are, and how deep each parameter lies."""

from __future__ import annotations

from typing import Any

from torch import nn

from mmllm.config import ConfigError
from mmllm.model.vlm import VisionLanguageModel


def decoder_layers(language_model: Any) -> list[nn.Module]:
    """The LLM's layers in the order in which they run. Raises ConfigError where they are not found."""
    count = language_model.config.num_hidden_layers
    for module in language_model.get_decoder().modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return list(module)
    raise ConfigError(f"model.language: the {count} layers of {type(language_model).__name__} are not where others are")


def depths(model: VisionLanguageModel) -> dict[str, int]:
    """How many layers stand between a parameter and the top of its part, by its name.

    0 is the last layer, and what stands behind it: norm and head. What stands before the first of n layers, such as
    embeddings, and a head that is tied to them, has n. The projector has one layer.
    """
    found: dict[int, int] = {}
    tower = model.vision_tower
    found |= dict.fromkeys(map(id, tower.parameters()), len(tower.blocks()))
    for depth, block in enumerate(reversed(tower.blocks())):
        found |= dict.fromkeys(map(id, block.parameters()), depth)
    layers = decoder_layers(model.language_model)
    for depth, layer in enumerate(reversed(layers)):
        found |= dict.fromkeys(map(id, layer.parameters()), depth)
    tables = [module for module in model.language_model.modules() if isinstance(module, nn.Embedding)]
    for table in [*tables, model.get_input_embeddings()]:  # peft's rows of added tokens are in no nn.Embedding
        found |= dict.fromkeys(map(id, table.parameters()), len(layers))
    return {name: found.get(id(parameter), 0) for name, parameter in model.named_parameters()}
