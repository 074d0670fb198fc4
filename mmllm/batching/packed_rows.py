"""Whether an LLM keeps the examples of one row apart, found by trying, and what a longer row costs it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mmllm.batching.packing import Groups, RowCost, alike, divided, plan_rows, positions
from mmllm.batching.sampler import Item, as_they_come
from mmllm.config import ConfigError, DataConfig
from mmllm.kernels.attention import BLOCKED
from mmllm.model.probing import probing, spread_of

# Of the largest logit. The same kernels run on rows of one shape, so what is not seen moves nothing, in any precision.
_LEAK = 1e-3
# What an architecture that cannot do what is asked of it answers with.
_FAILURES = (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)
_LENGTHS = (7, 5, 6)


def why_not_packed(language_model: Any) -> str | None:
    """Why examples cannot stand in one row of this LLM; None where they can.

    transformers builds a block-diagonal mask from positions that restart, if no attention mask is given and no cache
    is made; architectures do not say whether they use it. Tried is that an example does not move where its neighbours
    in the row change: OPT reads them, and a state-space LLM carries its state across. A packed row is not compared with
    its examples alone: those go through other kernels, whose rounding moves a real LLM's logits by a quarter in bf16.
    """
    if getattr(language_model.config, "output_router_logits", False):
        return "its router's loss is one of whole rows"
    table = language_model.get_input_embeddings().weight
    embeds = table.detach()[torch.arange(sum(_LENGTHS), device=table.device) % len(table)][None]
    try:
        with probing(language_model):
            moved = _moved_by_neighbours(language_model, embeds)
    except _FAILURES as error:
        return str(error).splitlines()[0] if str(error) else type(error).__name__
    return None if moved <= _LEAK else f"an example moves by {moved:.1%} where its neighbours change"


def _moved_by_neighbours(language_model: Any, embeds: Tensor) -> float:
    where = positions([_LENGTHS], sum(_LENGTHS)).to(embeds.device)
    first, middle, last = embeds.split(_LENGTHS, 1)
    others = torch.cat([first.flip(1), middle, last.flip(1)], 1)
    watched = slice(_LENGTHS[0], _LENGTHS[0] + _LENGTHS[1])
    before, after = (
        language_model(inputs_embeds=row, position_ids=where, use_cache=False).logits[:, watched]
        for row in (embeds, others)
    )
    return spread_of(before, after)


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

    def __init__(self, language_model: Any, data: DataConfig):
        self.packing, self.max_width = data.packing, data.max_length_tokens
        self.cost = RowCost()
        self.is_possible = False
        if data.packing == "never":
            return
        kind = language_model.config.model_type
        if reason := why_not_packed(language_model):
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
