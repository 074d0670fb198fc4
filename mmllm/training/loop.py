"""The training loop, the same for every stage: warm-ups, projector, instructions."""

from __future__ import annotations

import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from mmllm.batching.sampler import Item, Orders, seed_of
from mmllm.config import RunConfig
from mmllm.config.file import dump_config
from mmllm.distributed.launch import STRATEGIES, launched_strategy
from mmllm.distributed.ranks import all_reduce_sum, build_accelerator, gather_all
from mmllm.distributed.strategy import load_weights
from mmllm.errors import INTERRUPTED, MmllmError
from mmllm.optimizers.optim import Parts, rate_factor
from mmllm.runs.alarms import new_alarms
from mmllm.runs.requirements import slow_precision_text
from mmllm.runs.run_log import Tracker
from mmllm.runs.state import check_room, load_state, read_newest, rehearse, save_state
from mmllm.runs.throughput import Throughput, step_flops
from mmllm.training.guards import Guards, TrainingError, lost_peers
from mmllm.training.stopping import BrokenOffError, StopSignal
from mmllm.training.watchdog import Heartbeat

BEST = "best"
VALIDATION = "the validation is broken off, and made when the run goes on; the state is saved"


class InterruptedRunError(MmllmError):
    """The run was asked to stop; its state is saved."""

    exit_status = INTERRUPTED


class Stage(Protocol):
    """What a stage brings to the loop. `module(batch)` gives the batch's loss, summed over what `count` counts."""

    module: nn.Module
    notes: list[str]  # what will not be measured, and why

    @property
    def num_examples(self) -> int | None: ...  # None where they are streamed
    @property
    def parts(self) -> Parts: ...
    @property
    def depths(self) -> Mapping[str, int]: ...  # of each trained parameter below the top of its part

    def order(self, batch_size: int) -> Orders: ...
    def batch(self, indices: Sequence[Any]) -> Any: ...  # Items of the order
    def count(self, batch: Any) -> int: ...
    def num_tokens(self, batch: Any) -> int: ...
    def reaches(self, part: str, batch: Any) -> bool: ...  # whether this batch can teach the part anything
    def names(self, batch: Any) -> list[str]: ...
    def validate(self, step: int, *, writes: bool = True) -> dict[str, float]: ...
    def save(self, out: Path, log: list[dict[str, Any]]) -> None: ...


