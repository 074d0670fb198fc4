"""Attention as it is fastest: in blocks, and all of self-attention's projections in one product.

In blocks: matrix products over some heads, a block of queries and the keys they see, for training in bf16 on a CPU.
torch's own kernel takes up to five times as long there, most of it backward (bench/RESULTS.md). As in flash attention
(https://arxiv.org/abs/2205.14135) scores are not kept, but made again backward; blocks that a mask leaves empty, as
between the examples of a packed row, are skipped.

Shapes: `N` batch times heads, `Q` queries and `K` keys of a block, `d` width of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCKED = "mmllm_blocked"  # its name among transformers' attention functions
QUERIES = 128  # of a block
SCORES = 2**18  # made at a time, in fp32: 1 MB, what a core's cache holds


@dataclass(frozen=True)
class _Block:
    heads: slice  # of the N
    queries: slice
    keys: slice
    bias: Tensor | None  # [Q, K], is added to the scores; None: every query sees every key


def _heads(first: int, last: int, num_scores: int) -> Iterator[slice]:
    size = max(1, SCORES // num_scores)
    for start in range(first, last, size):
        yield slice(start, min(start + size, last))


def _causal_blocks(num_heads: int, length: int, device: torch.device) -> Iterator[_Block]:
    hidden = torch.ones(QUERIES, QUERIES, dtype=torch.bool, device=device).triu(1)
    for start in range(0, length, QUERIES):
        end = min(start + QUERIES, length)
        bias = torch.zeros(end - start, end, device=device)
        bias[:, start:].masked_fill_(hidden[: end - start, : end - start], float("-inf"))
        for heads in _heads(0, num_heads, bias.numel()):
            yield _Block(heads, slice(start, end), slice(0, end), bias)


def _masked_blocks(mask: Tensor, heads_per_row: int) -> Iterator[_Block]:
    """`mask` [B, Q, K] says of each row which keys a query sees."""
    lowest = torch.finfo(torch.float32).min  # not -inf: a query of the padding may see nothing
    for row, own in enumerate(mask):
        for start in range(0, len(own), QUERIES):
            queries = slice(start, min(start + QUERIES, len(own)))
            seen = own[queries].any(0).nonzero()
            if not len(seen):
                continue
            keys = slice(int(seen[0]), int(seen[-1]) + 1)
            hidden = ~own[queries, keys]
            bias = torch.zeros(hidden.shape, device=hidden.device).masked_fill_(hidden, lowest)
            first = row * heads_per_row
            for heads in _heads(first, first + heads_per_row, bias.numel()):
                yield _Block(heads, queries, keys, bias)


class _Blocked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, blocks: list[_Block], scale: float) -> Tensor:
        out = value.new_zeros(*query.shape[:2], value.shape[2])
        with torch.autocast("cpu", enabled=False):
            for block in blocks:
                own, seen = (block.heads, block.queries), (block.heads, block.keys)
                out[own] = torch.bmm(_chances(query[own], key[seen], block, scale), value[seen])
        ctx.save_for_backward(query, key, value)
        ctx.blocks, ctx.scale = blocks, scale
        return out

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        (query, key, value), (slope,) = ctx.saved_tensors, slopes
        of_query, of_key, of_value = (torch.zeros_like(one) for one in (query, key, value))
        with torch.autocast("cpu", enabled=False):  # it may be on in backward too; scores stay fp32
            for block in ctx.blocks:
                own, seen = (block.heads, block.queries), (block.heads, block.keys)
                chances = _chances(query[own], key[seen], block, ctx.scale)
                of_value[seen] += torch.bmm(chances.transpose(1, 2), slope[own])
                of_chances = torch.bmm(slope[own], value[seen].transpose(1, 2))
                of_scores = torch._softmax_backward_data(of_chances, chances, -1, chances.dtype)
                of_query[own] = torch.bmm(of_scores, key[seen])
                of_key[seen] += torch.bmm(of_scores.transpose(1, 2), query[own])
        return of_query.mul_(ctx.scale), of_key.mul_(ctx.scale), of_value, None, None


def _chances(query: Tensor, key: Tensor, block: _Block, scale: float) -> Tensor:
    """[N, Q, d], [N, K, d] -> [N, Q, K], each row of which adds up to one; from scores in fp32, as torch's kernel."""
    wide, other = query.float(), key.float().transpose(1, 2)
    if block.bias is None:
        scores = torch.bmm(wide * scale, other)
    else:
        scores = torch.baddbmm(block.bias, wide, other, alpha=scale)
    return scores.softmax(-1).to(query.dtype)


