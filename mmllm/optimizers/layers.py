"""The layers of tower and LLM: the depth of each parameter for layer decay, and the hidden matrices for Muon."""

from __future__ import annotations

from torch import nn

from mmllm.model.language import decoder_layers
from mmllm.model.tower import VisionTower
from mmllm.model.vlm import VisionLanguageModel


def depths(model: VisionLanguageModel) -> dict[str, int]:
    """Parameter name -> the number of layers between the parameter and the top of its part.

    The last layer has depth 0, as have the LLM's final norm and untied head, and the projector. With n layers, what
    comes before the first of them has depth n, such as embeddings and a head that is tied to them.
    """
    depth_by_id: dict[int, int] = {}
    tower = model.vision_tower
    depth_by_id |= dict.fromkeys(map(id, tower.parameters()), len(tower.blocks()))
    for depth, block in enumerate(reversed(tower.blocks())):
        depth_by_id |= dict.fromkeys(map(id, block.parameters()), depth)
    layers = decoder_layers(model.language_model)
    for depth, layer in enumerate(reversed(layers)):
        depth_by_id |= dict.fromkeys(map(id, layer.parameters()), depth)
    tables: list[nn.Module] = [module for module in model.language_model.modules() if isinstance(module, nn.Embedding)]
    inside = {module for layer in layers for module in layer.modules()}
    for name, module in model.language_model.get_decoder().named_modules():
        if module not in inside and "emb" in name.rpartition(".")[2]:  # such as Bloom's norm after its embeddings
            tables.append(module)
    for table in [*tables, model.get_input_embeddings()]:  # peft keeps rows of added tokens outside nn.Embedding
        depth_by_id |= dict.fromkeys(map(id, table.parameters()), len(layers))
    return {name: depth_by_id.get(id(parameter), 0) for name, parameter in model.named_parameters()}


class OuterModule(nn.Module):
    """A module whose matrices are not between hidden layers, such as a separate head. AdamW trains them, not Muon."""


def hidden_matrices(module: nn.Module) -> set[int]:
    """The `id()` of every weight that Muon updates: the weights of linear layers between hidden layers.

    They are chosen by the type of the module that holds them, since names differ between architectures. In an LLM or a
    tower only the repeated layers count, not embeddings and heads. Position tables, routers, convolutions and
    state-space parameters (Mamba's `A_log`) are not in linear layers.
    """
    from transformers import PreTrainedModel
    from transformers.pytorch_utils import Conv1D  # GPT-2's linear layers

    linear_ids: set[int] = set()
    outer_ids: set[int] = set()
    for part in module.modules():
        if isinstance(part, nn.Linear | Conv1D):
            linear_ids.add(id(part.weight))
        elif isinstance(part, nn.MultiheadAttention):  # its output layer is an nn.Linear
            names = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
            linear_ids |= {id(weight) for name in names if (weight := getattr(part, name)) is not None}
        if isinstance(part, VisionTower):
            outer_ids |= _ids_outside(part, part.blocks())
        elif isinstance(part, OuterModule):
            outer_ids |= _ids_outside(part, [])
        elif isinstance(part, VisionLanguageModel):
            continue
        elif isinstance(part, PreTrainedModel) and part.get_output_embeddings() is not None:
            outer_ids |= _ids_outside(part, decoder_layers(part))
    return linear_ids - outer_ids


def _ids_outside(whole: nn.Module, layers: list[nn.Module]) -> set[int]:
    """The ids of the parameters of `whole` that are in none of the layers."""
    inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
    return {id(parameter) for parameter in whole.parameters()} - inside
