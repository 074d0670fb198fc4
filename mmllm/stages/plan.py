"""`mmllm plan`: runs the longest batch of a run for real and says what the run needs. Nothing is written to `out`."""

from __future__ import annotations

import itertools
import json
import shutil
import time
import weakref
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmllm.batch import Batch
from mmllm.config import ConfigError, RunConfig, StageConfig
from mmllm.distributed.ranks import build_accelerator, set_threads
from mmllm.errors import is_out_of_memory
from mmllm.runs.requirements import resolve_precision
from mmllm.stages.conversation import ConversationStage
from mmllm.stages.registry import build_stage
from mmllm.training.loop import Run
from mmllm.training.memory import (
    Memory,
    Shape,
    Suggestion,
    available_bytes,
    parameter_bytes,
    peak_bytes,
    reset_peak,
    size_text,
    suggestions,
)

TYPICAL_STEPS = 2  # steps in the run's own data order, timed for its speed
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def parse_size(text: str) -> int:
    """The bytes of `24GB`, `24G` or `512MB`, in powers of ten. Raises ConfigError."""
    number = text.strip().upper().removesuffix("IB").removesuffix("B")
    unit = number[-1:] if number[-1:] in _UNITS else ""
    try:
        value = float(number.removesuffix(unit))
    except ValueError:
        value = -1.0
    if value <= 0:
        raise ConfigError(f"--memory: {text!r} is not a size; give one such as 24GB")
    return int(value * _UNITS[unit])


@dataclass(frozen=True)
class Plan:
    """What a run needs: `speed` of all devices together, `memory` in bytes of each."""

    longest: str
    memory: Memory | None  # None where the longest batch ran out of memory
    limit: int
    device: str
    speed: dict[str, float]
    seconds_left: float | None
    epoch_seconds: float | None
    disk: dict[str, int]
    disk_free: int
    changes: list[Suggestion]
    notes: list[str]

    @property
    def fits(self) -> bool:
        return self.memory is not None and self.memory.total <= self.limit


class _Saved:
    """Counts the bytes that autograd saves for backward, now and at the peak: each storage once, without weights."""

    def __init__(self, weights: Iterator[Tensor]):
        self.weight_storages = {weight.untyped_storage().data_ptr() for weight in weights}
        self.use_counts: dict[int, int] = {}
        self.now = self.peak = 0

    def pack(self, tensor: Tensor) -> Any:
        storage = tensor.untyped_storage()
        key, size = storage.data_ptr(), storage.nbytes()
        if key in self.weight_storages:
            return tensor
        self.use_counts[key] = self.use_counts.get(key, 0) + 1
        self.now += size if self.use_counts[key] == 1 else 0
        self.peak = max(self.peak, self.now)
        holder = _Held(tensor)
        weakref.finalize(holder, self._drop, key, size)
        return holder

    def _drop(self, key: int, size: int) -> None:
        self.use_counts[key] -= 1
        self.now -= size if self.use_counts[key] == 0 else 0

    @staticmethod
    def unpack(held: Any) -> Tensor:
        return held.tensor if isinstance(held, _Held) else held


class _Held:
    def __init__(self, tensor: Tensor):
        self.tensor = tensor


def longest_batch(stage: ConversationStage, batch_size: int, max_length: int) -> Batch:
    """A batch of a run's longest examples; streamed examples are extended to `max_length` tokens."""
    lengths = stage.lengths
    if stage.num_examples is not None and lengths is not None:
        order = sorted(range(stage.num_examples), key=lambda index: -int(lengths[index]))
        return stage.batch(list(itertools.islice(itertools.cycle(order), batch_size)))
    batch = stage.batch(list(stage.sampler(batch_size).rank_items(0, 0, 1))[:batch_size])
    if stage.num_examples is not None:
        return batch
    num_more = max(0, max_length - batch.input_ids.shape[1])
    filler = int(batch.labels.max())  # every batch has a supervised token

    def extend(values: Tensor, fill_value: int) -> Tensor:
        return torch.cat([values, values.new_full((len(values), num_more), fill_value)], 1)

    return replace(batch, input_ids=extend(batch.input_ids, filler), labels=extend(batch.labels, filler),
                   attention_mask=extend(batch.attention_mask, 1))  # fmt: skip


def _measure(run: Run, batch: Batch) -> Memory:
    """The parts of memory at the peak of the second step, when the optimizer has its state.

    On a CPU what autograd saves is counted in the first step, since counting itself holds some of it for longer.
    """
    device, module = run.accelerator.device, run.stage.module
    saved = _Saved(itertools.chain(module.parameters(), module.buffers()))
    if device.type == "cuda":
        run.stepper.step(0, itertools.repeat(batch))
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack):
            run.stepper.step(0, itertools.repeat(batch))
        reset_peak()
    run.stepper.step(1, itertools.repeat(batch))
    weights = parameter_bytes(itertools.chain(module.parameters(), module.buffers()))
    gradients = parameter_bytes(run.strategy.trained.values())
    states = [value for optim in run.strategy.optimizers for state in optim.state.values() for value in state.values()]
    optimizer = parameter_bytes(value for value in states if isinstance(value, Tensor))
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        return Memory(weights, gradients, optimizer, max(0, peak - weights - gradients - optimizer))
    return Memory(weights, gradients, optimizer, saved.peak)


