"""Fused linear cross entropy: the forward pass computes the gradients, so logits are neither stored nor recomputed.

Hidden states are processed in chunks: logits, loss and both gradients, in the memory of one chunk. Liger's fused kernel
does the same (https://arxiv.org/abs/2410.10989); this is in torch's own operations. The softmax of a chunk overwrites
its logits a few rows at a time, so that they stay in the processor's cache.

Shapes: `K` supervised rows, `D` LLM width, `V` vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

SOFTMAX_LOGITS = 2**18  # 1 MB in float32


def is_plain_linear(head: Any) -> bool:
    """Whether a head is a plain weight matrix: no bias, adapter or hook, neither quantized nor sharded."""
    if type(head) is not nn.Linear or "bias" in dict(head.named_parameters()):
        return False
    has_hooks = bool(head._forward_hooks) or bool(head._forward_pre_hooks)
    return not has_hooks and type(head.weight) is nn.Parameter and head.weight.ndim == 2


def linear_loss_sum(hidden: Tensor, weight: Tensor, targets: Tensor, *, chunk_tokens: int) -> Tensor:
    """Cross entropy summed over rows: [K, D], [V, D], [K] -> []. Backward can run only once."""
    loss: Tensor = _LinearLoss.apply(hidden, weight, targets, chunk_tokens)  # type: ignore[no-untyped-call]
    return loss


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk_tokens: int) -> Tensor:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        matrix = weight.to(dtype)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight: Tensor | None = None
        total = torch.zeros((), device=hidden.device)
        with torch.autocast(device, enabled=False):
            for start in range(0, len(targets), chunk_tokens):
                rows, target = hidden[start : start + chunk_tokens].to(dtype), targets[start : start + chunk_tokens]
                logits = rows @ matrix.T
                total += _loss_to_grad(logits, target)
                if grad_hidden is not None:
                    grad_hidden[start : start + chunk_tokens] = logits @ matrix
                if needs_weight:
                    added = logits.T @ rows
                    grad_weight = added.float() if grad_weight is None else grad_weight.add_(added)
        if needs_weight and grad_weight is None:  # no row is supervised; other ranks still wait for this gradient
            grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        ctx.save_for_backward(grad_hidden)
        ctx.grad_weight = grad_weight  # the only reference, so that it becomes the weight's gradient without a copy
        ctx.dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_hidden,), grad_weight, grad_output = ctx.saved_tensors, ctx.grad_weight, grad_outputs[0]
        ctx.grad_weight = None
        scaled_hidden = None if grad_hidden is None else grad_hidden * grad_output.to(grad_hidden.dtype)
        scaled_weight = None if grad_weight is None else grad_weight.mul_(grad_output).to(ctx.dtype)
        return scaled_hidden, scaled_weight, None, None


def _loss_to_grad(logits: Tensor, targets: Tensor) -> Tensor:
    """The summed loss [] of logits [K, V], which become their own gradient: softmax, less one at the target."""
    total = torch.zeros((), device=logits.device)
    size = max(1, SOFTMAX_LOGITS // logits.shape[1])
    for part, target in zip(logits.split(size), targets.split(size), strict=True):
        columns = target[:, None]
        probs = part.softmax(1, dtype=torch.float32)
        highest = part.amax(1, keepdim=True).float()  # its probability is never 0, as the target's may be
        total += (highest - part.gather(1, columns).float() - probs.amax(1, keepdim=True).log()).sum()
        part.copy_(probs.scatter_add_(1, columns, probs.new_full(columns.shape, -1.0)))
    return total
