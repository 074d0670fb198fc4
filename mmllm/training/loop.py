"""The training loop, the same for every stage: warm-ups, projector, instructions."""

from __future__ import annotations

import itertools
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
from mmllm.distributed.state_io import load_weights
from mmllm.errors import EXIT_INTERRUPTED, MmllmError
from mmllm.fault_points import fault_point
from mmllm.runs.alarms import new_alarms
from mmllm.runs.folder import RunFolder
from mmllm.runs.requirements import slow_precision_text
from mmllm.runs.run_log import RunLog
from mmllm.runs.state import check_room, load_state, read_newest, save_state, verify_saving
from mmllm.runs.throughput import Throughput
from mmllm.training.batches import StepBatches
from mmllm.training.guards import TrainingError, explain_lost_peers
from mmllm.training.stage import CountsFlops, Stage
from mmllm.training.step import Stepper, StepResult, mean_over_ranks
from mmllm.training.stopping import BrokenOffError, StopSignal
from mmllm.training.watchdog import Watchdog

VALIDATION = "the validation is interrupted and repeated when the run resumes; the state is saved"


class InterruptedRunError(MmllmError):
    """The run stopped after a signal; its state is saved."""

    exit_status = EXIT_INTERRUPTED


class Run:
    """One run on one rank: what its components share, its folder, and the work between steps."""

    def __init__(self, config: RunConfig, stage: Stage, accelerator: Any, rebuild: Callable[[], Stage]):
        self.config, self.stage, self.accelerator, self.rebuild = config, stage, accelerator, rebuild
        self.out = Path(config.out)
        self.folder = RunFolder(self.out)
        names = [name for named in stage.parts.values() for name, _ in named]
        assert len(set(names)) == len(names), "a parameter belongs to two parts of a stage"
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
        self.saved_step = -1  # of the newest state that this process has saved

    def machine_notes(self) -> list[str]:
        """Notes to print once about the speed of this machine: slow precision, its peak, its threads."""
        slow = slow_precision_text(self.config, self.accelerator.device)
        return [note for note in (slow, self.throughput.describe(), self.throughput.threads_text()) if note]

    def resume(self, say: Callable[[str], None]) -> int:
        """Loads the newest readable state and returns its step, or 0 if there is none. Raises StateError."""
        state = read_newest(self.out, say, self.accelerator)
        step = state["step"] if state else 0
        if state:
            facts: dict[str, Any] = {"settings": self.settings, "global_batch": self.global_batch}
            load_state(self.out, state, self.strategy, **facts)
            self.batches.sampler.load_state(state.get("position", {}))
            self.best = state.get("best")
        return int(step)

    def prepare(self, first_step: int, say: Callable[[str], None]) -> None:
        """Checks before the first step that states can be saved. Raises StateError or OSError."""
        if self.accelerator.is_main_process:
            log = self.config.log
            check_room(self.out, self.trained_bytes, log.keep_checkpoints if log.save_every_steps else 0)
        self.accelerator.wait_for_everyone()
        if not first_step:
            say(verify_saving(self.out, self.strategy, self.settings))

    def warn(self, run_log: RunLog) -> None:
        """Logs the warnings of all ranks' guards. Every rank has to call it."""
        guards = self.stepper.guards
        warnings = gather_all(self.accelerator, {self.accelerator.process_index: guards.warnings})
        for rank in sorted(warnings):
            for row in warnings[rank]:
                run_log.warn(row)
        guards.warnings = []

    def save_state(self, step: int) -> None:
        """Saves the state after `step` steps. Every rank has to call it."""
        self.watchdog.waiting_for(step, "a state to be saved")
        position = gather_all(self.accelerator, self.batches.state_after(step))
        facts: dict[str, Any] = {"settings": self.settings, "global_batch": self.global_batch, "position": position}
        save_state(self.out, step, self.strategy, **facts, best=self.best, keep=self.config.log.keep_checkpoints)
        self.saved_step = step
        self.accelerator.wait_for_everyone()

    def validate(self, step: int, run_log: RunLog, stop: StopSignal) -> bool:
        """Validates on the first process, or on all of them with the same data if no process has the whole model.

        The first process logs the metrics. The model with the lowest `val_loss` is kept in `best/`, except after the
        last step. Returns False if a signal interrupted the validation, which cannot happen where all take part.
        """
        self.watchdog.waiting_for(step, "validation, which the first process runs")
        is_main, is_sharded = self.accelerator.is_main_process, self.strategy.is_sharded
        metrics: dict[str, float] = {}
        is_complete = True
        if is_main or is_sharded:
            effect = VALIDATION if step else "the validation is interrupted; nothing has been trained yet"
            if is_sharded:
                effect = "the validation, in which all processes take part, is completed first"
            try:
                with stop.during(effect, breaks=not is_sharded), self.strategy.gathered():
                    fault_point(f"validation after step {step}: begin")
                    metrics = self.stage.validate(step, writes=is_main)
                    fault_point(f"validation after step {step}: end")
            except BrokenOffError:
                is_complete = False
        if all_reduce_sum(self.accelerator, not is_complete):
            return False
        if metrics and is_main:
            run_log.log(step, metrics)
            for kind, text in new_alarms(run_log.rows, self.config):
                run_log.alarm(step, kind, text)
        loss = all_reduce_sum(self.accelerator, metrics.get("val_loss", math.nan) if is_main else 0.0)
        if step and loss < (self.best["val_loss"] if self.best else math.inf):
            self.best = {"step": step, "val_loss": loss}
            if self.config.validation.keep_best and step < self.config.optim.max_steps:
                with stop.during(f"the best model so far is written to {self.folder.best}, and then the state"):
                    self.save_model(self.folder.best, run_log)
        self.accelerator.wait_for_everyone()
        return True

    def has_validation(self, step: int, run_log: RunLog) -> bool:
        """Whether the log has the validation after this step; a signal may have interrupted it."""
        other_keys = {"loss", "warning", "alarm"}
        rows = [row for row in run_log.rows if row["step"] == step and not other_keys & row.keys()]
        return all_reduce_sum(self.accelerator, len(rows)) > 0  # only the first process has the log

    def save_model(self, folder: Path, run_log: RunLog) -> None:
        """Saves the current model on the first process. Sharded weights are first gathered into a rebuilt stage."""
        weights = self.strategy.state_io.whole_weights() if self.strategy.state_io.has_shards else None
        if self.accelerator.is_main_process:
            stage = self.stage
            if weights is not None:
                stage = self.rebuild()
                load_weights(itertools.chain(*stage.parts.values()), weights)
            folder.mkdir(exist_ok=True)
            stage.save(folder, run_log.rows)

    def finish(self, run_log: RunLog) -> None:
        """Saves the final model in the run's folder and removes the saved states."""
        fault_point("end: before the last checkpoint")
        self.save_model(self.out, run_log)
        if self.accelerator.is_main_process:
            if hasattr(os, "sync"):  # not on Windows
                os.sync()  # before the states that the run could resume from are removed
            fault_point("end: before the states are removed")
            shutil.rmtree(self.folder.states, ignore_errors=True)
            best = self.best
            if best and best["step"] == self.config.optim.max_steps:
                shutil.rmtree(self.folder.best, ignore_errors=True)
            elif best and self.config.validation.keep_best:
                run_log.say(f"lowest val_loss {best['val_loss']:.4g} at step {best['step']}: {self.folder.best}")
        self.accelerator.wait_for_everyone()


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def train(config: RunConfig, stage: Stage, accelerator: Any, rebuild: Callable[[], Stage]) -> None:
    """Runs a stage to its end, from its newest saved state if there is one.

    `rebuild` builds the stage as it was before training: sharded weights are loaded into it to be saved.

    Raises TrainingError if the run must not continue, InterruptedRunError after Ctrl-C once the state is saved.
    """
    run = Run(config, stage, accelerator, rebuild)
    with explain_lost_peers(run.watchdog.step):
        _train(run)