def blocked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """softmax(query @ key * scale) @ value: [B, H, Q, d], twice [B, H, K, d] -> [B, H, Q, d].

    `mask` [B or 1, 1, Q, K] is True where a query sees a key; `is_causal` is for as many queries as keys. `scale` is by
    default the root of 1/d. A query that sees no key gives 0, or what is meaningless beside others of its block.
    """
    rows, heads, length, width = query.shape
    flat = [one.reshape(rows * heads, *one.shape[2:]) for one in (query, key, value)]
    if mask is not None:
        blocks = list(_masked_blocks(mask[:, 0].expand(rows, -1, -1), heads))
    elif is_causal:
        blocks = list(_causal_blocks(rows * heads, length, query.device))
    else:
        whole = slice(0, length), slice(0, key.shape[2])
        blocks = [_Block(some, *whole, None) for some in _heads(0, rows * heads, length * key.shape[2])]
    out: Tensor = _Blocked.apply(*flat, blocks, width**-0.5 if scale is None else scale)  # type: ignore[no-untyped-call]
    return out.view(rows, heads, length, -1)


def is_blocked_faster(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether this is where torch's kernel is slow, with autocast as it is now: bf16, on a CPU, with a gradient."""
    if query.device.type != "cpu" or not torch.is_grad_enabled() or query.shape[2] != key.shape[2]:
        return False
    in_bf16 = _computed_in(query) == torch.bfloat16
    return in_bf16 and any(one.requires_grad for one in (query, key, value))


def _computed_in(value: Tensor) -> torch.dtype:
    is_autocast = torch.is_autocast_enabled("cpu")
    return torch.get_autocast_dtype("cpu") if is_autocast else value.dtype


def _transformers_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers' layers call: blocked where that is faster, or else `sdpa`. [B, H, T, d] -> [B, T, H, d]."""
    from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

    is_plain = not dropout and all(kwargs.get(name) is None for name in ("position_bias", "cache", "softcap"))
    is_mask = attention_mask is None or (attention_mask.dtype == torch.bool and attention_mask.shape[1] == 1)
    if not (is_plain and is_mask and is_blocked_faster(query, key, value)):
        found: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
        return found
    dtype = _computed_in(query)
    times = query.shape[1] // key.shape[1]
    query, key, value = query.to(dtype), repeat_kv(key.to(dtype), times), repeat_kv(value.to(dtype), times)
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    out = blocked_attention(query, key, value, attention_mask, is_causal=causal, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


def use_blocked_attention(language_model: Any) -> None:
    """An LLM whose attention is `sdpa` computes it in blocks from now on, where that is faster."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(BLOCKED, _transformers_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(BLOCKED, sdpa_mask)
    if language_model.config._attn_implementation == "sdpa":
        language_model.set_attn_implementation(BLOCKED)


def caps_scores(config: Any) -> bool:
    """Whether an LLM's attention squeezes its scores (Gemma 2), which torch's own kernel, `sdpa`, cannot do."""
    return getattr(config, "attn_logit_softcapping", None) is not None


def keep_score_cap(language_model: Any) -> None:
    """Takes `sdpa` from an LLM that caps its scores: some versions of transformers choose it, and drop the cap."""
    if caps_scores(language_model.config) and language_model.config._attn_implementation == "sdpa":
        language_model.set_attn_implementation("eager")


class SelfAttention(nn.MultiheadAttention):
    """torch's module with one product for queries, keys and values of all positions, where they are of the same tokens.

    Its own takes them with batch and length exchanged, whereupon torch copies the weights once for every position.
    """

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """[B, T, D], thrice -> [B, T, D], and no weights where `need_weights` is False."""
        is_self = query is key and key is value and query.ndim == 3
        asked = {name: value for name, value in kwargs.items() if value is not None}
        if not is_self or args or asked != {"need_weights": False}:
            return super().forward(query, key, value, *args, **kwargs)
        projected = F.linear(query, self.in_proj_weight, self.in_proj_bias)
        parts = projected.unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        heads = blocked_attention(*parts) if is_blocked_faster(*parts) else F.scaled_dot_product_attention(*parts)
        return self.out_proj(heads.transpose(1, 2).flatten(2)), None


def use_self_attention(encoder: nn.Module) -> None:
    """Makes SelfAttention of an encoder's attention; its weights and their names stay."""
    for module in encoder.modules():
        if type(module) is not nn.MultiheadAttention or not module.batch_first or module.dropout:
            continue
        own: Any = module
        if own._qkv_same_embed_dim and own.bias_k is None and not own.add_zero_attn:
            own.__class__ = SelfAttention