def _ignore_interrupt(worker: int) -> None:
    """A worker process gets the terminal's Ctrl-C too; only the run itself decides when it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class _AsGiven(Dataset[Any]):
    """What the sampler yields is the item itself: the index of an example, or a streamed example."""

    def __getitem__(self, item: Item) -> Item:
        return item


class Run:
    """One run: its stage, optimizers, order and place on disk."""

    def __init__(self, config: RunConfig, stage: Stage, accelerator: Any, rebuild: Callable[[], Stage]):
        self.config, self.stage, self.accelerator, self.rebuild = config, stage, accelerator, rebuild
        self.out = Path(config.out)
        names = [name for named in stage.parts.values() for name, _ in named]
        if len(set(names)) != len(names):
            raise ValueError("a parameter stands in two parts of a stage")
        trained = [parameter for named in stage.parts.values() for _, parameter in named]
        self.num_trained = sum(parameter.numel() for parameter in trained)
        self.trained_bytes = sum(parameter.nbytes for parameter in trained)
        self.throughput = Throughput(step_flops(stage), accelerator, stage.num_tokens)
        build = STRATEGIES[launched_strategy()]
        self.strategy = build(accelerator, stage.module, stage.parts, config.optim, stage.depths)
        optim = config.optim
        self.global_batch = optim.batch_size * optim.accumulate_steps * accelerator.num_processes
        self.order = stage.order(self.global_batch)
        self.settings = dump_config(config)
        self.guards = Guards(stage, self.strategy.parts, self.strategy.gradient_norms)
        rank, world = accelerator.process_index, accelerator.num_processes
        self.heart = Heartbeat(config.log.stall_seconds, rank=rank, world_size=world, names=stage.names)
        self.best: dict[str, Any] | None = None  # step and val_loss
        self.positions: dict[int, dict[int, Any]] = {}  # of the order behind each step that batches are made for

    def machine_notes(self) -> list[str]:
        """What is to be said, once, of the speed that this machine allows."""
        slow = slow_precision_text(self.config, self.accelerator.device)
        return [told for told in (slow, self.throughput.describe(), self.throughput.threads_text()) if told]

    def resume(self, say: Callable[[str], None]) -> int:
        """The step to start from: 0, or that of the newest saved state that can be read. Raises StateError."""
        state = read_newest(self.out, say, self.accelerator)
        step = state["step"] if state else 0
        if state:
            facts: dict[str, Any] = {"settings": self.settings, "global_batch": self.global_batch}
            load_state(self.out, state, self.strategy, **facts)
            self.order.go_to(state.get("position", {}))
            self.best = state.get("best")
        return int(step)

    def _micro_batches(self, first_step: int) -> Iterator[Sequence[Item]]:
        """This rank's micro-batches, from a step to the end of the run."""
        for step in range(first_step, self.config.optim.max_steps):
            mine = self.order.share(step, self.accelerator.process_index, self.accelerator.num_processes)
            self.positions[step + 1] = self.order.position()
            yield from self.order.divide(mine, self.config.optim.accumulate_steps)

    def _batch(self, indices: Sequence[Item]) -> Any:
        """A micro-batch, or what is wrong with its data: an error that a worker raises would bring its traceback."""
        try:
            return self.stage.batch(indices)
        except MmllmError as error:
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

    def prepare(self, first_step: int, say: Callable[[str], None]) -> None:
        """Tries, before the first step, whether what it leads to can be saved. Raises StateError or OSError."""
        if self.accelerator.is_main_process:
            log = self.config.log
            check_room(self.out, self.trained_bytes, log.keep_checkpoints if log.save_every_steps else 0)
        self.accelerator.wait_for_everyone()
        if not first_step:
            say(rehearse(self.out, self.strategy, self.settings))

    def _num_valid(self, step: int, batches: Sequence[Any]) -> float:
        """What the loss averages over, of all ranks. Raises what is wrong with the data of this one or another."""
        wrong = [batch for batch in batches if isinstance(batch, MmllmError)]
        mine = math.nan if wrong else sum(self.stage.count(batch) for batch in batches)
        total = all_reduce_sum(self.accelerator, mine)
        if wrong:
            raise wrong[0]
        if math.isnan(total):
            raise TrainingError(f"step {step + 1}: the data of another process cannot be used; it says why")
        if total == 0:
            names = ", ".join(name for batch in batches for name in self.stage.names(batch))
            raise TrainingError(f"step {step + 1}: nothing to learn, no token of these examples is supervised: {names}")
        return total

    def step(self, step: int, data: Iterator[Any]) -> tuple[float, float]:
        """One optimizer step: (loss per counted item, gradient norm)."""
        optim, world, beat = self.config.optim, self.accelerator.num_processes, self.heart.beat
        torch.manual_seed(seed_of(self.config.seed, step, self.accelerator.process_index))
        beat(step, "data")
        with self.throughput.waiting():
            batches = [next(data) for _ in range(optim.accumulate_steps)]
        beat(step, "all processes to have their data", [one for one in batches if not isinstance(one, MmllmError)])
        num_valid = self._num_valid(step, batches)
        self.strategy.set_rates(rate_factor(step, optim))
        losses: list[float] = []
        for number, batch in enumerate(batches):
            with self.strategy.micro_batch(is_last=number == len(batches) - 1):
                beat(step, "the forward pass", [batch])
                loss: Tensor = self.strategy.module(batch)
                beat(step, "the backward pass, in which all processes take part", [batch])
                self.strategy.backward(loss * world / num_valid)  # ranks are averaged: the world size undoes that
            losses.append(float(loss.detach()))
        beat(step, "the update", batches)
        norm = self.strategy.clip()
        self.guards.check(step, losses, norm, batches)
        self.strategy.step()
        self.throughput.stepped(batches)
        beat(step, "all processes to end the step", batches)
        return all_reduce_sum(self.accelerator, sum(losses)) / num_valid, norm

    def warn(self, tracker: Tracker) -> None:
        """What the guards of all ranks warned of goes to the log."""
        found = gather_all(self.accelerator, {self.accelerator.process_index: self.guards.warnings})
        for rank in sorted(found):
            for row in found[rank]:
                tracker.warn(row)
        self.guards.warnings = []

    def save_state(self, step: int) -> None:
        self.heart.beat(step, "a state to be saved")
        self.positions = {made: where for made, where in self.positions.items() if made >= step}
        position = gather_all(self.accelerator, self.positions[step])
        facts: dict[str, Any] = {"settings": self.settings, "global_batch": self.global_batch, "position": position}
        save_state(self.out, step, self.strategy, **facts, best=self.best, keep=self.config.log.keep_checkpoints)
        self.accelerator.wait_for_everyone()

    def validate(self, step: int, tracker: Tracker, stop: StopSignal) -> bool:
        """Judges the model, by the first process; one better than all before is kept in `best/`, but for the last.

        Where no process has the whole model, all of them judge it, on the same data, and the first one tells of it.
        Whether it came to its end: a signal breaks it off, but for a model that all processes judge.
        """
        self.heart.beat(step, "validation, which the first process does")
        is_main, is_sharded = self.accelerator.is_main_process, self.strategy.is_sharded
        figures: dict[str, float] = {}
        is_whole = True
        if is_main or is_sharded:
            does = VALIDATION if step else "the validation is broken off; nothing has been trained yet"
            if is_sharded:
                does = "the validation, in which all processes take part, ends first"
            try:
                with stop.during(does, breaks=not is_sharded), self.strategy.gathered():
                    figures = self.stage.validate(step, writes=is_main)
            except BrokenOffError:
                is_whole = False
        if all_reduce_sum(self.accelerator, not is_whole):
            return False
        if figures and is_main:
            tracker.log(step, figures)
            for kind, text in new_alarms(tracker.rows, self.config):
                tracker.alarm(step, kind, text)
        loss = all_reduce_sum(self.accelerator, figures.get("val_loss", math.nan) if is_main else 0.0)
        if step and loss < (self.best["val_loss"] if self.best else math.inf):
            self.best = {"step": step, "val_loss": loss}
            if self.config.log.keep_best and step < self.config.optim.max_steps:
                with stop.during(f"the best model so far is written to {self.out / BEST}, and then the state"):
                    self.save_model(self.out / BEST, tracker)
        self.accelerator.wait_for_everyone()
        return True

    def is_judged(self, step: int, tracker: Tracker) -> bool:
        """Whether the log has the validation after this step, which a stop may have broken off."""
        others = {"loss", "warning", "alarm"}
        told = [row for row in tracker.rows if row["step"] == step and not others & row.keys()]
        return all_reduce_sum(self.accelerator, len(told)) > 0  # the first process alone has the log

    def save_model(self, folder: Path, tracker: Tracker) -> None:
        """The model as it is now, by the first process. Weights that are divided go into a stage that is built anew."""
        weights = self.strategy.whole_state()["weights"] if self.strategy.has_shards else None
        if self.accelerator.is_main_process:
            stage = self.stage
            if weights is not None:
                stage = self.rebuild()
                load_weights(stage.parts, weights)
            folder.mkdir(exist_ok=True)
            stage.save(folder, tracker.rows)

    def finish(self, tracker: Tracker) -> None:
        """The model of the last step in its place; nothing is left to go on from."""
        self.save_model(self.out, tracker)
        if self.accelerator.is_main_process:
            if hasattr(os, "sync"):  # not on Windows
                os.sync()  # before what the run could go on from is removed
            shutil.rmtree(self.out / "state", ignore_errors=True)
            best = self.best
            if best and best["step"] == self.config.optim.max_steps:
                shutil.rmtree(self.out / BEST, ignore_errors=True)
            elif best and self.config.log.keep_best:
                tracker.say(f"lowest val_loss {best['val_loss']:.4g} at step {best['step']}: {self.out / BEST}")
        self.accelerator.wait_for_everyone()


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def train(config: RunConfig, stage: Stage, accelerator: Any, rebuild: Callable[[], Stage]) -> None:
    """Runs a stage to its end, from its newest saved state where there is one.

    `rebuild` gives the stage as it was before training: weights that are divided are put into it to be saved.

    Raises TrainingError where going on would be wrong, InterruptedRunError after Ctrl-C once the state is saved.
    """
    run = Run(config, stage, accelerator, rebuild)
    with lost_peers(run.heart.step):
        _train(run)


