"""FSDP2: every rank holds its share of weights, gradients and optimizer state. torch's `fully_shard`, on GPUs or gloo.

https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from mmllm.distributed.strategy import Strategy, check_divisible
from mmllm.model.tower import VisionTower
from mmllm.optimizers.optim import build_optimizers


def _whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def _own(value: Tensor) -> Tensor:
    return value.to_local() if isinstance(value, DTensor) else value


def repeated_blocks(module: nn.Module) -> list[nn.Module]:
    """The layers that are gathered one at a time: every list of equal modules, the outermost.

    Not those of a vision tower: how often it runs depends on a rank's images, and gathering takes all ranks. It is
    gathered with all that is in no block, for as long as a forward and backward last.
    """
    blocks: list[nn.Module] = []
    for child in module.children():
        if isinstance(child, VisionTower):
            continue
        layers = list(child) if isinstance(child, nn.ModuleList | nn.Sequential) else []
        is_stack = len(layers) > 1 and len({type(layer) for layer in layers}) == 1
        has_weights = any(True for _ in child.parameters())
        blocks += layers if is_stack and has_weights else repeated_blocks(child)
    return blocks


class FSDP2(Strategy):
    name = "fsdp2"
    has_shards = is_sharded = True

    def _prepare(self, module: nn.Module) -> nn.Module:
        from accelerate import FullyShardedDataParallelPlugin

        check_divisible("FSDP2", module, self.config.optim)
        plugin = FullyShardedDataParallelPlugin()
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        device = self.accelerator.device
        self.reshards = bool(plugin.reshard_after_forward)
        options: dict[str, Any] = {
            "mesh": init_device_mesh(device.type, (self.accelerator.num_processes,)),
            "reshard_after_forward": self.reshards,
            # weights travel as they are held, and autocast computes in bf16, so that numbers are those of DDP
            "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False),
            "offload_policy": OffloadPolicy() if device.type == "cpu" else plugin.cpu_offload,
        }
        for block in repeated_blocks(module):  # one after the other, so that no GPU ever holds the whole
            fully_shard(block.to(device), **options)
        fully_shard(module.to(device), **options)
        sharded = dict(module.named_parameters())
        self.parts = {
            part: [(name, sharded[names[id(parameter)]]) for name, parameter in named]
            for part, named in self.parts.items()
        }
        self.optimizers = build_optimizers(module, self.parts, self.config.optim, depths=self.depths)
        return module

    @contextlib.contextmanager
    def micro_batch(self, *, is_last: bool) -> Iterator[None]:
        module: Any = self.module
        module.set_requires_gradient_sync(is_last)
        with self.autocast():
            yield

    def clip(self) -> Tensor:
        norm = torch.nn.utils.clip_grad_norm_(list(self.trained.values()), self.config.optim.max_grad_norm)
        return _whole(norm)

    def gradient_norms(self, groups: Sequence[Sequence[nn.Parameter]]) -> list[float] | None:
        total = torch.zeros(len(groups), device=self.accelerator.device)
        for number, parameters in enumerate(groups):
            for parameter in parameters:
                if isinstance(parameter.grad, DTensor):
                    total[number] += parameter.grad.to_local().float().square().sum()
        torch.distributed.all_reduce(total)
        norms: list[float] = total.sqrt().tolist()
        return norms

    def whole_state(self) -> dict[str, Any]:
        """The trained weights alone: what the finished checkpoint needs."""
        return {"weights": {name: _whole(parameter.detach()).cpu() for name, parameter in self.trained.items()}}

    def _shards(self) -> dict[str, Any]:
        options = StateDictOptions(ignore_frozen_params=True)
        optimizer = get_optimizer_state_dict(self.module, self.optimizers, options=options)
        weights = {name: parameter.detach() for name, parameter in self.trained.items()}
        return {"weights": weights, "optimizer": optimizer}

    def save_shards(self, folder: Path) -> None:
        save(self._shards(), checkpoint_id=folder)

    def load_shards(self, folder: Path, *, saved_by: int) -> None:
        shards = self._shards()
        load(shards, checkpoint_id=folder)  # in place: each rank reads what it holds
        options = StateDictOptions(ignore_frozen_params=True)
        set_optimizer_state_dict(self.module, self.optimizers, shards["optimizer"], options=options)

    def own_weights(self) -> dict[str, Tensor]:
        return {name: _own(parameter.detach()) for name, parameter in self.trained.items()}

    def reread(self, folder: Path) -> dict[str, Tensor]:
        weights = {name: torch.empty_like(parameter.detach()) for name, parameter in self.trained.items()}
        load({"weights": weights}, checkpoint_id=folder)
        for optimizer in self.optimizers:
            optimizer.state.clear()  # torch made one, of a step with no gradient, for what was saved
        return {name: _own(value) for name, value in weights.items()}

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """Holds the weights of no block whole: embeddings, head and projector, which answers use from outside."""
        module: Any = self.module
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
        try:
            with self.autocast():
                yield
        finally:
            module.reshard()
            module.set_reshard_after_forward(self.reshards, recurse=False)
