"""How several processes share one step: DDP (a whole copy each), FSDP2, or DeepSpeed's ZeRO, as accelerate was told.

`accelerate launch --config_file configs/accelerate/fsdp2.yaml` says which by its environment; accelerate's own plugins
read the options from there. The loop only knows a Strategy. One process without a launcher is DDP without anything to
share.

A strategy's state is saved so that any number of ranks can load it: whole tensors in one file for DDP and ZeRO (each
can load the other's), shards of torch.distributed.checkpoint for FSDP2.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmllm.config import ConfigError, OptimConfig, RunConfig
from mmllm.optimizers.optim import Parts, build_optimizers, group_norms, set_learning_rates


class Strategy:
    """DDP through accelerate, and what the others have in common.

    Attributes:
        module: what is called with a batch and gives its loss.
        parts: the trained parameters as this rank holds them, by part and name.
        is_sharded: whether no rank holds all weights, so that all have to take part in every forward, also of
            validation, and the finished weights have to be gathered.
    """

    name = "ddp"
    has_shards = False  # each rank saves a part of the state
    is_sharded = False

    def __init__(self, accelerator: Any, module: nn.Module, parts: Parts, config: RunConfig, depths: Mapping[str, int]):
        self.accelerator, self.config, self.depths = accelerator, config, depths
        self.parts: dict[str, list[tuple[str, nn.Parameter]]] = {part: list(named) for part, named in parts.items()}
        self.optimizers: list[torch.optim.Optimizer] = []
        self.module = self._prepare(module)

    def _prepare(self, module: nn.Module) -> nn.Module:
        prepared: nn.Module = self.accelerator.prepare(module)
        self.optimizers = build_optimizers(module, self.parts, self.config.optim, depths=self.depths)
        return prepared

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        return {name: parameter for named in self.parts.values() for name, parameter in named}

    @contextlib.contextmanager
    def micro_batch(self, *, is_last: bool) -> Iterator[None]:
        """Around forward and backward of a micro-batch: gradients are reduced over ranks behind the last one only."""
        with contextlib.nullcontext() if is_last else self.accelerator.no_sync(self.module):
            yield

    def autocast(self) -> torch.autocast:
        """What accelerate lays around a module's forward under DDP: weights as they are held, computed in bf16."""
        is_bf16 = self.config.compute.precision == "bf16"
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=is_bf16)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def set_rates(self, factor: float) -> None:
        set_learning_rates(self.optimizers, factor)

    def clip(self) -> Tensor:
        """Scales the gradients of the step down to `max_grad_norm`. Gives their norm before, over all ranks: []."""
        return torch.nn.utils.clip_grad_norm_(list(self.trained.values()), self.config.optim.max_grad_norm)

    def gradient_norms(self, groups: Sequence[Sequence[nn.Parameter]]) -> list[float] | None:
        """The gradient's norm over each group of parameters; None where it cannot be known."""
        return group_norms(groups)

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def whole_state(self) -> dict[str, Any]:
        """Weights and optimizers as whole tensors. Every rank has to call it; only the main one needs what it gives."""
        return {
            "weights": {name: parameter.detach() for name, parameter in self.trained.items()},
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }

    def load_whole_state(self, state: Mapping[str, Any]) -> None:
        load_weights(self.parts, state["weights"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)

    def save_shards(self, folder: Path) -> None:
        """This rank's part of the state, where it is not whole."""

    def load_shards(self, folder: Path, *, saved_by: int) -> None:
        """What `save_shards` of `saved_by` ranks wrote."""

    def own_weights(self) -> dict[str, Tensor]:
        """The trained weights as far as this rank holds them, for comparing; no copy."""
        return {name: parameter.detach() for name, parameter in self.trained.items()}

    def reread(self, folder: Path) -> dict[str, Tensor]:
        """`own_weights` as they stand in what `save_shards` wrote before the first step. Every rank has to call it."""
        raise NotImplementedError

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """Around forwards that begin inside the module, as answers do."""
        yield


@torch.no_grad()
def load_weights(parts: Parts, weights: Mapping[str, Tensor]) -> None:
    """Puts whole tensors into the trained parameters of the same names."""
    for named in parts.values():
        for name, parameter in named:
            parameter.copy_(weights[name])


def check_divisible(strategy: str, module: nn.Module, config: OptimConfig) -> None:
    """Raises ConfigError for what works on whole tensors only."""
    if config.kind != "adamw":
        raise ConfigError(
            f"optim.kind: {config.kind} works on whole tensors, which {strategy} divides; use adamw, or launch with DDP"
        )
    if any(not parameter.is_floating_point() for parameter in module.parameters()):
        raise ConfigError(
            f"lora.quantise: {strategy} cannot divide quantised weights; leave it out, or launch with DDP"
        )