def _interrupted(step: int, max_steps: int) -> InterruptedRunError:
    if not step:
        return InterruptedRunError(
            f"stopped before step 1 of {max_steps}; nothing was trained, the same command begins"
        )
    return InterruptedRunError(f"stopped after step {step} of {max_steps}; the same command goes on from there")


def _is_validated(step: int, config: RunConfig) -> bool:
    return _is_due(step, config.log.validate_every_steps) or step == config.optim.max_steps


def _steps(run: Run, first: int, tracker: Tracker, stop: StopSignal) -> None:
    """The steps from `first` to the end. Raises InterruptedRunError once the state is saved."""
    config, log, max_steps = run.config, run.config.log, run.config.optim.max_steps
    losses: list[float] = []
    begun = time.monotonic()
    data = run.batches(first)
    run.throughput.restart()
    with run.heart:
        for step in range(first, max_steps):
            loss, norm = run.step(step, data)
            losses.append(loss)
            done = step + 1
            if _is_due(done, log.every_steps) or done == max_steps:
                left = (time.monotonic() - begun) / (done - first) * (max_steps - done)
                rate = run.strategy.optimizers[0].param_groups[0]["lr"]
                values = {"loss": sum(losses) / len(losses), "learning_rate": rate, "grad_norm": norm}
                tracker.log(done, {**values, **run.throughput.figures()}, seconds_left=left)
                if told := run.throughput.beaten_text():
                    tracker.say(told)
                run.warn(tracker)
                losses = []
            is_judged = True
            if _is_validated(done, config):
                with run.throughput.paused():
                    is_judged = run.validate(done, tracker, stop)
            # on all ranks, or on none
            stops = (done < max_steps or not is_judged) and all_reduce_sum(run.accelerator, len(stop.received)) > 0
            if _is_due(done, log.save_every_steps) or stops or (done == max_steps and log.save_every_steps):
                run.save_state(done)
            if stops:
                raise _interrupted(done, max_steps)