def _of_process(parts: Memory, peak: int) -> Memory:
    """The parts of a process that held `peak` bytes. Gradients grow as activations are freed: the sum is capped."""
    backward_bytes = min(parts.gradients + parts.activations, max(0.0, peak - parts.weights - parts.optimizer))
    activations = max(0.0, backward_bytes - parts.gradients)
    parts = replace(parts, gradients=backward_bytes - activations, activations=activations)
    return replace(parts, process=max(0.0, peak - parts.total))


def _shape_of(stage: ConversationStage, config: StageConfig, batch: Batch) -> Shape:
    language: Any = stage.model.language_model
    settings = language.config.get_text_config()
    layers = int(getattr(settings, "num_hidden_layers", 1) or 1)
    num_inputs = batch.input_ids.numel() * int(getattr(settings, "hidden_size", 0)) * layers
    weights = {id(weight): weight for weight in language.parameters()}.values()
    linear = {
        id(layer.weight): layer.weight for layer in language.get_decoder().modules() if isinstance(layer, nn.Linear)
    }
    num_weights = sum(weight.numel() for weight in weights)
    bytes_per_input = 2 if config.compute.precision == "bf16" else 4
    return Shape(
        language_trained=parameter_bytes(weight for weight in weights if weight.requires_grad),
        language_numbers=num_weights,
        language_bytes=parameter_bytes(weights) / max(1, num_weights),
        linear_numbers=sum(weight.numel() for weight in linear.values()),
        num_layers=layers,
        layer_inputs=num_inputs * bytes_per_input,
    )


def _disk(stage: ConversationStage, config: StageConfig, memory: Memory | None) -> dict[str, int]:
    weights = parameter_bytes(stage.module.parameters())
    trained = parameter_bytes(parameter for named in stage.parts.values() for _, parameter in named)
    sizes = {"checkpoint": weights}
    if config.lora:
        base = [weight for weight in stage.model.language_model.parameters() if not weight.requires_grad]
        sizes["checkpoint"] = weights - parameter_bytes(base)  # the base is not written again
    if config.log.save_every_steps:
        state = trained + (memory.optimizer if memory else 2 * trained)
        sizes["states"] = int(state * (config.log.keep_checkpoints + 1))  # one more while the newest is written
    if stage.features is not None:
        sizes["feature cache, still to write"] = stage.features.missing_bytes
    return sizes


def make_plan(config: RunConfig, *, gpus: int = 1, memory: int | None = None) -> Plan:
    """Builds the run's stage and model, measures a few training steps, and throws them away. Raises ConfigError.

    On a CPU the memory is the peak of this process, which loads, trains and validates like the run.
    """
    if not isinstance(config, StageConfig):
        raise ConfigError(f"stage: mmllm plan is for stage1 and stage2; {config.stage} trains a small model in minutes")
    config = resolve_precision(config)
    assert isinstance(config, StageConfig)
    set_threads(config)
    reset_peak()
    accelerator = build_accelerator(config)
    stage = build_stage(config)
    assert isinstance(stage, ConversationStage)
    limit = memory or available_bytes(accelerator.device)
    measured: Memory | None = None
    speed: dict[str, float] = {}
    seconds, batch, notes = None, None, []
    features = stage.features
    if features is not None and features.num_missing:
        features.returns_zeros = True  # a plan encodes nothing: rows of zeros take as much memory
        notes.append("the feature cache is not filled yet; its time is not counted")
    try:
        run = Run(config, stage, accelerator, lambda: build_stage(config))
        batch = longest_batch(stage, config.compute.batch_size, stage.data.max_length_tokens)
        loading_peak = peak_bytes()
        measured = _measure(run, batch)
        run.throughput.metrics()
        last_step = min(TYPICAL_STEPS + 1, config.optim.max_steps)
        first_step = min(1, last_step - 1)  # step 0 has the longest example
        data = run.batches.start(first_step)
        start = time.monotonic()
        for step in range(first_step, last_step):
            run.stepper.step(step, data)
        seconds = (time.monotonic() - start) / (last_step - first_step)
        speed = run.throughput.metrics()
        stage.run_largest_validation()
        if accelerator.device.type == "cpu":
            measured = _of_process(measured, max(loading_peak, peak_bytes()))
        if stage.validates:
            notes.append("the time of validations is not counted")
        notes += run.machine_notes()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        notes.append("the longest batch was tried and did not fit: nothing could be measured")
    if measured and gpus > 1:
        measured = replace(measured, gradients=2 * measured.gradients)
        notes.append(f"{gpus} GPUs: gradients count twice, for DDP's buckets; the time to exchange them is not counted")
    return _assemble(config, stage, batch, measured, speed, seconds, limit, gpus, notes, accelerator.device)


