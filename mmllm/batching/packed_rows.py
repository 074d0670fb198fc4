"""Packs examples into rows for one LLM: whether it may, and what a longer row costs it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from mmllm.batching.packing import Groups, RowCost, plan_rows, split_by_length, split_step
from mmllm.batching.sampler import Item, in_order
from mmllm.config import ConfigError, DataConfig
from mmllm.kernels.attention import BLOCKED
from mmllm.model.capabilities import Capabilities

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

    def __init__(self, language_model: Any, data: DataConfig, capabilities: Capabilities):
        self.packing, self.max_width = data.packing, data.max_length_tokens
        self.cost = RowCost()
        self.can_pack = False
        if data.packing == "never":
            return
        kind = language_model.config.model_type
        if reason := capabilities.packing_refusal:
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
