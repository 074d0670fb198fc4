"""What a run keeps in memory, and what to change where that is too much, in the order of least loss.

The one place of this advice: `mmllm plan` shows it with what each change saves, a run that is out of memory without.
"""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmllm.config import LanguageConfig, OptimConfig, RunConfig
from mmllm.errors import is_out_of_memory
from mmllm.training.throughput import recomputed

_CGROUP = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True)
class Memory:
    """Bytes of one device at the peak of a step, by part."""

    weights: float
    gradients: float
    optimizer: float
    activations: float  # what is kept for backward, and what the kernels need for themselves

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True)
class Shape:
    """What the estimates need to know of model and batch."""

    language: float  # bytes of the LLM's weights
    language_trained: float  # of those, of the trained ones
    num_layers: int
    layer_inputs: float  # bytes of the inputs of all layers, which checkpointing keeps


@dataclass(frozen=True)
class Change:
    """A setting to change. `saves` bytes, with the changes above it made; None where nothing has been measured."""

    setting: str
    cost: str
    saves: float | None = None
    left: float | None = None  # bytes at the peak with it and those above it


_Rule = tuple[str, str, Callable[[Memory, Shape], Memory]]


def size_text(num_bytes: float) -> str:
    """Bytes for people: 1.2 MB, 658 GB."""
    value, units = float(num_bytes), ["B", "kB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.3g} {units[0]}" if value < 1000 else f"{value:.0f} {units[0]}"


def parameter_bytes(parameters: Iterable[Tensor]) -> int:
    return sum({id(one): one.numel() * one.element_size() for one in parameters}.values())


def available_bytes(device: torch.device) -> int:
    """The memory of this device: of a GPU, of this machine, or what this process may have of it."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    if (limit := resource.getrlimit(resource.RLIMIT_AS)[0]) != resource.RLIM_INFINITY:
        found.append(limit)
    if _CGROUP.is_file() and (text := _CGROUP.read_text().strip()).isdigit():
        found.append(int(text))
    return min(found)


def _kinds() -> str:
    return str(OptimConfig.model_fields["kind"].annotation)


def _smaller_batch(optim: Any) -> list[_Rule]:
    """Halves of the micro-batch, the global batch staying what it is: another one would be another recipe."""

    def rule(size: int, steps: int, kept: float) -> _Rule:
        setting = f"optim.batch_size={size} optim.accumulate_steps={steps}"
        return setting, "none but time", lambda m, _: replace(m, activations=m.activations * kept)

    rules: list[_Rule] = []
    size, steps = optim.batch_size, optim.accumulate_steps
    while size % 2 == 0:
        size, steps = size // 2, steps * 2
        rules.append(rule(size, steps, 0.5))
    return rules


def _rules(config: Any) -> list[_Rule]:
    """What this run can change. Estimates: see the arithmetic of each."""
    optim, language, rules = config.optim, getattr(getattr(config, "model", None), "language", None), []
    trains_language, lora = "language" in getattr(config, "train", ()), getattr(config, "lora", None)
    if hasattr(config, "train") and not recomputed(config)[0]:
        rules.append(
            (
                "optim.gradient_checkpointing=true",
                "a third more time",
                lambda m, s: replace(
                    m, activations=min(m.activations, s.layer_inputs + m.activations / max(1, s.num_layers))
                ),
            )
        )
    rules += _smaller_batch(optim)
    if optim.precision == "fp32":
        cost = "rounding to 3 digits in what is computed"
        rules.append(("optim.precision=bf16", cost, lambda m, s: replace(m, activations=m.activations / 2)))
    if language and language.dtype == "fp32" and (lora or not trains_language):
        rules.append(
            (
                "model.language.dtype=bf16",
                "rounding of the frozen LLM",
                lambda m, s: replace(m, weights=m.weights - (s.language - s.language_trained) / 2),
            )
        )
    if optim.kind == "adamw" and "adamw8bit" in _kinds():
        cost = "coarser averages of gradients"
        rules.append(("optim.kind=adamw8bit", cost, lambda m, s: replace(m, optimizer=m.optimizer / 4)))
    if trains_language and not lora:
        rules.append(
            (
                "lora={rank: 64, alpha: 128}",
                "the LLM learns less",
                lambda m, s: replace(
                    m,
                    gradients=max(0.0, m.gradients - 0.97 * s.language_trained),
                    optimizer=max(0.0, m.optimizer * (1 - 0.97 * s.language_trained / max(1.0, m.gradients))),
                ),
            )
        )
    if language and "quantise" in LanguageConfig.model_fields and not getattr(language, "quantise", None):
        rules.append(
            (
                "model.language.quantise=nf4 (with lora)",
                "a coarser frozen LLM",
                lambda m, s: replace(m, weights=max(0.0, m.weights - 0.7 * s.language)),
            )
        )
    if data := getattr(config, "data", None):
        length = data.max_length_tokens // 2
        rules.append(
            (
                f"data.max_length_tokens={length}",
                "leaves longer examples out",
                lambda m, s: replace(m, activations=m.activations / 2),
            )
        )
    return rules


def changes(config: Any, memory: Memory | None = None, shape: Shape | None = None) -> list[Change]:
    """What this run can change to need less memory, what costs least first; with estimates where memory is known."""
    found: list[Change] = []
    for setting, cost, apply in _rules(config):
        if memory is None or shape is None:
            found.append(Change(setting, cost))
            continue
        after = apply(memory, shape)
        if (saves := memory.total - after.total) > 0.005 * memory.total:
            found.append(Change(setting, cost, saves, after.total))
            memory = after
    return found


def out_of_memory_text(config: Any, error: BaseException) -> str:
    """What a run says that was out of memory."""
    steps = [f"  {change.setting}  (costs: {change.cost})" for change in changes(config)]
    size = f"optim.batch_size={config.optim.batch_size}"
    return (
        f"out of memory: {str(error).splitlines()[0] if str(error) else type(error).__name__}\n"
        f"With {size} it does not fit. What costs least stands first; add until it fits:\n" + "\n".join(steps) + "\n"
        "`mmllm plan CONFIG` runs the longest batch once and says what each of them saves"
    )


@contextlib.contextmanager
def advised(config: RunConfig) -> Iterator[None]:
    """Turns an error of memory into what to change."""
    from mmllm.training.loop import TrainingError

    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingError(out_of_memory_text(config, error)) from error
