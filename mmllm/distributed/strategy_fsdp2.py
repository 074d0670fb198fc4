"""FSDP2: every rank holds a shard of weights, gradients and optimizer states. torch's `fully_shard`, on GPUs or gloo.

https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
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

from mmllm.distributed.state_io import StateIO
from mmllm.distributed.strategy import Strategy, check_divisible
from mmllm.model.tower import VisionTower
from mmllm.optimizers.optim import build_optimizers


def _whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def _local(value: Tensor) -> Tensor:
    return value.to_local() if isinstance(value, DTensor) else value


def repeated_blocks(module: nn.Module) -> list[nn.Module]:
    """The layers that are gathered one at a time: every outermost list of modules of one class.

    Layers of a vision tower are not among them: how often a tower runs depends on a rank's images, and all ranks take
    part in gathering. The tower is gathered together with the parameters outside of blocks, for the whole forward and
    backward.
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


class FSDP2StateIO(StateIO):
    has_shards = True

    def __init__(
        self, module: nn.Module, trained: Mapping[str, nn.Parameter], optimizers: Sequence[torch.optim.Optimizer]
    ):
        super().__init__(trained, optimizers)
        self.module = module

    def whole_weights(self) -> dict[str, Tensor]:
        return {name: _whole(parameter.detach()).cpu() for name, parameter in self.trained.items()}

    def _shards(self) -> dict[str, Any]:
        options = StateDictOptions(ignore_frozen_params=True)
        optimizer = get_optimizer_state_dict(self.module, tuple(self.optimizers), options=options)
        weights = {name: parameter.detach() for name, parameter in self.trained.items()}
        return {"weights": weights, "optimizer": optimizer}

    def save_shards(self, folder: Path) -> None:
        save(self._shards(), checkpoint_id=folder)

    def load_shards(self, folder: Path, *, saved_by: int) -> None:
        shards = self._shards()
        load(shards, checkpoint_id=folder)  # in place: each rank reads the rows that it holds
        options = StateDictOptions(ignore_frozen_params=True)
        set_optimizer_state_dict(self.module, tuple(self.optimizers), shards["optimizer"], options=options)

    def local_weights(self) -> dict[str, Tensor]:
        return {name: _local(parameter.detach()) for name, parameter in self.trained.items()}

    def reread(self, folder: Path) -> dict[str, Tensor]:
        weights = {name: torch.empty_like(parameter.detach()) for name, parameter in self.trained.items()}
        load({"weights": weights}, checkpoint_id=folder)
        for optimizer in self.optimizers:
            optimizer.state.clear()  # to save it, torch made a state, by a step without gradients
        return {name: _local(value) for name, value in weights.items()}


class FSDP2(Strategy):
    name = "fsdp2"
    is_sharded = True

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
            # weights are gathered in their own dtype, and autocast computes in bf16: losses equal those of DDP
            "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False),
            "offload_policy": OffloadPolicy() if device.type == "cpu" else plugin.cpu_offload,
        }
        for block in repeated_blocks(module):  # one after the other, so that no GPU ever holds the whole model
            fully_shard(block.to(device), **options)
        fully_shard(module.to(device), **options)
        sharded = dict(module.named_parameters())
        self.parts = {
            part: [(name, sharded[names[id(parameter)]]) for name, parameter in named]
            for part, named in self.parts.items()
        }
        self.optimizers = build_optimizers(module, self.parts, self.config.optim, depths=self.depths)
        return module

    def _build_state_io(self) -> StateIO:
        return FSDP2StateIO(self.module, self.trained, self.optimizers)

    @contextlib.contextmanager
    def micro_batch(self, *, is_last: bool) -> Iterator[None]:
        module: Any = self.module
        module.set_requires_gradient_sync(is_last)
        with self.autocast():
            yield

    def clip(self) -> Tensor:
        norm = torch.nn.utils.clip_grad_norm_(list(self.trained.values()), self.config.optim.max_grad_norm)
        return _whole(norm)

    def gradient_norms(self, groups: Sequence[Sequence[nn.Parameter]]) -> Tensor | None:
        total = torch.zeros(len(groups), device=self.accelerator.device)
        for number, parameters in enumerate(groups):
            for parameter in parameters:
                if isinstance(parameter.grad, DTensor):
                    total[number] += parameter.grad.to_local().float().square().sum()
        torch.distributed.all_reduce(total)
        return total.sqrt()

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """Gathers the parameters outside of blocks: embeddings, head and projector, which generation calls directly."""
        module: Any = self.module
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
        try:
            with self.autocast():
                yield
        finally:
            module.reshard()
            module.set_reshard_after_forward(self.reshards, recurse=False)
