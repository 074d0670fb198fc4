"""How several processes share one step: DDP (a whole copy each), FSDP2, or DeepSpeed's ZeRO, as accelerate was told.

`accelerate launch --config_file configs/accelerate/fsdp2.yaml` says which by its environment; accelerate's own plugins
read the options from there. The loop only knows a Strategy. One process without a launcher is DDP with nothing to
share. `state_io.py` says how what a strategy holds is saved and loaded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmllm.config import ConfigError, OptimConfig, RunConfig
from mmllm.distributed.state_io import StateIO
from mmllm.optimizers.optim import Parts, build_optimizers, gradient_norm, set_learning_rates


class Strategy:
    """A step under DDP through accelerate; subclasses make the step of FSDP2 and ZeRO.

    Attributes:
        module: called with a batch, it returns the loss.
        parts: the trained parameters as this rank holds them, by part and name.
        state_io: how parameters and optimizers are saved and loaded.
        is_sharded: whether no rank holds all weights, so that every rank takes part in every forward, also of
            validation, and the finished weights have to be gathered.
    """

    name = "ddp"
    is_sharded = False

    def __init__(self, accelerator: Any, module: nn.Module, parts: Parts, config: RunConfig, depths: Mapping[str, int]):
        self.accelerator, self.config, self.depths = accelerator, config, depths
        self.parts: dict[str, list[tuple[str, nn.Parameter]]] = {part: list(named) for part, named in parts.items()}
        self.optimizers: list[torch.optim.Optimizer] = []
        self.module = self._prepare(module)
        self.state_io = self._build_state_io()

    def _prepare(self, module: nn.Module) -> nn.Module:
        prepared: nn.Module = self.accelerator.prepare(module)
        self.optimizers = build_optimizers(module, self.parts, self.config.optim, depths=self.depths)
        return prepared

    def _build_state_io(self) -> StateIO:
        return StateIO(self.trained, self.optimizers)

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        return {name: parameter for named in self.parts.values() for name, parameter in named}

    @contextlib.contextmanager
    def micro_batch(self, *, is_last: bool) -> Iterator[None]:
        """Around forward and backward of a micro-batch: gradients are reduced over ranks after the last one only."""
        with contextlib.nullcontext() if is_last else self.accelerator.no_sync(self.module):
            yield

    def autocast(self) -> torch.autocast:
        """The autocast that accelerate puts around a module's forward under DDP: weights keep their dtype."""
        is_bf16 = self.config.compute.precision == "bf16"
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=is_bf16)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def set_learning_rates(self, lr_multiplier: float) -> None:
        set_learning_rates(self.optimizers, lr_multiplier)

    def clip(self) -> Tensor:
        """Scales the gradients of the step down to `max_grad_norm`. Returns their norm before, over all ranks: []."""
        return torch.nn.utils.clip_grad_norm_(list(self.trained.values()), self.config.optim.max_grad_norm)

    def gradient_norms(self, groups: Sequence[Sequence[nn.Parameter]]) -> Tensor | None:
        """The norm of the gradients of each group of parameters, over all ranks: [groups]; None if it is not known."""
        return torch.stack([gradient_norm(parameters) for parameters in groups])

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """Around forwards that call a submodule of `module`, as generation does."""
        yield


def check_divisible(strategy: str, module: nn.Module, config: OptimConfig) -> None:
    """Raises ConfigError for settings that need whole tensors."""
    if config.kind != "adamw":
        raise ConfigError(
            f"optim.kind: {config.kind} works on whole tensors, which {strategy} divides; use adamw, or launch with DDP"
        )
    if any(not parameter.is_floating_point() for parameter in module.parameters()):
        raise ConfigError(
            f"lora.quantise: {strategy} cannot divide quantised weights; leave it out, or launch with DDP"
        )
