"""Tables: values that a module computes when it is built and that no weights file holds, such as rotary positions.

Rotary positions of EVA-02 and PE-Core, index tables and masks of Swin, zero biases of EVA-01: buffers that torch leaves
out of `state_dict`. A model that is built without memory and filled from a file must compute them again. transformers
does so for its own classes, in `_init_weights`; timm leaves it to the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn


def tables(module: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """(owner, name, value) of every tensor that is neither a parameter nor in `state_dict`, also plain attributes."""
    for owner in module.modules():
        for name in sorted(owner._non_persistent_buffers_set):
            if (value := owner._buffers.get(name)) is not None:
                yield owner, name, value
        for name, value in vars(owner).items():
            if isinstance(value, Tensor):
                yield owner, name, value


def compute_tables(module: nn.Module, build: Callable[[], nn.Module]) -> None:
    """Gives a module that was built without memory the tables that `build` computes; dtypes and devices stay.

    `build` builds the same module again. Its parameters take memory only where a table depends on one.
    """
    if next(tables(module), None) is None:
        return
    from accelerate import init_empty_weights

    try:
        with init_empty_weights(include_buffers=False):
            computed = list(tables(build()))
    except (NotImplementedError, RuntimeError):  # a table is created on the device of a parameter, here meta
        computed = list(tables(build()))
    if any(value.is_meta for _, _, value in computed):
        computed = list(tables(build()))
    old_tables = list(tables(module))
    default_device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    assert [name for _, name, _ in old_tables] == [name for _, name, _ in computed]
    for (owner, name, old), (_, _, value) in zip(old_tables, computed, strict=True):
        device = default_device if old.is_meta else old.device
        setattr(owner, name, value.to(device=device, dtype=old.dtype))
