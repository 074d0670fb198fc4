"""Cross entropy behind a linear head whose gradients are found with the logits: none are kept, or made twice.

Rows of hidden states are taken chunk by chunk: logits, loss, and both gradients, in the memory of one chunk. That is
what Liger's fused kernel does (https://arxiv.org/abs/2410.10989), in torch's own operations.

Shapes: `K` supervised rows, `D` LLM width, `V` vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


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
        of_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        total = torch.zeros((), device=hidden.device)
        with torch.autocast(device, enabled=False):
            for start in range(0, len(targets), chunk_tokens):
                rows, wanted = hidden[start : start + chunk_tokens].to(dtype), targets[start : start + chunk_tokens]
                logits = (rows @ matrix.T).float()
                norms = logits.logsumexp(1, keepdim=True)
                total += (norms - logits.gather(1, wanted[:, None])).sum()
                if not needs_hidden and not needs_weight:
                    continue
                slopes = logits.sub_(norms).exp_()  # softmax, less one where the target stands
                slopes.scatter_add_(1, wanted[:, None], slopes.new_full((len(wanted), 1), -1.0))
                slopes = slopes.to(dtype)
                if of_hidden is not None:
                    of_hidden[start : start + chunk_tokens] = slopes @ matrix
                if of_weight is not None:
                    of_weight += slopes.T @ rows
        ctx.save_for_backward(of_hidden, of_weight)
        ctx.dtypes = hidden.dtype, weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *scales: Tensor) -> tuple[Tensor | None, ...]:
        of_hidden, of_weight = ctx.saved_tensors
        for_hidden = None if of_hidden is None else of_hidden * scales[0].to(of_hidden.dtype)
        for_weight = None if of_weight is None else of_weight.mul_(scales[0]).to(ctx.dtypes[1])
        return for_hidden, for_weight, None, None
