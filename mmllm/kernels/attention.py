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
QUERIES = 128  # per block
SCORES = 2**18  # computed at a time, in fp32: 1 MB, which fits a core's cache


@dataclass(frozen=True)
class _Block:
    heads: slice  # of the N
    queries: slice
    keys: slice
    bias: Tensor | None  # [Q, K], added to the scores; None: every query sees every key


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
    """`mask` [B, Q, K] is True where a query of a row sees a key."""
    lowest = torch.finfo(torch.float32).min  # not -inf: a padding query may see no key
    for row, row_mask in enumerate(mask):
        for start in range(0, len(row_mask), QUERIES):
            queries = slice(start, min(start + QUERIES, len(row_mask)))
            visible = row_mask[queries].any(0).nonzero()
            if not len(visible):
                continue
            keys = slice(int(visible[0]), int(visible[-1]) + 1)
            hidden = ~row_mask[queries, keys]
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
                at_queries, at_keys = (block.heads, block.queries), (block.heads, block.keys)
                out[at_queries] = torch.bmm(_chances(query[at_queries], key[at_keys], block, scale), value[at_keys])
        ctx.save_for_backward(query, key, value)
        ctx.blocks, ctx.scale = blocks, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (query, key, value), (grad_output,) = ctx.saved_tensors, grad_outputs
        grad_query, grad_key, grad_value = (torch.zeros_like(tensor) for tensor in (query, key, value))
        with torch.autocast("cpu", enabled=False):  # autocast may be on in backward too; scores stay fp32
            for block in ctx.blocks:
                at_queries, at_keys = (block.heads, block.queries), (block.heads, block.keys)
                probs = _chances(query[at_queries], key[at_keys], block, ctx.scale)
                grad_value[at_keys] += torch.bmm(probs.transpose(1, 2), grad_output[at_queries])
                grad_probs = torch.bmm(grad_output[at_queries], value[at_keys].transpose(1, 2))
                grad_scores = torch._softmax_backward_data(grad_probs, probs, -1, probs.dtype)
                grad_query[at_queries] = torch.bmm(grad_scores, key[at_keys])
                grad_key[at_keys] += torch.bmm(grad_scores.transpose(1, 2), query[at_queries])
        return grad_query.mul_(ctx.scale), grad_key.mul_(ctx.scale), grad_value, None, None


def _chances(query: Tensor, key: Tensor, block: _Block, scale: float) -> Tensor:
    """Attention probabilities [N, Q, d], [N, K, d] -> [N, Q, K], from scores in fp32, as in torch's kernel."""
    wide_query, wide_key = query.float(), key.float().transpose(1, 2)
    if block.bias is None:
        scores = torch.bmm(wide_query * scale, wide_key)
    else:
        scores = torch.baddbmm(block.bias, wide_query, wide_key, alpha=scale)
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

    `mask` [B or 1, 1, Q, K] is True where a query sees a key; `is_causal` needs as many queries as keys. `scale` is
    1/sqrt(d) by default. A query that sees no key gives 0, or a meaningless value if others of its block see one.
    """
    rows, heads, length, width = query.shape
    flat = [tensor.reshape(rows * heads, *tensor.shape[2:]) for tensor in (query, key, value)]
    if mask is not None:
        blocks = list(_masked_blocks(mask[:, 0].expand(rows, -1, -1), heads))
    elif is_causal:
        blocks = list(_causal_blocks(rows * heads, length, query.device))
    else:
        whole = slice(0, length), slice(0, key.shape[2])
        blocks = [_Block(part, *whole, None) for part in _heads(0, rows * heads, length * key.shape[2])]
    out: Tensor = _Blocked.apply(*flat, blocks, width**-0.5 if scale is None else scale)  # type: ignore[no-untyped-call]
    return out.view(rows, heads, length, -1)


def is_blocked_faster(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether torch's kernel is slow here: bf16 (or autocast to it) on a CPU, with a gradient and as many Q as K."""
    if query.device.type != "cpu" or not torch.is_grad_enabled() or query.shape[2] != key.shape[2]:
        return False
    in_bf16 = _computed_in(query) == torch.bfloat16
    return in_bf16 and any(tensor.requires_grad for tensor in (query, key, value))


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
    """Attention for transformers' layers: blocked where that is faster, else `sdpa`. [B, H, T, d] -> [B, T, H, d]."""
    from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

    is_plain = not dropout and all(kwargs.get(name) is None for name in ("position_bias", "cache", "softcap"))
    is_mask = attention_mask is None or (attention_mask.dtype == torch.bool and attention_mask.shape[1] == 1)
    if not (is_plain and is_mask and is_blocked_faster(query, key, value)):
        result: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
        return result
    dtype = _computed_in(query)
    num_repeats = query.shape[1] // key.shape[1]
    query, key, value = query.to(dtype), repeat_kv(key.to(dtype), num_repeats), repeat_kv(value.to(dtype), num_repeats)
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    out = blocked_attention(query, key, value, attention_mask, is_causal=causal, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


def use_blocked_attention(language_model: Any) -> None:
    """Switches an LLM from `sdpa` to attention in blocks, used where that is faster."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(BLOCKED, _transformers_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(BLOCKED, sdpa_mask)
    if language_model.config._attn_implementation == "sdpa":
        language_model.set_attn_implementation(BLOCKED)


def caps_scores(config: Any) -> bool:
    """Whether an LLM soft-caps its attention scores (Gemma 2), which torch's own kernel, `sdpa`, cannot do."""
    return getattr(config, "attn_logit_softcapping", None) is not None


def replace_capped_sdpa(language_model: Any) -> None:
    """Replaces `sdpa` by `eager` for an LLM that caps its scores: transformers may choose it and drop the cap."""
    if caps_scores(language_model.config) and language_model.config._attn_implementation == "sdpa":
        language_model.set_attn_implementation("eager")


class SelfAttention(nn.MultiheadAttention):
    """nn.MultiheadAttention with one product for queries, keys and values, where all three are the same tokens.

    torch's own forward exchanges batch and length, and its product then copies the weights once for every position.
    """

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """[B, T, D], three times -> [B, T, D] and the attention weights, or None where `need_weights` is False."""
        is_self = query is key and key is value and query.ndim == 3
        options = {name: value for name, value in kwargs.items() if value is not None}
        if not is_self or args or options != {"need_weights": False}:
            return super().forward(query, key, value, *args, **kwargs)
        projected = F.linear(query, self.in_proj_weight, self.in_proj_bias)
        parts = projected.unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        heads = blocked_attention(*parts) if is_blocked_faster(*parts) else F.scaled_dot_product_attention(*parts)
        return self.out_proj(heads.transpose(1, 2).flatten(2)), None


def use_self_attention(encoder: nn.Module) -> None:
    """Turns an encoder's nn.MultiheadAttention into SelfAttention; the weights and their names stay."""
    for module in encoder.modules():
        if type(module) is not nn.MultiheadAttention or not module.batch_first or module.dropout:
            continue
        attention: Any = module
        if attention._qkv_same_embed_dim and attention.bias_k is None and not attention.add_zero_attn:
            attention.__class__ = SelfAttention
