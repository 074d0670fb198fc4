"""What a run keeps in memory, and what to change where that is too much, in the order of least loss.

The one place of this advice: `mmllm plan` shows it with what each change saves, a run that is out of memory without.
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

NF4_BYTES = 0.5625  # of a weight: 4 bits, and a scale of 32 bits for 64 of them
_CGROUP = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True)
class Memory:
    """Bytes of one device at the peak of a run, by part."""

    weights: float
    gradients: float
    optimizer: float
    activations: float  # what is kept for backward, and what the kernels need for themselves
    process: float = 0.0  # of a CPU: program, libraries, data, and what the allocator has not given back

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.process


@dataclass(frozen=True)
class Shape:
    """What the estimates need to know of model and batch."""

    language_trained: float  # bytes of the LLM's trained weights
    language_numbers: float  # how many numbers the LLM's weights are
    language_bytes: float  # of each of them
    linear_numbers: float  # of those, in the linear layers within the LLM's layers, which QLoRA holds in few bits
    num_layers: int
    layer_inputs: float  # bytes of the inputs of all layers, which checkpointing keeps


@dataclass(frozen=True)
class Suggestion:
    """A setting to change. `saves` bytes, with the changes above it made; None where nothing has been measured."""

    setting: str
    cost: str
    saves: float | None = None
    left: float | None = None  # bytes at the peak with it and those above it


def size_text(num_bytes: float) -> str:
    """Bytes for people: 1.2 MB, 658 GB."""
    value, units = float(num_bytes), ["B", "kB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.3g} {units[0]}" if value < 1000 else f"{value:.0f} {units[0]}"


def parameter_bytes(parameters: Iterable[Tensor]) -> int:
    return sum({id(one): one.numel() * one.element_size() for one in parameters}.values())


_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def forget_peak() -> None:
    """From here on `peak_bytes` is that of what follows, where the system can be told so (Linux).

    What the allocator keeps for later is given back before, where it is glibc's.
    """
    give_back = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if give_back is not None:
        give_back(0)
    with contextlib.suppress(OSError):
        _CLEAR.write_text("5")


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
    """The most main memory that this process has held: its peak resident size."""
    if _STATUS.is_file():
        (line,) = [line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:")]
        return 1024 * int(line.split()[1])
    resource = _unix_resources()
    peak = int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return peak if sys.platform == "darwin" else 1024 * peak


def available_bytes(device: torch.device) -> int:
    """The memory of this device: of a GPU, of this machine, or what this process may have of it."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    resource = _unix_resources()
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    if (limit := resource.getrlimit(resource.RLIMIT_AS)[0]) != resource.RLIM_INFINITY:
        found.append(limit)
    if _CGROUP.is_file() and (text := _CGROUP.read_text().strip()).isdigit():
        found.append(int(text))
    return min(found)


_Estimate = Callable[[Memory, Shape], Memory]


def _smaller_batch(compute: Any) -> Iterator[tuple[list[str], str, _Estimate]]:
    """Smaller micro-batches, the global batch staying what it is: another one would be another recipe."""

    def shrunk(factor: int) -> _Estimate:
        return lambda m, _: replace(m, activations=m.activations / factor)

    size, steps = compute.batch_size, compute.accumulate_steps
    while size > 1:
        factor = next(number for number in range(2, size + 1) if size % number == 0)
        size, steps = size // factor, steps * factor
        yield [f"compute.batch_size={size}", f"compute.accumulate_steps={steps}"], "none but time", shrunk(factor)


def _layers_again(config: Any) -> Iterator[tuple[list[str], str, _Estimate]]:
    """Gradient checkpointing of the LLM, beside that of the tower where it is asked for already."""
    if config.recomputes_language:
        return
    both = "'compute.gradient_checkpointing=[language,vision]'"
    value = both if config.recomputes_vision else "compute.gradient_checkpointing=true"
    yield (
        [value], "a third more time",
        lambda m, s: replace(m, activations=min(m.activations, s.layer_inputs + m.activations / max(1, s.num_layers))),
    )  # fmt: skip


def _frozen_language(config: Any) -> Iterator[tuple[list[str], str, _Estimate]]:
    """LoRA in place of training the LLM whole, and fewer bits for what is frozen of it then."""
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
            ["model.language.dtype=bf16"], "rounding of the frozen LLM",
            lambda m, s: replace(m, weights=m.weights - s.language_numbers * max(0.0, s.language_bytes - 2)),
        )  # fmt: skip
    if trains and not is_quantised:
        yield (
            ["lora.quantise=nf4"], "a coarser frozen LLM (QLoRA); needs the extra `quant`",
            lambda m, s: replace(m, weights=m.weights - s.linear_numbers * (min(2, s.language_bytes) - NF4_BYTES)),
        )  # fmt: skip


def _suggestions(config: Any) -> Iterator[tuple[list[str], str, _Estimate]]:
    """(settings, cost, estimate) of all that may need less memory, what costs least first."""
    is_stage = isinstance(config, StageConfig)
    if is_stage:
        yield from _layers_again(config)
    yield from _smaller_batch(config.compute)
    if config.compute.precision == "fp32":
        cost = "rounding to 3 digits in what is computed"
        yield ["compute.precision=bf16"], cost, lambda m, _: replace(m, activations=m.activations / 2)
    works_on_whole_tensors = launched_strategy() == "ddp"  # see check_divisible
    if config.optim.kind == "adamw" and works_on_whole_tensors:
        cost = "coarser averages of gradients; needs the extra `quant`"
        yield ["optim.kind=adamw8bit"], cost, lambda m, _: replace(m, optimizer=m.optimizer / 4)
    if is_stage:
        for one in _frozen_language(config):
            if works_on_whole_tensors or one[0] != ["lora.quantise=nf4"]:
                yield one
        length = f"data.max_length_tokens={config.data.max_length_tokens // 2}"
        yield [length], "leaves longer examples out", lambda m, _: replace(m, activations=m.activations / 2)


def suggestions(config: RunConfig, memory: Memory | None = None, shape: Shape | None = None) -> list[Suggestion]:
    """What this run can change to need less memory, what costs least first; with estimates where memory is known.

    Each stands on those above it. What the settings do not allow together is left out.
    """
    found: list[Suggestion] = []
    for settings, cost, estimate in _suggestions(config):
        try:
            changed = with_overrides(config, [shlex.split(setting)[0] for setting in settings])
        except ConfigError:
            continue
        text = " ".join(settings)
        if memory is None or shape is None:
            found.append(Suggestion(text, cost))
        else:
            after = estimate(memory, shape)
            if (saves := memory.total - after.total) <= 0.005 * (memory.total - memory.process):
                continue
            found.append(Suggestion(text, cost, saves, after.total))
            memory = after
        config = changed
    return found


def out_of_memory_text(config: Any, error: BaseException) -> str:
    """What a run says that was out of memory."""
    steps = [f"  {change.setting}  (costs: {change.cost})" for change in suggestions(config)]
    size = f"compute.batch_size={config.compute.batch_size}"
    return (
        f"out of memory: {str(error).splitlines()[0] if str(error) else type(error).__name__}\n"
        f"With {size} it does not fit. What costs least stands first; add until it fits:\n" + "\n".join(steps) + "\n"
        "`mmllm plan CONFIG` runs the longest batch once and says what each of them saves"
    )


@contextlib.contextmanager
def explain_out_of_memory(config: RunConfig) -> Iterator[None]:
    """Turns an error of memory into what to change."""
    from mmllm.training.guards import TrainingError

    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingError(out_of_memory_text(config, error)) from error
