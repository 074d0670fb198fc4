"""One optimizer step: one reduction over the ranks before it, one wait for the device in it."""

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
    denominator: float  # what the loss of the whole step is divided by
    is_stopped: bool  # some rank was asked to stop: the step is not made


@dataclass(frozen=True)
class StepResult:
    """What one step gave. The loss and the metrics are this rank's share: their sums over the ranks are the step's."""

    loss: float
    grad_norm: float
    metrics: dict[str, float]


class Stepper:
    """Makes the steps of a run on one rank."""

    def __init__(
        self, stage: Stage, strategy: Strategy, throughput: Throughput, watchdog: Watchdog, *, optim: OptimConfig,
        accumulate_steps: int, seed: int,
    ):  # fmt: skip
        self.stage, self.strategy, self.throughput, self.watchdog = stage, strategy, throughput, watchdog
        self.optim, self.accumulate_steps, self.seed = optim, accumulate_steps, seed
        self.accelerator = strategy.accelerator
        self.guards = Guards(stage, strategy.parts, strategy.gradient_norms)

    def begin(self, step: int, data: Iterator[Any], *, is_stopped: bool = False) -> StepStart:
        """Takes the step's micro-batches and tells the other ranks of them.

        `is_stopped`: this rank was asked to stop. Raises what is wrong with the data of this rank or another.
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
            raise TrainingError(f"step {step + 1}: the data of another process cannot be used; it says why")
        if denominator == 0:
            names = ", ".join(name for batch in batches for name in self.stage.names(batch))
            raise TrainingError(f"step {step + 1}: nothing to learn, no token of these examples is supervised: {names}")
        return StepStart(batches, denominator, num_stopped > 0)

    def make(self, step: int, start: StepStart) -> StepResult:
        """Forward, backward and the update. Raises TrainingError before an update that would be wrong."""
        batches, world_size = start.batches, self.accelerator.num_processes
        waiting_for = self.watchdog.waiting_for
        self.strategy.set_rates(lr_multiplier(step, self.optim))
        losses: list[Tensor] = []
        metrics: dict[str, Tensor] = {}
        for number, batch in enumerate(batches):
            with self.strategy.micro_batch(is_last=number == len(batches) - 1):
                waiting_for(step, "the forward pass", [batch])
                output = self.stage.loss(self.strategy.module, batch)
                waiting_for(step, "the backward pass, in which all processes take part", [batch])
                # ranks are averaged: the world size undoes that
                self.strategy.backward(output.total * world_size / start.denominator)
            losses.append(output.total.detach())
            for name, value in output.metrics.items():
                metrics[name] = metrics[name] + value.detach() if name in metrics else value.detach()
        waiting_for(step, "the update", batches)
        norm = self.strategy.clip()
        # the one wait for the device: everything that the host must know comes over together
        values = torch.stack([value.float() for value in (*losses, norm.to(losses[0].device), *metrics.values())])
        host: list[float] = values.tolist()
        sums, grad_norm = host[: len(losses)], host[len(losses)]
        self.guards.check(step, sums, grad_norm, batches)
        self.strategy.step()
        self.throughput.stepped(batches)
        shares = zip(metrics, host[len(losses) + 1 :], strict=True)
        return StepResult(
            sum(sums) / start.denominator, grad_norm, {name: value / start.denominator for name, value in shares}
        )

    def step(self, step: int, data: Iterator[Any]) -> StepResult:
        """One whole step, where nobody asks to stop."""
        return self.make(step, self.begin(step, data))


def mean_over_ranks(accelerator: Any, results: Sequence[StepResult]) -> dict[str, float]:
    """The mean loss and metrics of some steps, over all ranks. Every rank has to call it."""
    names = list(results[0].metrics)
    sums = [sum(result.loss for result in results)]
    sums += [sum(result.metrics[name] for result in results) for name in names]
    totals = all_reduce_sums(accelerator, sums)
    return {name: total / len(results) for name, total in zip(["loss", *names], totals, strict=True)}
