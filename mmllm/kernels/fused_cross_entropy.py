"""Cross entropy behind a linear head whose gradients are found with the logits: none are kept, or made twice.

Rows of hidden states are taken chunk by chunk: logits, loss, and both gradients, in the memory of one chunk. That is
what Liger's fused kernel does (https://arxiv.org/abs/2410.10989), in torch's own operations. The softmax of a chunk is
made a few rows at a time, in its logits' place, so that what it reads again still lies in the processor's cache.

Shapes: `K` supervised rows, `D` LLM width, `V` vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

SOFTMAX_LOGITS = 2**18  # 1 MB in float32


def is_plain_linear(head: Any) -> bool:
    """Whether a head is its weight and nothing else: no bias, adapter, hook, few bits, or share of it elsewhere."""
    if type(head) is not nn.Linear or "bias" in dict(head.named_parameters()):
        return False
    has_hooks = bool(head._forward_hooks) or bool(head._forward_pre_hooks)
    return not has_hooks and type(head.weight) is nn.Parameter and head.weight.ndim == 2


def linear_loss_sum(hidden: Tensor, weight: Tensor, targets: Tensor, *, chunk_tokens: int) -> Tensor:
    """Cross entropy summed over rows: [K, D], [V, D], [K] -> []. Its gradient can be taken once."""
    loss: Tensor = _LinearLoss.apply(hidden, weight, targets, chunk_tokens)  # type: ignore[no-untyped-call]
    return loss


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk_tokens: int) -> Tensor:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        matrix = weight.to(dtype)
        of_hidden = torch.empty_like(hidden) if needs_hidden else None
        of_weight: Tensor | None = None
        total = torch.zeros((), device=hidden.device)
        with torch.autocast(device, enabled=False):
            for start in range(0, len(targets), chunk_tokens):
                rows, wanted = hidden[start : start + chunk_tokens].to(dtype), targets[start : start + chunk_tokens]
                logits = rows @ matrix.T
                total += _to_slopes(logits, wanted)
                if of_hidden is not None:
                    of_hidden[start : start + chunk_tokens] = logits @ matrix
                if needs_weight:
                    more = logits.T @ rows
                    of_weight = more.float() if of_weight is None else of_weight.add_(more)
        if needs_weight and of_weight is None:  # no row is supervised; other ranks still wait for this gradient
            of_weight = torch.zeros_like(weight, dtype=torch.float32)
        ctx.save_for_backward(of_hidden)
        ctx.of_weight = of_weight  # nobody else holds it, so that it becomes the weight's gradient without a copy
        ctx.dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *scales: Tensor) -> tuple[Tensor | None, ...]:
        (of_hidden,), of_weight, scale = ctx.saved_tensors, ctx.of_weight, scales[0]
        ctx.of_weight = None
        for_hidden = None if of_hidden is None else of_hidden * scale.to(of_hidden.dtype)
        for_weight = None if of_weight is None else of_weight.mul_(scale).to(ctx.dtype)
        return for_hidden, for_weight, None, None


def _to_slopes(logits: Tensor, targets: Tensor) -> Tensor:
    """The loss [] of logits [K, V], in whose place its slopes are put: softmax, less one where the target stands."""
    total = torch.zeros((), device=logits.device)
    size = max(1, SOFTMAX_LOGITS // logits.shape[1])
    for part, wanted in zip(logits.split(size), targets.split(size), strict=True):
        at = wanted[:, None]
        chances = part.softmax(1, dtype=torch.float32)
        highest = part.amax(1, keepdim=True).float()  # its chance is never 0, as the target's may be
        total += (highest - part.gather(1, at).float() - chances.amax(1, keepdim=True).log()).sum()
        part.copy_(chances.scatter_add_(1, at, chances.new_full(at.shape, -1.0)))
    return total
