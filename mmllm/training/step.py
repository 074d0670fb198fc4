"""One optimizer step. Ranks exchange counts before it; losses, metrics and gradient norm reach the host together."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmllm.batching.sampler import step_seed
from mmllm.config import OptimConfig
from mmllm.distributed.ranks import all_reduce_sums
from mmllm.distributed.strategy import Strategy
from mmllm.errors import MmllmError
from mmllm.optimizers.optim import lr_multiplier
from mmllm.runs.throughput import Throughput
from mmllm.training.guards import Guards, TrainingError
from mmllm.training.stage import Stage
from mmllm.training.watchdog import Watchdog


@dataclass(frozen=True)
class StepStart:
    """What all ranks know before a step is computed."""

    batches: list[Any]
    denominator: float  # the summed loss of the whole step is divided by it
    is_stopped: bool  # a rank has received a stop signal: the step is not run


@dataclass(frozen=True)
class StepResult:
    """The results of one step. Loss and metrics are this rank's share: summed over the ranks they are the step's."""

    loss: float
    grad_norm: float
    metrics: dict[str, float]


class Stepper:
    """Runs the optimizer steps on one rank."""

    def __init__(
        self, stage: Stage, strategy: Strategy, throughput: Throughput, watchdog: Watchdog, *, optim: OptimConfig,
        accumulate_steps: int, seed: int,
    ):  # fmt: skip
        self.stage, self.strategy, self.throughput, self.watchdog = stage, strategy, throughput, watchdog
        self.optim, self.accumulate_steps, self.seed = optim, accumulate_steps, seed
        self.accelerator = strategy.accelerator
        self.guards = Guards(stage, strategy.parts)

    def begin(self, step: int, data: Iterator[Any], *, is_stopped: bool = False) -> StepStart:
        """Takes the micro-batches of a step (from 0) and sums their denominators over all ranks.

        `is_stopped`: this rank has received a stop signal. Raises the MmllmError of this rank's data, or TrainingError
        if another rank's data cannot be used or no item of the step is supervised.
        """
        torch.manual_seed(step_seed(self.seed, step, self.accelerator.process_index))
        self.watchdog.waiting_for(step, "data")
        with self.throughput.waiting():
            batches = [next(data) for _ in range(self.accumulate_steps)]
        errors = [batch for batch in batches if isinstance(batch, MmllmError)]
        usable = [batch for batch in batches if not isinstance(batch, MmllmError)]
        self.watchdog.waiting_for(step, "all processes to have their data", usable)
        count = math.nan if errors else sum(self.stage.count(batch) for batch in batches)
        denominator, num_stopped = all_reduce_sums(self.accelerator, [count, is_stopped])
        if errors:
            raise errors[0]
        if math.isnan(denominator):
            raise TrainingError(f"step {step + 1}: the data of another process cannot be used; its message says why")
        if denominator == 0:
            names = ", ".join(name for batch in batches for name in self.stage.names(batch))
            raise TrainingError(f"step {step + 1}: nothing to learn, no token of these examples is supervised: {names}")
        return StepStart(batches, denominator, num_stopped > 0)

    def run_step(self, step: int, start: StepStart) -> StepResult:
        """Forward, backward and update. Raises TrainingError if the guards find a problem; ZeRO has updated by then."""
        batches, world_size = start.batches, self.accelerator.num_processes
        waiting_for = self.watchdog.waiting_for
        self.strategy.set_learning_rates(lr_multiplier(step, self.optim))
        losses: list[Tensor] = []
        metrics: dict[str, Tensor] = {}
        for number, batch in enumerate(batches):
            with self.strategy.micro_batch(is_last=number == len(batches) - 1):
                waiting_for(step, "the forward pass", [batch])
                output = self.stage.loss(self.strategy.module, batch)
                waiting_for(step, "the backward pass, in which all processes take part", [batch])
                # gradients are averaged over ranks; the world size undoes that
                self.strategy.backward(output.total * world_size / start.denominator)
            losses.append(output.total.detach())
            for name, value in output.metrics.items():
                metrics[name] = metrics[name] + value.detach() if name in metrics else value.detach()
        waiting_for(step, "the update", batches)
        norm = self.strategy.clip()
        module_norms = self.strategy.gradient_norms(self.guards.modules)
        loss_sums, (grad_norm,), metric_sums, norms = _to_host(
            torch.stack(losses), norm[None], torch.stack([*metrics.values()]) if metrics else None, module_norms
        )
        self.guards.check(step, loss_sums, grad_norm, batches, norms if module_norms is not None else None)
        self.strategy.step()
        self.throughput.stepped(batches)
        means = {name: total / start.denominator for name, total in zip(metrics, metric_sums, strict=True)}
        return StepResult(sum(loss_sums) / start.denominator, grad_norm, means)

    def step(self, step: int, data: Iterator[Any]) -> StepResult:
        """One whole step, without stop signals."""
        return self.run_step(step, self.begin(step, data))


def _to_host(*tensors: Tensor | None) -> list[list[float]]:
    """The values of these tensors, each [N] and none of them empty, in one transfer; an empty list for None."""
    device = next(tensor.device for tensor in tensors if tensor is not None)
    values = iter(torch.cat([tensor.float().to(device) for tensor in tensors if tensor is not None]).tolist())
    return [[next(values) for _ in range(len(tensor))] if tensor is not None else [] for tensor in tensors]


def mean_over_ranks(accelerator: Any, results: Sequence[StepResult]) -> dict[str, float]:
    """The mean loss and metrics of these steps, over all ranks. Every rank has to call it."""
    names = list(results[0].metrics)
    sums = [sum(result.loss for result in results)]
    sums += [sum(result.metrics[name] for result in results) for name in names]
    totals = all_reduce_sums(accelerator, sums)
    return {name: total / len(results) for name, total in zip(["loss", *names], totals, strict=True)}
