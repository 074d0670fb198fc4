"""Packs examples into rows for one LLM: whether it may, and what a longer row costs it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from mmllm.batching.packing import Groups, RowCost, alike, divided, plan_rows
from mmllm.batching.sampler import Item, as_they_come
from mmllm.config import ConfigError, DataConfig
from mmllm.kernels.attention import BLOCKED
from mmllm.model.capabilities import Capabilities

# Attention costs this many times its multiplications: it moves its scores through memory. Measured on a CPU with
# transformers' Llama, see bench/RESULTS.md. What is missing here skips what is masked.
_ATTENTION_WEIGHT = {"eager": 5.0, "sdpa": 2.0, BLOCKED: 2.0}


def row_cost(language_model: Any) -> RowCost:
    """What rows cost this LLM: a token each parameter of a layer twice, a pair of tokens 4 x hidden size."""
    config, decoder = language_model.config, language_model.get_decoder()
    attention = getattr(config, "_attn_implementation", None) or "eager"
    if attention not in _ATTENTION_WEIGHT:
        return RowCost(one_row=attention.startswith("flash"))
    in_table = language_model.get_input_embeddings().weight.numel()
    per_layer = (sum(p.numel() for p in decoder.parameters()) - in_table) / config.num_hidden_layers
    return RowCost(max(1.0, per_layer / (2 * config.hidden_size) / _ATTENTION_WEIGHT[attention]))


class Packer:
    """`data.packing` for one LLM. Raises ConfigError for `always` where it cannot keep examples of one row apart."""

    def __init__(self, language_model: Any, data: DataConfig, capabilities: Capabilities):
        self.packing, self.max_width = data.packing, data.max_length_tokens
        self.cost = RowCost()
        self.is_possible = False
        if data.packing == "never":
            return
        kind = language_model.config.model_type
        if reason := capabilities.packing_refusal:
            if data.packing == "always":
                raise ConfigError(
                    f"data.packing: always, but {kind} does not keep examples of one row apart: {reason}; "
                    "take auto or never, or another LLM"
                )
            print(f"data.packing: nothing is packed, {kind} does not keep examples of one row apart: {reason}")
            return
        self.is_possible = True
        self.cost = row_cost(language_model)

    def rows(self, lengths: Sequence[int]) -> Groups | None:
        """The rows of a micro-batch of examples of these lengths; None: one each, padded."""
        if not self.is_possible or self.packing == "never":
            return None
        return plan_rows(lengths, self.packing, self.cost, self.max_width)

    def divide(
        self, items: Sequence[Item], count: int, size_of: Callable[[Item], tuple[int, int]]
    ) -> list[Sequence[Item]]:
        """A share of a step as micro-batches, see `divided`; of like lengths where no row can be packed."""
        if self.packing == "never" or count == 1:
            return as_they_come(items, count)
        sizes = [size_of(item) for item in items]
        lengths, images = [tokens for tokens, _ in sizes], [number for _, number in sizes]
        possible = self.is_possible
        groups = divided(lengths, images, count, self.packing, self.cost) if possible else alike(lengths, count)
        return [[items[number] for number in group] for group in groups]
