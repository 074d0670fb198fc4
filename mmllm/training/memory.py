"""Memory of a run: estimates by part, and settings that need less, ordered by what they cost.

`mmllm plan` shows these suggestions with the bytes that each one saves; the out-of-memory error shows them without.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmllm.config import ConfigError, RunConfig, StageConfig
from mmllm.config.file import with_overrides
from mmllm.distributed.launch import launched_strategy
from mmllm.errors import is_out_of_memory

NF4_BYTES = 0.5625  # per weight: 4 bits, and a 32-bit scale for each 64 weights
_CGROUP = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True)
class Memory:
    """Bytes of one device at the peak of a run, by part."""

    weights: float
    gradients: float
    optimizer: float
    activations: float  # saved for backward, and the workspace of kernels
    process: float = 0.0  # CPU only: program, libraries, data, and memory that the allocator keeps

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.process


@dataclass(frozen=True)
class Shape:
    """The sizes of model and batch that the estimates need."""

    language_trained: float  # bytes of the LLM's trained weights
    language_numbers: float  # elements of the LLM's weights
    language_bytes: float  # bytes per element
    linear_numbers: float  # elements in the linear layers of the LLM's blocks, which QLoRA quantizes
    num_layers: int
    layer_inputs: float  # bytes of all layers' inputs, which gradient checkpointing keeps


@dataclass(frozen=True)
class Suggestion:
    """A setting to change. It `saves` so many bytes on top of the suggestions before it; None without a measurement."""

    setting: str
    cost: str
    saves: float | None = None
    left: float | None = None  # bytes at the peak, with it and the suggestions before it


def size_text(num_bytes: float) -> str:
    """Bytes for people: 1.2 MB, 658 GB."""
    value, units = float(num_bytes), ["B", "kB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.3g} {units[0]}" if value < 1000 else f"{value:.0f} {units[0]}"


def parameter_bytes(parameters: Iterable[Tensor]) -> int:
    """The bytes of all parameters; a shared one counts once."""
    return sum({id(parameter): parameter.numel() * parameter.element_size() for parameter in parameters}.values())


_STATUS_FILE, _RESET_FILE = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset_peak() -> None:
    """Resets the peak that `peak_bytes` reports to what is in use now, if the system can do so (Linux).

    Free memory that glibc's allocator keeps is returned to the system first.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
    with contextlib.suppress(OSError):
        _RESET_FILE.write_text("5")


def _unix_resources() -> Any:
    """The module `resource`. Raises ConfigError on Windows, which has none."""
    try:
        import resource
    except ImportError as error:
        raise ConfigError(
            "`mmllm plan` measures memory as Linux and macOS report it, and this system does not: run it in WSL or on "
            "another machine, or train without a plan"
        ) from error
    return resource


def peak_bytes() -> int:
    """The peak resident size of this process, in bytes of main memory."""
    if _STATUS_FILE.is_file():
        (line,) = [line for line in _STATUS_FILE.read_text().splitlines() if line.startswith("VmHWM:")]
        return 1024 * int(line.split()[1])
    resource = _unix_resources()
    peak = int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return peak if sys.platform == "darwin" else 1024 * peak