def _interrupted(step: int, max_steps: int) -> InterruptedRunError:
    if not step:
        return InterruptedRunError(
            f"stopped before step 1 of {max_steps}; nothing was trained; run the same command again to start"
        )
    return InterruptedRunError(f"stopped after step {step} of {max_steps}; run the same command again to continue")


def _validation_is_due(step: int, config: RunConfig) -> bool:
    return _is_due(step, config.validation.every_steps) or step == config.optim.max_steps


def _steps(run: Run, first: int, run_log: RunLog, stop: StopSignal) -> None:
    """Trains from step `first` to the end. Raises InterruptedRunError after a signal, once the state is saved."""
    config, log, max_steps = run.config, run.config.log, run.config.optim.max_steps
    results: list[StepResult] = []
    started = time.monotonic()
    data = run.batches.start(first)
    run.throughput.restart()
    with run.watchdog:
        for step in range(first, max_steps):
            start = run.stepper.begin(step, data, is_stopped=bool(stop.received))
            if start.is_stopped:
                _stop(run, step, first)
            fault_point(f"step {step + 1}: before the update")
            results.append(run.stepper.run_step(step, start))
            done = step + 1
            if _is_due(done, log.every_steps) or done == max_steps:
                seconds_left = (time.monotonic() - started) / (done - first) * (max_steps - done)
                _log(run, done, results, run_log, seconds_left)
                results = []
            if _validation_is_due(done, config):
                with run.throughput.paused():
                    is_complete = run.validate(done, run_log, stop)
                if not is_complete:
                    _stop(run, done, first)
            if _is_due(done, log.save_every_steps) or (done == max_steps and log.save_every_steps):
                run.save_state(done)


