"""The training loop, the same for every stage: warm-ups, projector, instructions."""

from __future__ import annotations

import contextlib
import math
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from mmllm.config import RunConfig
from mmllm.config_file import dump_config
from mmllm.training.distributed import all_reduce_sum, build_accelerator, gather_all
from mmllm.training.optim import Parts, rate_factor
from mmllm.training.order import Item, Orders, seed_of
from mmllm.training.state import load_state, save_state, saved_steps
from mmllm.training.strategy import STRATEGIES, launched_strategy, load_weights
from mmllm.training.tracking import Tracker

MAX_IDLE_STEPS = 3  # steps in a row in which a trained part may get no gradient though it should
SAME_STOP_SECONDS = 2  # launchers pass a Ctrl-C on to their processes, which got it from the terminal already


class TrainingError(RuntimeError):
    """A run that must not go on; the message names the step and the examples."""


class InterruptedRunError(RuntimeError):
    """The run was asked to stop; its state is saved."""


class Stage(Protocol):
    """What a stage brings to the loop. `module(batch)` gives the batch's loss, summed over what `count` counts."""

    module: nn.Module

    @property
    def num_examples(self) -> int | None: ...  # None where they are streamed
    @property
    def parts(self) -> Parts: ...

    def order(self, batch_size: int) -> Orders: ...
    def batch(self, indices: Sequence[Any]) -> Any: ...  # Items of the order
    def count(self, batch: Any) -> int: ...
    def num_tokens(self, batch: Any) -> int: ...
    def reaches(self, part: str, batch: Any) -> bool: ...  # whether this batch can teach the part anything
    def names(self, batch: Any) -> list[str]: ...
    def validate(self, step: int, *, writes: bool = True) -> dict[str, float]: ...
    def save(self, out: Path, log: list[dict[str, Any]]) -> None: ...


@contextlib.contextmanager
def _stop_signal() -> Iterator[list[float]]:
    """Collects Ctrl-C and SIGTERM, so that the step in hand ends and its state is kept. A later, second one kills."""
    received: list[float] = []
    previous: dict[int, Any] = {}

    def receive(number: int, frame: Any) -> None:
        received.append(time.monotonic())
        if received[-1] - received[0] > SAME_STOP_SECONDS:
            signal.signal(number, previous[number])
            signal.raise_signal(number)

    for signal_number in (signal.SIGINT, signal.SIGTERM):
        previous[signal_number] = signal.signal(signal_number, receive)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _check_norms(
    stage: Stage, norm: float, part_norms: dict[str, float], idle: dict[str, int], step: int, batches: Sequence[Any]
) -> None:
    """Raises TrainingError for a gradient that is not finite, or a part that gets none."""
    names = [name for batch in batches for name in stage.names(batch)]
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    if not math.isfinite(norm):
        raise TrainingError(
            f"step {step + 1}: the gradient is not finite ({norm}), the update was not made. Examples of this step: "
            f"{shown}. Lower optim.learning_rates, or look at these examples with `mmllm check`"
        )
    for part, part_norm in part_norms.items():
        if part_norm > 0:
            idle[part] = 0
        elif any(stage.reaches(part, batch) for batch in batches):
            idle[part] = idle.get(part, 0) + 1
        if idle.get(part, 0) >= MAX_IDLE_STEPS:
            raise TrainingError(
                f"step {step + 1}: {part} got no gradient in {MAX_IDLE_STEPS} steps, so it learns nothing. Does an "
                f"answer stand behind the images of these examples? {shown}"
            )


