"""What stops a run that must not go on, or warns of an example that stands out: losses and gradients of each step."""

from __future__ import annotations

import contextlib
import math
import re
import statistics
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from torch import nn

from mmllm.errors import MmllmError
from mmllm.optimizers.optim import Parts

MAX_IDLE_STEPS = 3  # steps in a row in which a loss may be 0, or a trained module get no gradient though it should
NUM_REMEMBERED = 256  # micro-batches that a loss is compared with
MIN_REMEMBERED = 32
OUTLIER_DEVIATIONS = 10.0  # scaled median absolute deviations above the median
_SCALE = 1.4826  # a normal distribution's standard deviation over its median absolute deviation
_LEAST_DEVIATION = 0.05  # of the median, so that losses that are all alike make no outlier of the next one
_LAYER = re.compile(r"^(.*?\.\d+)\.")
_LOST_PEER = ("gloo", "nccl", "connection closed by peer", "connection reset by peer")


Norms = Callable[[Sequence[Sequence[nn.Parameter]]], list[float] | None]


class TrainingError(MmllmError):
    """A run that must not go on; the message names the step and the examples."""


class Watched(Protocol):
    """What the guards ask of a stage."""

    @property
    def parts(self) -> Parts: ...
    def can_train(self, part: str, batch: Any) -> bool: ...
    def names(self, batch: Any) -> list[str]: ...
    def count(self, batch: Any) -> int: ...


def shown_names(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def module_of(name: str) -> str:
    """The layer that a parameter stands in, or where none is numbered its module: what is judged as one."""
    found = _LAYER.match(name)
    return found[1] if found else name.rpartition(".")[0] or name


def trained_modules(parts: Parts) -> dict[tuple[str, str], list[nn.Parameter]]:
    """(part, module) -> its trained parameters. Rows of added tokens are left out: a batch may hold none of them."""
    found: dict[tuple[str, str], list[nn.Parameter]] = {}
    for part, named in parts.items():
        for name, parameter in named:
            if "trainable_tokens" not in name:
                found.setdefault((part, module_of(name)), []).append(parameter)
    return found


@contextlib.contextmanager
def lost_peers(step: Callable[[], int]) -> Iterator[None]:
    """Raises TrainingError in place of what torch says when another process is gone; `step` says where (from 0)."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, TrainingError) or not any(word in str(error).lower() for word in _LOST_PEER):
            raise
        raise TrainingError(
            f"step {step() + 1}: another process of this run has ended or cannot be reached; what it said itself is "
            "the cause. The same command goes on from the newest saved state"
        ) from error


class Guards:
    """Looks at every step before its update. `warnings` collects what it warned of, for whoever writes the log.

    `parts` are the trained parameters as this process holds them, `norms` gives their gradients' norms over all.
    """

    def __init__(self, stage: Watched, parts: Parts, norms: Norms):
        self.stage, self.norms = stage, norms
        self.modules = trained_modules(parts)
        self.idle: dict[tuple[str, str], int] = {}
        self.num_zero = 0
        self.remembered: deque[float] = deque(maxlen=NUM_REMEMBERED)
        self.warnings: list[dict[str, Any]] = []

    def _names(self, batches: Sequence[Any]) -> str:
        return shown_names([name for batch in batches for name in self.stage.names(batch)])

    def check(self, step: int, losses: Sequence[float], norm: float, batches: Sequence[Any]) -> None:
        """One step: the summed loss of each micro-batch, and the gradient's norm. Raises TrainingError."""
        self._check_finite(step, losses, norm, batches)
        means = [(loss / count, batch) for loss, batch in zip(losses, batches, strict=True)
                 if (count := self.stage.count(batch))]  # fmt: skip
        self._check_zero(step, [mean for mean, _ in means], batches)
        self._check_modules(step, batches)
        for mean, batch in means:
            self._compare(step, mean, batch)

    def _check_finite(self, step: int, losses: Sequence[float], norm: float, batches: Sequence[Any]) -> None:
        wrong = [(loss, batch) for loss, batch in zip(losses, batches, strict=True) if not math.isfinite(loss)]
        if not wrong and math.isfinite(norm):
            return
        what = f"loss is not finite ({wrong[0][0]})" if wrong else f"gradient is not finite ({norm})"
        raise TrainingError(
            f"step {step + 1}: the {what}, the update was not made. Examples: "
            f"{self._names([batch for _, batch in wrong] or batches)}. Lower optim.learning_rates, or look at these "
            "examples with `mmllm check`"
        )

    def _check_zero(self, step: int, means: Sequence[float], batches: Sequence[Any]) -> None:
        if means:
            self.num_zero = 0 if any(means) else self.num_zero + 1
        if self.num_zero >= MAX_IDLE_STEPS:
            raise TrainingError(
                f"step {step + 1}: the loss was exactly 0 in {MAX_IDLE_STEPS} steps, so nothing is learnt from now on. "
                f"Are all answers the same, or known by heart? {self._names(batches)}"
            )

    def _check_modules(self, step: int, batches: Sequence[Any]) -> None:
        norms = self.norms(list(self.modules.values()))
        if norms is None:
            return
        reached = {part: any(self.stage.can_train(part, batch) for batch in batches) for part in self.stage.parts}
        for key, norm in zip(self.modules, norms, strict=True):
            if norm > 0:
                self.idle[key] = 0
            elif reached[key[0]]:
                self.idle[key] = self.idle.get(key, 0) + 1
        self._tell_idle(step, batches)

    def _tell_idle(self, step: int, batches: Sequence[Any]) -> None:
        idle = [key for key, count in self.idle.items() if count >= MAX_IDLE_STEPS]
        if not idle:
            return
        whole = [part for part in self.stage.parts if all(key in idle for key in self.modules if key[0] == part)]
        told = whole + [module for part, module in idle if part not in whole]
        raise TrainingError(
            f"step {step + 1}: {shown_names(told)} got no gradient in {MAX_IDLE_STEPS} steps, so it learns nothing. "
            f"Does an answer stand behind the images of these examples? {self._names(batches)}"
        )

    def _compare(self, step: int, mean: float, batch: Any) -> None:
        """Warns of a micro-batch whose loss is far above those of the last ones."""
        if len(self.remembered) >= MIN_REMEMBERED:
            median = statistics.median(self.remembered)
            spread = _SCALE * statistics.median(abs(value - median) for value in self.remembered)
            if mean > median + OUTLIER_DEVIATIONS * max(spread, _LEAST_DEVIATION * median):
                names = self.stage.names(batch)
                text = f"step {step + 1}: the loss of {shown_names(names)} is {mean:.4g}, the median is {median:.4g}"
                self.warnings.append({"step": step + 1, "warning": text, "examples": names, "loss": mean})
        self.remembered.append(mean)
