"""DeepSpeed's ZeRO stages 1 to 3. https://www.deepspeed.ai/tutorials/zero/

Its engine makes the update itself. Gradients are partitioned while they are computed, so the norm of one part is not
known, and a norm that is not finite is seen after the update, not before it. Saved states are not touched by that.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmllm.config import ConfigError
from mmllm.distributed.state_io import StateIO
from mmllm.distributed.strategy import Strategy, check_divisible
from mmllm.optimizers.optim import build_optimizers

_TAG, _UNIVERSAL = "ranks", "universal"


class ZeROStateIO(StateIO):
    has_shards = True

    def __init__(self, strategy: ZeRO):
        super().__init__(strategy.trained, strategy.optimizers)
        self.engine, self.accelerator, self.is_sharded = strategy.engine, strategy.accelerator, strategy.is_sharded

    def whole_weights(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_fp32_param

        return {name: safe_get_full_fp32_param(parameter).cpu() for name, parameter in self.trained.items()}

    def save_shards(self, folder: Path) -> None:
        self.engine.save_checkpoint(str(folder), tag=_TAG, save_latest=False, exclude_frozen_parameters=True)

    def local_weights(self) -> dict[str, Tensor]:
        return {name: self._local(parameter).cpu().clone() for name, parameter in self.trained.items()}

    def _local(self, parameter: Any) -> Tensor:
        local: Tensor = parameter.ds_tensor if self.is_sharded else parameter.detach()
        return local

    def reread(self, folder: Path) -> dict[str, Tensor]:
        """DeepSpeed reads into the model only, so the weights are set to zero first."""
        for parameter in self.trained.values():
            self._local(parameter).zero_()
        self.load_shards(folder, saved_by=self.accelerator.num_processes)
        return self.local_weights()

    def load_shards(self, folder: Path, *, saved_by: int) -> None:
        """DeepSpeed's files fit the number of ranks that wrote them; for another one they are made universal first."""
        is_universal = saved_by != self.accelerator.num_processes
        if is_universal and self.accelerator.is_main_process:
            from deepspeed.checkpoint.ds_to_universal import main as make_universal

            with contextlib.redirect_stdout(io.StringIO()):
                make_universal(_universal_arguments(folder))
        self.accelerator.wait_for_everyone()
        (optimizer,) = self.optimizers
        options = [{key: group[key] for key in group if key != "params"} for group in optimizer.param_groups]
        self.engine._config.load_universal_checkpoint = is_universal
        self.engine.load_checkpoint(str(folder), tag=_UNIVERSAL if is_universal else _TAG, load_module_strict=False)
        self.engine._config.load_universal_checkpoint = False
        # DeepSpeed 0.19 gives every group the options of the first, and all of them one shared step counter
        for group, group_options in zip(optimizer.param_groups, options, strict=True):
            group.update(group_options)
        for state in optimizer.state.values():
            if isinstance(step := state.get("step"), Tensor):
                state["step"] = step.clone()


class ZeRO(Strategy):
    name = "zero"

    def _prepare(self, module: nn.Module) -> nn.Module:
        try:
            import deepspeed
        except ImportError as error:
            raise ConfigError("ZeRO needs DeepSpeed: install mmllm[scale]") from error
        from accelerate import DeepSpeedPlugin

        check_divisible("ZeRO", module, self.config.optim)
        settings = DeepSpeedPlugin().deepspeed_config
        self.stage = int(settings["zero_optimization"]["stage"])
        self.is_sharded = self.stage == 3
        if self.is_sharded and hasattr(module, "always_runs_tower"):
            conversations: Any = module
            conversations.always_runs_tower = True  # a frozen tower is partitioned too, and all ranks gather it
        compute = self.config.compute
        settings = {
            **settings,
            "train_micro_batch_size_per_gpu": compute.batch_size,
            "gradient_accumulation_steps": compute.accumulate_steps,
            "train_batch_size": compute.batch_size * compute.accumulate_steps * self.accelerator.num_processes,
            "gradient_clipping": self.config.optim.max_grad_norm,
            "bf16": {"enabled": False},  # see `autocast`
            "zero_optimization": {**settings["zero_optimization"], "memory_efficient_linear": False},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 10**9,
        }
        (optimizer,) = self.optimizers = build_optimizers(module, self.parts, self.config.optim, depths=self.depths)
        module.to(self.accelerator.device)
        self.engine, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=settings, dist_init_required=False
        )
        engine: nn.Module = self.engine
        return engine

    def _build_state_io(self) -> StateIO:
        return ZeROStateIO(self)

    @contextlib.contextmanager
    def micro_batch(self, *, is_last: bool) -> Iterator[None]:
        self.engine.set_gradient_accumulation_boundary(is_last)
        with self.autocast():
            yield

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        with self.autocast():
            yield

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss, scale_wrt_gas=False)

    def clip(self) -> Tensor:
        """The engine clips and steps in one call, so the update is made here."""
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        return torch.as_tensor(math.nan if norm is None else norm)

    def gradient_norms(self, groups: Sequence[Sequence[nn.Parameter]]) -> Tensor | None:
        return None

    def step(self) -> None:
        """Nothing: `clip` has made the step."""


def _universal_arguments(folder: Path) -> argparse.Namespace:
    return argparse.Namespace(
        input_folder=str(folder / _TAG), output_folder=str(folder / _UNIVERSAL), num_extract_workers=1,
        num_merge_workers=1, keep_temp_folder=False, strict=False, inject_missing_state=True,
    )  # fmt: skip