def _log(run: Run, done: int, results: Sequence[StepResult], run_log: RunLog, seconds_left: float) -> None:
    """Logs one line for the steps since the last line. Every rank has to call it."""
    means = mean_over_ranks(run.accelerator, results)
    learning_rate = run.strategy.optimizers[0].param_groups[0]["lr"]
    values = {"loss": means.pop("loss"), "learning_rate": learning_rate, "grad_norm": results[-1].grad_norm, **means}
    run_log.log(done, {**values, **run.throughput.metrics()}, seconds_left=seconds_left)
    if note := run.throughput.beaten_text():
        run_log.say(note)
    run.warn(run_log)


def _stop(run: Run, done: int, first: int) -> NoReturn:
    """Saves the state after `done` steps and raises InterruptedRunError. All ranks call it, or none."""
    if done > first and run.saved_step != done:
        run.save_state(done)
    raise _interrupted(done, run.config.optim.max_steps)


def _train(run: Run) -> None:
    config, stage, accelerator = run.config, run.stage, run.accelerator
    first = run.resume(print if accelerator.is_main_process else lambda text: None)
    log, max_steps = config.log, config.optim.max_steps
    run_log = RunLog(
        run.out, max_steps=max_steps, first_step=first, is_main=accelerator.is_main_process,
        trackers=log.trackers, settings=config.model_dump(mode="json"),
    )  # fmt: skip
    processes = f"{accelerator.num_processes} process(es) on {accelerator.device.type}, {run.strategy.name}"
    run_log.say(
        f"{config.stage}: {run.num_trained:,} trained parameters in {', '.join(stage.parts)}; "
        f"{'streamed' if stage.num_examples is None else f'{stage.num_examples:,}'} examples; {processes}"
    )
    for note in run.machine_notes():
        run_log.say(note)
    if first:
        run_log.say(f"goes on from step {first}")
    else:
        if run_log.num_dropped:
            dropped = f"{run_log.num_dropped} rows of its log are removed"
            run_log.say(f"starts at step 1: the previous run saved no state ({dropped})")
        for note in stage.notes:
            run_log.say(note)
    try:
        run.prepare(first, run_log.say)
        with StopSignal(speaks=accelerator.is_main_process) as stop:
            # at step 0: the first point of the curves, and errors of validation show now and not at the end
            is_validated = first > 0 and (not _validation_is_due(first, config) or run.has_validation(first, run_log))
            if not is_validated and not run.validate(first, run_log, stop):
                raise _interrupted(first, max_steps)
            _steps(run, first, run_log, stop)
            with stop.during("the training is done, and its model is being saved"):
                run_log.finish()
                run.finish(run_log)
    finally:
        run_log.close()
    num_alarms = all_reduce_sum(accelerator, len(run_log.alarms))  # only the first process knows them
    if config.alarms.fail and num_alarms:
        last = run_log.alarms[-1]["text"] if run_log.alarms else "the first process says which"
        raise TrainingError(f"the run is saved, but it had alarms (alarms.fail): {last}")
