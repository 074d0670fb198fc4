"""Trying what architectures do not say about themselves, without leaving a trace in the model that is tried."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

HALF_TYPES = (torch.bfloat16, torch.float16)


@contextlib.contextmanager
def probing(module: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; each module gets its own mode back, whatever happens.

    Nothing is compiled: flex attention would compile for minutes to see a dozen tokens.
    """
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for part, was_training in modes:
            part.training = was_training


@contextlib.contextmanager
def held_in_float32(module: nn.Module) -> Iterator[None]:
    """Weights and buffers of 16 bits as fp32 values; afterwards they are the old ones, bit for bit.

    For comparisons that rounding must not decide. A real LLM has activations of hundreds, so that in bf16 two
    computations of the same thing differ by a quarter of its logits.
    """
    held = {id(value): value for value in [*module.parameters(), *module.buffers()] if value.dtype in HALF_TYPES}
    before = {key: value.data for key, value in held.items()}
    try:
        for value in held.values():
            value.data = value.data.float()
        yield
    finally:
        for key, value in held.items():
            value.data = before[key]


def moved_by_rounding(module: nn.Module, compute: Callable[[], list[Tensor]]) -> float:
    """How far what a module in 16 bits computes is from the same in fp32; 0 where it has no 16 bits."""
    if not any(value.dtype in HALF_TYPES for value in module.parameters()):
        return 0.0
    rounded = compute()
    with held_in_float32(module):
        exact = compute()
    return max((float((one - other).abs().max()) for one, other in zip(rounded, exact, strict=True)), default=0.0)


def spread_of(one: Tensor, other: Tensor) -> float:
    """How far logits [..., V] of the same shape lie apart, as a share of the largest; NaN where one is not finite."""
    one, other = one.float(), other.float()
    return float((one - other).abs().max() / one.abs().max())