def _ignore_interrupt(worker: int) -> None:
    """A worker process gets the terminal's Ctrl-C too; only the run itself decides when it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class _AsGiven(Dataset[Any]):
    """What the sampler yields is the item itself: the index of an example, or a streamed example."""

    def __getitem__(self, item: Item) -> Item:
        return item


class Run:
    """One run: its stage, optimizers, order and place on disk."""

    def __init__(self, config: RunConfig, stage: Stage, accelerator: Any):
        self.config, self.stage, self.accelerator = config, stage, accelerator
        self.out = Path(config.out)
        names = [name for named in stage.parts.values() for name, _ in named]
        if len(set(names)) != len(names):
            raise ValueError("a parameter stands in two parts of a stage")
        self.strategy = STRATEGIES[launched_strategy()](accelerator, stage.module, stage.parts, config.optim)
        optim = config.optim
        self.global_batch = optim.batch_size * optim.accumulate_steps * accelerator.num_processes
        self.order = stage.order(self.global_batch)
        self.settings = dump_config(config)
        self.idle: dict[str, int] = {}
        self.positions: dict[int, dict[int, Any]] = {}  # of the order behind each step that batches are made for

    def resume(self) -> int:
        """The step to start from: 0, or that of the newest saved state."""
        states = saved_steps(self.out)
        if not states:
            return 0
        facts: dict[str, Any] = {"settings": self.settings, "global_batch": self.global_batch}
        step, position = load_state(states[-1], self.strategy, **facts)
        self.order.go_to(position)
        return step

    def _micro_batches(self, first_step: int) -> Iterator[Sequence[Item]]:
        """This rank's micro-batches, from a step to the end of the run."""
        size = self.config.optim.batch_size
        for step in range(first_step, self.config.optim.max_steps):
            mine = self.order.share(step, self.accelerator.process_index, self.accelerator.num_processes)
            self.positions[step + 1] = self.order.position()
            yield from (mine[start : start + size] for start in range(0, len(mine), size))

    def _batch(self, indices: Sequence[Item]) -> Any:
        """A micro-batch, or what is wrong with its data: an error that a worker raises would bring its traceback."""
        try:
            return self.stage.batch(indices)
        except ValueError as error:
            return error

    def batches(self, first_step: int) -> Iterator[Any]:
        """This rank's micro-batches, made ahead in worker processes where `data.num_workers` asks for them."""
        data = getattr(self.config, "data", None)
        loader: DataLoader[Any] = DataLoader(
            _AsGiven(),
            batch_sampler=self._micro_batches(first_step),  # type: ignore[arg-type]
            collate_fn=self._batch,
            num_workers=data.num_workers if data else 0,
            worker_init_fn=_ignore_interrupt,
        )
        return iter(loader)

    def step(self, step: int, data: Iterator[Any]) -> tuple[float, float, int]:
        """One optimizer step: (loss per counted item, gradient norm, tokens of all ranks)."""
        optim, world = self.config.optim, self.accelerator.num_processes
        torch.manual_seed(seed_of(self.config.seed, step, self.accelerator.process_index))
        batches = [next(data) for _ in range(optim.accumulate_steps)]
        if wrong := [batch for batch in batches if isinstance(batch, ValueError)]:
            raise wrong[0]
        num_valid = all_reduce_sum(self.accelerator, sum(self.stage.count(batch) for batch in batches))
        if num_valid == 0:
            names = ", ".join(name for batch in batches for name in self.stage.names(batch))
            raise TrainingError(f"step {step + 1}: nothing to learn, no token of these examples is supervised: {names}")
        self.strategy.set_rates(rate_factor(step, optim))
        total = 0.0
        for number, batch in enumerate(batches):
            with self.strategy.micro_batch(is_last=number == len(batches) - 1):
                loss: Tensor = self.strategy.module(batch)
                self.strategy.backward(loss * world / num_valid)  # ranks are averaged: the world size undoes that
            total += float(loss.detach())
        norm = self.strategy.clip()
        _check_norms(self.stage, norm, self.strategy.part_norms(), self.idle, step, batches)
        self.strategy.step()
        num_tokens = all_reduce_sum(self.accelerator, sum(self.stage.num_tokens(batch) for batch in batches))
        return all_reduce_sum(self.accelerator, total) / num_valid, norm, int(num_tokens)

    def save_state(self, step: int) -> None:
        self.positions = {made: where for made, where in self.positions.items() if made >= step}
        position = gather_all(self.accelerator, self.positions[step])
        facts: dict[str, Any] = {"settings": self.settings, "global_batch": self.global_batch, "position": position}
        save_state(self.out, step, self.strategy, **facts, keep=self.config.log.keep_checkpoints)
        self.accelerator.wait_for_everyone()

    def validate(self, step: int, tracker: Tracker) -> None:
        if self.accelerator.is_main_process or self.strategy.is_sharded:
            with self.strategy.gathered():
                figures = self.stage.validate(step, writes=self.accelerator.is_main_process)
            if figures:
                tracker.log(step, figures)
        self.accelerator.wait_for_everyone()


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def train(config: RunConfig, stage: Stage, accelerator: Any, rebuild: Callable[[RunConfig], Stage]) -> None:
    """Runs a stage to its end, from its newest saved state where there is one.

    `rebuild` builds the stage anew: a sharded one cannot be saved, so its weights go into one that is whole.

    Raises TrainingError where going on would be wrong, InterruptedRunError after Ctrl-C once the state is saved.
    """
    run = Run(config, stage, accelerator)
    first = run.resume()
    log, max_steps = config.log, config.optim.max_steps
    tracker = Tracker(
        run.out, max_steps=max_steps, first_step=first, tensorboard=log.tensorboard, is_main=accelerator.is_main_process
    )
    trained = sum(parameter.numel() for parameter in run.strategy.trained.values())
    processes = f"{accelerator.num_processes} process(es) on {accelerator.device}"
    tracker.say(
        f"{config.stage}: {trained:,} trained parameters in {', '.join(stage.parts)}; "
        f"{'streamed' if stage.num_examples is None else f'{stage.num_examples:,}'} examples; {processes}"
    )
    if first:
        tracker.say(f"goes on from step {first}")
    losses: list[float] = []
    tokens, since = 0, time.monotonic()
    begun = since
    try:
        data = run.batches(first)
        with _stop_signal() as stopped:
            for step in range(first, max_steps):
                loss, norm, num_tokens = run.step(step, data)
                losses.append(loss)
                tokens += num_tokens
                done = step + 1
                if _is_due(done, log.every_steps) or done == max_steps:
                    now = time.monotonic()
                    left = (now - begun) / (done - first) * (max_steps - done)
                    rate = run.strategy.optimizers[0].param_groups[0]["lr"]
                    values = {"loss": sum(losses) / len(losses), "learning_rate": rate, "grad_norm": norm}
                    tracker.log(done, {**values, "tokens_per_second": tokens / (now - since)}, seconds_left=left)
                    losses, tokens, since = [], 0, now
                if _is_due(done, log.validate_every_steps) or done == max_steps:
                    before = time.monotonic()
                    run.validate(done, tracker)
                    since += time.monotonic() - before
                stops = done < max_steps and all_reduce_sum(accelerator, len(stopped)) > 0  # on all ranks, or on none
                if _is_due(done, log.save_every_steps) or stops:
                    run.save_state(done)
                if stops:
                    raise InterruptedRunError(
                        f"stopped after step {done} of {max_steps}; the same command goes on from there"
                    )
    finally:
        tracker.close()
    weights = run.strategy.whole_state()["weights"] if run.strategy.is_sharded else None
    if accelerator.is_main_process:
        tracker.finish()
        if weights is not None:
            stage = rebuild(config)
            load_weights(stage.parts, weights)
        stage.save(run.out, tracker.rows)
        shutil.rmtree(run.out / "state", ignore_errors=True)  # the run is finished: nothing to go on from
    accelerator.wait_for_everyone()


__all__ = ["InterruptedRunError", "Run", "Stage", "TrainingError", "build_accelerator", "train"]
