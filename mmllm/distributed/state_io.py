"""Saving and loading of a strategy's weights and optimizer states; this file has the whole tensors of DDP.

A saved state loads on any number of ranks. DDP saves whole tensors in one file, FSDP2 shards of
torch.distributed.checkpoint, ZeRO the shards of DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class StateIO:
    """Whole tensors: every rank holds all of them. Subclasses save and load shards.

    Attributes:
        trained: the trained parameters by name, as this rank holds them.
        has_shards: whether each rank saves a part of the state.
    """

    has_shards = False

    def __init__(self, trained: Mapping[str, nn.Parameter], optimizers: Sequence[torch.optim.Optimizer]):
        self.trained, self.optimizers = trained, optimizers

    def whole_weights(self) -> dict[str, Tensor]:
        """The trained weights as whole tensors. Where there are shards, every rank has to call it."""
        return {name: parameter.detach() for name, parameter in self.trained.items()}

    def whole_state(self) -> dict[str, Any]:
        """Weights and optimizer states as whole tensors; only for strategies without shards."""
        return {"weights": self.whole_weights(), "optimizers": [each.state_dict() for each in self.optimizers]}

    def load_whole_state(self, state: Mapping[str, Any]) -> None:
        load_weights(self.trained.items(), state["weights"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)

    def save_shards(self, folder: Path) -> None:
        """Saves this rank's part of the state. Every rank has to call it."""
        raise NotImplementedError

    def load_shards(self, folder: Path, *, saved_by: int) -> None:
        """Loads what `save_shards` of `saved_by` ranks wrote. Every rank has to call it."""
        raise NotImplementedError

    def local_weights(self) -> dict[str, Tensor]:
        """The trained weights that this rank holds, for a comparison; not a copy."""
        return {name: parameter.detach() for name, parameter in self.trained.items()}

    def reread(self, folder: Path) -> dict[str, Tensor]:
        """`local_weights`, read back from the shards saved before the first step. Every rank has to call it."""
        raise NotImplementedError


@torch.no_grad()
def load_weights(named: Iterable[tuple[str, nn.Parameter]], weights: Mapping[str, Tensor]) -> None:
    """Copies whole tensors into the parameters of the same names."""
    for name, parameter in named:
        parameter.copy_(weights[name])
