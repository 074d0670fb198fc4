"""The training loop, the same for every stage: warm-ups, projector, instructions."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from mmllm.config import RunConfig
from mmllm.config.file import dump_config
from mmllm.distributed.launch import STRATEGIES, launched_strategy
from mmllm.distributed.ranks import all_reduce_sum, gather_all
from mmllm.distributed.strategy import load_weights
from mmllm.errors import EXIT_INTERRUPTED, MmllmError
from mmllm.fault_points import reached
from mmllm.runs.alarms import new_alarms
from mmllm.runs.folder import RunFolder
from mmllm.runs.requirements import slow_precision_text
from mmllm.runs.run_log import Tracker
from mmllm.runs.state import check_room, load_state, read_newest, save_state, verify_saving
from mmllm.runs.throughput import Throughput
from mmllm.training.batches import StepBatches
from mmllm.training.guards import TrainingError, lost_peers
from mmllm.training.stage import CountsFlops, Stage
from mmllm.training.step import Stepper, StepResult, mean_over_ranks
from mmllm.training.stopping import BrokenOffError, StopSignal
from mmllm.training.watchdog import Watchdog

VALIDATION = "the validation is broken off, and made when the run goes on; the state is saved"


class InterruptedRunError(MmllmError):
    """The run was asked to stop; its state is saved."""

    exit_status = EXIT_INTERRUPTED


class Run:
    """One run on one rank: what its parts share, its place on the disk, and what is done between steps."""

    def __init__(self, config: RunConfig, stage: Stage, accelerator: Any, rebuild: Callable[[], Stage]):
        self.config, self.stage, self.accelerator, self.rebuild = config, stage, accelerator, rebuild
        self.out = Path(config.out)
        self.folder = RunFolder(self.out)
        names = [name for named in stage.parts.values() for name, _ in named]
        assert len(set(names)) == len(names), "a parameter stands in two parts of a stage"
        trained = [parameter for named in stage.parts.values() for _, parameter in named]
        self.num_trained = sum(parameter.numel() for parameter in trained)
        self.trained_bytes = sum(parameter.nbytes for parameter in trained)
        flops = stage.step_flops() if isinstance(stage, CountsFlops) else None
        self.throughput = Throughput(flops, accelerator, stage.num_tokens)
        build = STRATEGIES[launched_strategy()]
        self.strategy = build(accelerator, stage.module, stage.parts, config, stage.depths)
        compute, rank, world_size = config.compute, accelerator.process_index, accelerator.num_processes
        self.global_batch = compute.batch_size * compute.accumulate_steps * world_size
        self.batches = StepBatches(
            stage, self.global_batch, max_steps=config.optim.max_steps, accumulate_steps=compute.accumulate_steps,
            rank=rank, world_size=world_size,
        )  # fmt: skip
        self.watchdog = Watchdog(config.log.stall_seconds, rank=rank, world_size=world_size, names=stage.names)
        self.stepper = Stepper(
            stage, self.strategy, self.throughput, self.watchdog, optim=config.optim,
            accumulate_steps=compute.accumulate_steps, seed=config.seed,
        )  # fmt: skip
        self.settings = dump_config(config)
        self.best: dict[str, Any] | None = None  # step and val_loss
        self.saved_step = -1  # that of the newest state of this process

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
            self.batches.sampler.load_state(state.get("position", {}))
            self.best = state.get("best")
        return int(step)

    def prepare(self, first_step: int, say: Callable[[str], None]) -> None:
        """Tries, before the first step, whether what it leads to can be saved. Raises StateError or OSError."""
        if self.accelerator.is_main_process:
            log = self.config.log
            check_room(self.out, self.trained_bytes, log.keep_checkpoints if log.save_every_steps else 0)
        self.accelerator.wait_for_everyone()
        if not first_step:
            say(verify_saving(self.out, self.strategy, self.settings))

    def warn(self, tracker: Tracker) -> None:
        """What the guards of all ranks warned of goes to the log."""
        guards = self.stepper.guards
        found = gather_all(self.accelerator, {self.accelerator.process_index: guards.warnings})
        for rank in sorted(found):
            for row in found[rank]:
                tracker.warn(row)
        guards.warnings = []

    def save_state(self, step: int) -> None:
        self.watchdog.waiting_for(step, "a state to be saved")
        position = gather_all(self.accelerator, self.batches.state_after(step))
        facts: dict[str, Any] = {"settings": self.settings, "global_batch": self.global_batch, "position": position}
        save_state(self.out, step, self.strategy, **facts, best=self.best, keep=self.config.log.keep_checkpoints)
        self.saved_step = step
        self.accelerator.wait_for_everyone()

    def validate(self, step: int, tracker: Tracker, stop: StopSignal) -> bool:
        """Judges the model, by the first process; one better than all before is kept in `best/`, but for the last.

        Where no process has the whole model, all of them judge it, on the same data, and the first one tells of it.
        Whether it came to its end: a signal breaks it off, but for a model that all processes judge.
        """
        self.watchdog.waiting_for(step, "validation, which the first process does")
        is_main, is_sharded = self.accelerator.is_main_process, self.strategy.is_sharded
        figures: dict[str, float] = {}
        is_whole = True
        if is_main or is_sharded:
            does = VALIDATION if step else "the validation is broken off; nothing has been trained yet"
            if is_sharded:
                does = "the validation, in which all processes take part, ends first"
            try:
                with stop.during(does, breaks=not is_sharded), self.strategy.gathered():
                    reached(f"validation after step {step}: begin")
                    figures = self.stage.validate(step, writes=is_main)
                    reached(f"validation after step {step}: end")
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
            if self.config.validation.keep_best and step < self.config.optim.max_steps:
                with stop.during(f"the best model so far is written to {self.folder.best}, and then the state"):
                    self.save_model(self.folder.best, tracker)
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
        reached("end: before the last checkpoint")
        self.save_model(self.out, tracker)
        if self.accelerator.is_main_process:
            if hasattr(os, "sync"):  # not on Windows
                os.sync()  # before what the run could go on from is removed
            reached("end: before the states are removed")
            shutil.rmtree(self.folder.states, ignore_errors=True)
            best = self.best
            if best and best["step"] == self.config.optim.max_steps:
                shutil.rmtree(self.folder.best, ignore_errors=True)
            elif best and self.config.validation.keep_best:
                tracker.say(f"lowest val_loss {best['val_loss']:.4g} at step {best['step']}: {self.folder.best}")
        self.accelerator.wait_for_everyone()


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def train(config: RunConfig, stage: Stage, accelerator: Any, rebuild: Callable[[], Stage]) -> None:
    """Runs a stage to its end, from its newest saved state where there is one.

    `rebuild` gives the stage as it was before training: weights that are divided are put into it to be saved.

    Raises TrainingError where going on would be wrong, InterruptedRunError after Ctrl-C once the state is saved.
    """
    run = Run(config, stage, accelerator, rebuild)
    with lost_peers(run.watchdog.step):
        _train(run)


def _interrupted(step: int, max_steps: int) -> InterruptedRunError:
    if not step:
        return InterruptedRunError(
            f"stopped before step 1 of {max_steps}; nothing was trained, the same command begins"
        )
    return InterruptedRunError(f"stopped after step {step} of {max_steps}; the same command goes on from there")


def _is_validated(step: int, config: RunConfig) -> bool:
    return _is_due(step, config.validation.every_steps) or step == config.optim.max_steps


def _steps(run: Run, first: int, tracker: Tracker, stop: StopSignal) -> None:
    """The steps from `first` to the end. Raises InterruptedRunError once the state is saved."""
    config, log, max_steps = run.config, run.config.log, run.config.optim.max_steps
    results: list[StepResult] = []
    begun = time.monotonic()
    data = run.batches.start(first)
    run.throughput.restart()
    with run.watchdog:
        for step in range(first, max_steps):
            start = run.stepper.begin(step, data, is_stopped=bool(stop.received))
            if start.is_stopped:
                _stop(run, step, first)
            reached(f"step {step + 1}: before the update")
            results.append(run.stepper.make(step, start))
            done = step + 1
            if _is_due(done, log.every_steps) or done == max_steps:
                seconds_left = (time.monotonic() - begun) / (done - first) * (max_steps - done)
                _log(run, done, results, tracker, seconds_left)
                results = []
            if _is_validated(done, config):
                with run.throughput.paused():
                    is_judged = run.validate(done, tracker, stop)
                if not is_judged:
                    _stop(run, done, first)
            if _is_due(done, log.save_every_steps) or (done == max_steps and log.save_every_steps):
                run.save_state(done)


def _log(run: Run, done: int, results: Sequence[StepResult], tracker: Tracker, seconds_left: float) -> None:
    """One line of the log, of the steps since the last one. Every rank has to call it."""
    means = mean_over_ranks(run.accelerator, results)
    rate = run.strategy.optimizers[0].param_groups[0]["lr"]
    values = {"loss": means.pop("loss"), "learning_rate": rate, "grad_norm": results[-1].grad_norm, **means}
    tracker.log(done, {**values, **run.throughput.figures()}, seconds_left=seconds_left)
    if note := run.throughput.beaten_text():
        tracker.say(note)
    run.warn(tracker)


def _stop(run: Run, done: int, first: int) -> NoReturn:
    """Ends a run that was asked to stop after `done` steps, once they are saved. All ranks call it, or none."""
    if done > first and run.saved_step != done:
        run.save_state(done)
    raise _interrupted(done, run.config.optim.max_steps)


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
    if config.alarms.fail and num_alarms:
        last = tracker.alarms[-1]["text"] if tracker.alarms else "the first process says which"
        raise TrainingError(f"the run is saved, but it had alarms (alarms.fail): {last}")