def _assemble(
    config: StageConfig, stage: ConversationStage, batch: Batch | None, measured: Memory | None,
    speed: dict[str, float], seconds: float | None,
    limit: int, gpus: int, notes: list[str], device: torch.device,
) -> Plan:  # fmt: skip
    shape = _shape_of(stage, config, batch) if batch is not None else None
    for name in ("tokens_per_second", "samples_per_second"):
        if name in speed:
            speed[name] *= gpus
    rate = speed.get("samples_per_second")
    changes = suggestions(config, measured, shape)
    folder = next(path for path in (Path(config.out).resolve(), *Path(config.out).resolve().parents) if path.is_dir())
    longest = "" if batch is None else f"{len(batch.input_ids)} x {batch.input_ids.shape[1]} tokens"
    return Plan(
        longest=longest,
        memory=measured,
        limit=limit,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        speed=speed,
        seconds_left=seconds * config.optim.max_steps if seconds else None,
        epoch_seconds=stage.num_examples / rate if rate and stage.num_examples else None,
        disk=_disk(stage, config, measured),
        disk_free=shutil.disk_usage(folder).free,
        changes=changes,
        notes=notes,
    )


def to_json(plan: Plan) -> str:
    data = {**asdict(plan), "fits": plan.fits}
    if plan.memory:
        data["memory"]["total"] = plan.memory.total
    return json.dumps(data, indent=2)


def _time_text(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s" if seconds >= 1 else "less than a second"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def show(plan: Plan) -> None:
    """The plan as one table of at most 80 columns."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="What this run needs", title_justify="left", show_header=False, width=78)
    table.add_column("what", max_width=34)
    table.add_column("value")
    if plan.memory:
        verdict = "fits" if plan.fits else "DOES NOT FIT"
        table.add_row(
            f"memory of {plan.device}", f"{size_text(plan.memory.total)} of {size_text(plan.limit)}: {verdict}"
        )
        for name, value in asdict(plan.memory).items():
            if value or name != "process":
                table.add_row(f"  {name}", size_text(value))
    else:
        table.add_row(f"memory of {plan.device}", f"more than there is ({size_text(plan.limit)}): DOES NOT FIT")
    table.add_row("longest batch", plan.longest, end_section=True)
    for name, text in (("tokens_per_second", "tokens/s"), ("samples_per_second", "samples/s")):
        if name in plan.speed:
            table.add_row(text, f"{plan.speed[name]:,.0f}" if plan.speed[name] >= 100 else f"{plan.speed[name]:.3g}")
    for name, text in (("mfu", "MFU"), ("hfu", "HFU"), ("padding", "padding"), ("data_wait", "waiting for data")):
        if name in plan.speed:
            table.add_row(text, f"{plan.speed[name]:.1%}")
    if plan.seconds_left is not None:
        table.add_row("time to finish", _time_text(plan.seconds_left))
    if plan.epoch_seconds is not None:
        table.add_row("time of an epoch", _time_text(plan.epoch_seconds), end_section=True)
    free = size_text(plan.disk_free)
    for name, size in plan.disk.items():
        table.add_row(f"disk: {name}", size_text(size))
    table.add_row("disk: free", free + ("" if sum(plan.disk.values()) <= plan.disk_free else ": NOT ENOUGH"))
    console = Console(soft_wrap=False)
    console.print(table)
    if not plan.fits:
        _show_changes(plan, console)
    for note in plan.notes:
        console.print(note, highlight=False)


def _show_changes(plan: Plan, console: Any) -> None:
    from rich.table import Table

    table = Table(title="To make it fit: the cheapest change first, each on top of those above",
                  title_justify="left", width=78)  # fmt: skip
    table.add_column("setting", overflow="fold")
    table.add_column("costs")
    table.add_column("saves", justify="right", no_wrap=True)
    table.add_column("leaves", justify="right", no_wrap=True)
    for change in plan.changes:
        saves, left = (["?"] * 2 if change.saves is None or change.left is None
                       else [size_text(change.saves), size_text(change.left)])  # fmt: skip
        table.add_row(change.setting, change.cost, saves, left)
        if change.left is not None and change.left <= plan.limit:
            table.add_row("", "with these it fits", "", "")
            break
    else:
        if plan.memory:
            table.add_row("", "all together are not enough: take a smaller LLM, or shard it", "", "")
    console.print(table)