def available_bytes(device: torch.device) -> int:
    """The memory of a GPU in bytes; for a CPU, the machine's memory or the process's limit, whichever is less."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    resource = _unix_resources()
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    if (limit := resource.getrlimit(resource.RLIMIT_AS)[0]) != resource.RLIM_INFINITY:
        limits.append(limit)
    if _CGROUP.is_file() and (text := _CGROUP.read_text().strip()).isdigit():
        limits.append(int(text))
    return min(limits)


_Estimate = Callable[[Memory, Shape], Memory]


def _smaller_batch(compute: Any) -> Iterator[tuple[list[str], str, _Estimate]]:
    """Smaller micro-batches with the same global batch, since another global batch is another recipe."""

    def divide_activations(divisor: int) -> _Estimate:
        return lambda m, _: replace(m, activations=m.activations / divisor)

    size, steps = compute.batch_size, compute.accumulate_steps
    while size > 1:
        divisor = next(number for number in range(2, size + 1) if size % number == 0)
        size, steps = size // divisor, steps * divisor
        settings = [f"compute.batch_size={size}", f"compute.accumulate_steps={steps}"]
        yield settings, "only time", divide_activations(divisor)


def _recomputed_layers(config: Any) -> Iterator[tuple[list[str], str, _Estimate]]:
    """Gradient checkpointing of the LLM, in addition to that of the tower if the settings have it."""
    if config.recomputes_language:
        return
    both = "'compute.gradient_checkpointing=[language,vision]'"
    value = both if config.recomputes_vision else "compute.gradient_checkpointing=true"
    yield (
        [value], "a third more time",
        lambda m, s: replace(m, activations=min(m.activations, s.layer_inputs + m.activations / max(1, s.num_layers))),
    )  # fmt: skip


def _frozen_language(config: Any) -> Iterator[tuple[list[str], str, _Estimate]]:
    """LoRA instead of training the whole LLM, and fewer bits for its frozen weights."""
    trains, lora = "language" in config.train, config.lora
    if trains and not lora:
        yield (
            ["lora.rank=64", "lora.alpha=128"], "the LLM learns less",
            lambda m, s: replace(
                m,
                gradients=max(0.0, m.gradients - 0.97 * s.language_trained),
                optimizer=max(0.0, m.optimizer * (1 - 0.97 * s.language_trained / max(1.0, m.gradients))),
            ),
        )  # fmt: skip
    is_quantised = lora and lora.quantise
    halves = getattr(config.model.language, "dtype", "fp32") == "fp32" and not is_quantised
    if halves:
        yield (
            ["model.language.dtype=bf16"], "rounds the frozen LLM",
            lambda m, s: replace(m, weights=m.weights - s.language_numbers * max(0.0, s.language_bytes - 2)),
        )  # fmt: skip
    if trains and not is_quantised:
        yield (
            ["lora.quantise=nf4"], "a coarser frozen LLM (QLoRA); needs the extra `quant`",
            lambda m, s: replace(m, weights=m.weights - s.linear_numbers * (min(2, s.language_bytes) - NF4_BYTES)),
        )  # fmt: skip


def _suggestions(config: Any) -> Iterator[tuple[list[str], str, _Estimate]]:
    """(settings, cost, estimate) of every change that may save memory, the cheapest first."""
    is_stage = isinstance(config, StageConfig)
    if is_stage:
        yield from _recomputed_layers(config)
    yield from _smaller_batch(config.compute)
    if config.compute.precision == "fp32":
        cost = "computation rounds to 3 digits"
        yield ["compute.precision=bf16"], cost, lambda m, _: replace(m, activations=m.activations / 2)
    works_on_whole_tensors = launched_strategy() == "ddp"  # see check_divisible
    if config.optim.kind == "adamw" and works_on_whole_tensors:
        cost = "coarser gradient averages; needs the extra `quant`"
        yield ["optim.kind=adamw8bit"], cost, lambda m, _: replace(m, optimizer=m.optimizer / 4)
    if is_stage:
        for change in _frozen_language(config):
            if works_on_whole_tensors or change[0] != ["lora.quantise=nf4"]:
                yield change
        length = f"data.max_length_tokens={config.data.max_length_tokens // 2}"
        yield [length], "leaves longer examples out", lambda m, _: replace(m, activations=m.activations / 2)


def suggestions(config: RunConfig, memory: Memory | None = None, shape: Shape | None = None) -> list[Suggestion]:
    """Settings of this run that need less memory, the cheapest first; with estimates if `memory` and `shape` are given.

    Each suggestion assumes that those before it are applied. Invalid combinations of settings are left out.
    """
    changes: list[Suggestion] = []
    for settings, cost, estimate in _suggestions(config):
        try:
            changed = with_overrides(config, [shlex.split(setting)[0] for setting in settings])
        except ConfigError:
            continue
        text = " ".join(settings)
        if memory is None or shape is None:
            changes.append(Suggestion(text, cost))
        else:
            after = estimate(memory, shape)
            if (saves := memory.total - after.total) <= 0.005 * (memory.total - memory.process):
                continue
            changes.append(Suggestion(text, cost, saves, after.total))
            memory = after
        config = changed
    return changes


def out_of_memory_text(config: Any, error: BaseException) -> str:
    """The message of a run that is out of memory, with the settings to change."""
    lines = [f"  {change.setting}  (costs: {change.cost})" for change in suggestions(config)]
    size = f"compute.batch_size={config.compute.batch_size}"
    return (
        f"out of memory: {str(error).splitlines()[0] if str(error) else type(error).__name__}\n"
        f"It does not fit with {size}. Add these settings in order, the cheapest first, until it does:\n"
        + "\n".join(lines)
        + "\n"
        "`mmllm plan CONFIG` runs the longest batch once and shows what each setting saves"
    )


@contextlib.contextmanager
def explain_out_of_memory(config: RunConfig) -> Iterator[None]:
    """Replaces an out-of-memory error by a TrainingError that lists the settings to change."""
    from mmllm.training.guards import TrainingError

    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingError(out_of_memory_text(config, error)) from error
