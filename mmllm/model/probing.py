"""Tests a model for properties that architectures do not declare, and leaves the model unchanged."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

HALF_TYPES = (torch.bfloat16, torch.float16)


@contextlib.contextmanager
def probing(module: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards, also after an error, each module gets its own mode back.

    Nothing is compiled: flex attention would compile for minutes to process a dozen tokens.
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
    """Holds 16-bit weights and buffers in fp32 inside the block; then restores the old ones, bit for bit.

    For comparisons that rounding must not decide. A real LLM has activations in the hundreds, so two bf16
    computations of the same thing differ by a quarter of its logits.
    """
    held = {id(value): value for value in [*module.parameters(), *module.buffers()] if value.dtype in HALF_TYPES}
    originals = {key: value.data for key, value in held.items()}
    try:
        for value in held.values():
            value.data = value.data.float()
        yield
    finally:
        for key, value in held.items():
            value.data = originals[key]


def rounding_error(module: nn.Module, compute: Callable[[], list[Tensor]]) -> float:
    """The largest difference between what a 16-bit module computes and the same in fp32; 0 for an fp32 module."""
    if not any(value.dtype in HALF_TYPES for value in module.parameters()):
        return 0.0
    rounded = compute()
    with held_in_float32(module):
        exact = compute()
    return max((float((low - full).abs().max()) for low, full in zip(rounded, exact, strict=True)), default=0.0)


def relative_difference(logits: Tensor, others: Tensor) -> float:
    """The largest difference of two logits [..., V], as a share of the first's largest; NaN if one is not finite."""
    logits, others = logits.float(), others.float()
    return float((logits - others).abs().max() / logits.abs().max())
