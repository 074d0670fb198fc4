"""The layers of tower and LLM: how deep each parameter lies, and which are the hidden matrices that Muon takes."""

from __future__ import annotations

from torch import nn

from mmllm.model.language import decoder_layers
from mmllm.model.tower import VisionTower
from mmllm.model.vlm import VisionLanguageModel


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
    tables: list[nn.Module] = [one for one in model.language_model.modules() if isinstance(one, nn.Embedding)]
    inside = {module for layer in layers for module in layer.modules()}
    for name, module in model.language_model.get_decoder().named_modules():
        if module not in inside and "emb" in name.rpartition(".")[2]:  # such as Bloom's norm of its embeddings
            tables.append(module)
    for table in [*tables, model.get_input_embeddings()]:  # peft's rows of added tokens are in no nn.Embedding
        found |= dict.fromkeys(map(id, table.parameters()), len(layers))
    return {name: found.get(id(parameter), 0) for name, parameter in model.named_parameters()}


class OuterModule(nn.Module):
    """A module whose matrices lie between no two hidden layers: a head of its own. Muon leaves them to AdamW."""


def hidden_matrices(module: nn.Module) -> set[int]:
    """The ids of the weights that Muon is made for: those of linear layers between hidden layers.

    Chosen by the module that holds them, since names differ from one architecture to the next. Of an LLM and of a tower
    they lie in the repeated layers: embeddings and heads lie outside. Position tables, routers, convolutions and the
    parameters of a state space (Mamba's `A_log`) are held by other modules than linear layers.
    """
    from transformers import PreTrainedModel
    from transformers.pytorch_utils import Conv1D  # GPT-2's linear layers

    found: set[int] = set()
    outer: set[int] = set()
    for part in module.modules():
        if isinstance(part, nn.Linear | Conv1D):
            found.add(id(part.weight))
        elif isinstance(part, nn.MultiheadAttention):  # its output layer is a linear one
            names = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
            found |= {id(weight) for name in names if (weight := getattr(part, name)) is not None}
        if isinstance(part, VisionTower):
            outer |= _outside(part, part.blocks())
        elif isinstance(part, OuterModule):
            outer |= _outside(part, [])
        elif isinstance(part, VisionLanguageModel):
            continue
        elif isinstance(part, PreTrainedModel) and part.get_output_embeddings() is not None:
            outer |= _outside(part, decoder_layers(part))
    return found - outer


def _outside(whole: nn.Module, layers: list[nn.Module]) -> set[int]:
    """The ids of the parameters that lie in none of the layers."""
    inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
    return {id(parameter) for parameter in whole.parameters()} - inside
