"""Whether an LLM keeps the examples of a packed row apart, which is tried, and what longer rows cost it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mmllm.batching.packing import Groups, RowCost, packed_position_ids, plan_rows, split_by_length, split_step
from mmllm.batching.sampler import Item, in_order
from mmllm.config import ConfigError, DataConfig
from mmllm.kernels.attention import BLOCKED
from mmllm.model.probing import probing, spread_of

# An example whose logits change by more, as a fraction of the largest logit, sees its neighbours. Both rows that are
# compared have one shape and so run through the same kernels: what is isolated changes by 0, in any precision.
_MAX_CHANGE = 1e-3
# What architectures raise that cannot run a packed row.
_UNSUPPORTED_ERRORS = (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)
_PROBE_LENGTHS = (7, 5, 6)  # tokens of the three examples in the row that is tried


def why_not_packed(language_model: Any) -> str | None:
    """Why this LLM cannot take several examples in one row; None where it can.

    transformers builds a block-diagonal mask from position ids that restart, if no attention mask and no cache is
    given. Architectures do not say whether they use it, so it is tried: the logits of an example must not change when
    its neighbours in the row do. OPT attends to them, and a state-space LLM carries its state across. The packed row is
    not compared with its examples alone: those run through other kernels, whose rounding in bf16 changes a real LLM's
    logits by a quarter.
    """
    if getattr(language_model.config, "output_router_logits", False):
        return "the loss of its router is computed over whole rows"
    table = language_model.get_input_embeddings().weight
    embeds = table.detach()[torch.arange(sum(_PROBE_LENGTHS), device=table.device) % len(table)][None]
    try:
        with probing(language_model):
            change = _change_by_neighbours(language_model, embeds)
    except _UNSUPPORTED_ERRORS as error:
        return str(error).splitlines()[0] if str(error) else type(error).__name__
    return None if change <= _MAX_CHANGE else f"an example's logits change by {change:.1%} when its neighbours do"


def _change_by_neighbours(language_model: Any, embeds: Tensor) -> float:
    """How far the middle example's logits change when the examples around it are reversed. `embeds` is [1, T, D]."""
    position_ids = packed_position_ids([_PROBE_LENGTHS], sum(_PROBE_LENGTHS)).to(embeds.device)
    first, middle, last = embeds.split(_PROBE_LENGTHS, 1)
    changed = torch.cat([first.flip(1), middle, last.flip(1)], 1)
    middle_span = slice(_PROBE_LENGTHS[0], _PROBE_LENGTHS[0] + _PROBE_LENGTHS[1])
    before, after = (
        language_model(inputs_embeds=row, position_ids=position_ids, use_cache=False).logits[:, middle_span]
        for row in (embeds, changed)
    )
    return spread_of(before, after)


# How many times its multiplications attention costs, because it moves its scores through memory. Measured on a CPU with
# transformers' Llama, see bench/RESULTS.md. An implementation that is not listed skips what is masked.
_ATTENTION_WEIGHT = {"eager": 5.0, "sdpa": 2.0, BLOCKED: 2.0}


def row_cost(language_model: Any) -> RowCost:
    """What rows cost this LLM. In a layer, a token costs 2 FLOPs a parameter, a pair of tokens 4 x hidden size."""
    config, decoder = language_model.config, language_model.get_decoder()
    attention = getattr(config, "_attn_implementation", None) or "eager"
    if attention not in _ATTENTION_WEIGHT:
        return RowCost(one_row=attention.startswith("flash"))
    in_table = language_model.get_input_embeddings().weight.numel()
    per_layer = (sum(p.numel() for p in decoder.parameters()) - in_table) / config.num_hidden_layers
    return RowCost(max(1.0, per_layer / (2 * config.hidden_size) / _ATTENTION_WEIGHT[attention]))


class Packer:
    """The setting `data.packing`, applied to one LLM.

    Raises ConfigError for `always` where the LLM does not keep the examples of a row apart.
    """

    def __init__(self, language_model: Any, data: DataConfig):
        self.packing, self.max_width = data.packing, data.max_length_tokens
        self.cost = RowCost()
        self.can_pack = False
        if data.packing == "never":
            return
        kind = language_model.config.model_type
        if reason := why_not_packed(language_model):
            if data.packing == "always":
                raise ConfigError(
                    f"data.packing: always, but {kind} does not keep examples of one row apart: {reason}; "
                    "set auto or never, or choose another LLM"
                )
            print(f"data.packing: nothing is packed, {kind} does not keep examples of one row apart: {reason}")
            return
        self.can_pack = True
        self.cost = row_cost(language_model)

    def rows(self, lengths: Sequence[int]) -> Groups | None:
        """The rows of a micro-batch with examples of these lengths; None: each example has a padded row of its own."""
        if not self.can_pack or self.packing == "never":
            return None
        return plan_rows(lengths, self.packing, self.cost, self.max_width)

    def split_step(
        self, items: Sequence[Item], count: int, size_of: Callable[[Item], tuple[int, int]]
    ) -> list[Sequence[Item]]:
        """A rank's items as `count` micro-batches, see `split_step`; by length where rows cannot be packed.

        `size_of` gives an item's (tokens, images).
        """
        if self.packing == "never" or count == 1:
            return in_order(items, count)
        sizes = [size_of(item) for item in items]
        lengths, num_images = [tokens for tokens, _ in sizes], [images for _, images in sizes]
        if self.can_pack:
            groups = split_step(lengths, num_images, count, self.packing, self.cost)
        else:
            groups = split_by_length(lengths, count)
        return [[items[number] for number in group] for group in groups]
