"""What a backward pass needs and leaves: the bytes that a forward keeps for it, and the gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def saved_bytes(forward: Callable[[], Tensor]) -> int:
    """What a forward keeps for its backward, each storage once."""
    found: dict[int, int] = {}
    kept = []  # so that no address is given out twice

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(found.values())


def gradients(module: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])