def _train(run: Run) -> None:
    config, stage, accelerator = run.config, run.stage, run.accelerator
    first = run.resume(print if accelerator.is_main_process else lambda text: None)
    log, max_steps = config.log, config.optim.max_steps
    tracker = Tracker(
        run.out, max_steps=max_steps, first_step=first, is_main=accelerator.is_main_process,
        trackers=log.trackers, settings=config.model_dump(mode="json"),
    )  # fmt: skip
    processes = f"{accelerator.num_processes} process(es) on {accelerator.device.type}, {run.strategy.name}"
    tracker.say(
        f"{config.stage}: {run.num_trained:,} trained parameters in {', '.join(stage.parts)}; "
        f"{'streamed' if stage.num_examples is None else f'{stage.num_examples:,}'} examples; {processes}"
    )
    for told in run.machine_notes():
        tracker.say(told)
    if first:
        tracker.say(f"goes on from step {first}")
    else:
        if tracker.num_dropped:
            dropped = f"{tracker.num_dropped} rows of its log go"
            tracker.say(f"begins at step 1: the run before this one saved no state ({dropped})")
        for note in stage.notes:
            tracker.say(note)
    try:
        run.prepare(first, tracker.say)
        with StopSignal(speaks=accelerator.is_main_process) as stop:
            # at step 0: where the curves begin; and what cannot be validated is known now, not at the end
            is_judged = first > 0 and (not _is_validated(first, config) or run.is_judged(first, tracker))
            if not is_judged and not run.validate(first, tracker, stop):
                raise _interrupted(first, max_steps)
            _steps(run, first, tracker, stop)
            with stop.during("the training is done, and its model is being saved"):
                tracker.finish()
                run.finish(tracker)
    finally:
        tracker.close()
    num_alarms = all_reduce_sum(accelerator, len(tracker.alarms))  # the first process alone knows them
    if log.fail_on_alarm and num_alarms:
        last = tracker.alarms[-1]["text"] if tracker.alarms else "the first process says which"
        raise TrainingError(f"the run is saved, but it had alarms (log.fail_on_alarm): {last}")


__all__ = ["InterruptedRunError", "Run", "Stage", "TrainingError", "build_accelerator", "train"]
