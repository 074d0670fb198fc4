"""Guards check losses and gradients of each step: they stop a run that cannot learn, and warn of outliers."""

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

MAX_IDLE_STEPS = 3  # steps in a row with a loss of 0, or with no gradient for a module that should have one
NUM_REMEMBERED = 256  # micro-batches whose losses a new loss is compared with
MIN_REMEMBERED = 32
OUTLIER_DEVIATIONS = 10.0  # scaled median absolute deviations above the median
_STD_PER_MAD = 1.4826  # a normal distribution's standard deviation over its median absolute deviation (MAD)
_MIN_DEVIATION = 0.05  # of the median, so that nearly equal losses do not make an outlier of the next one
_NUMBERED_LAYER = re.compile(r"^(.*?\.\d+)\.")
_LOST_PEER_MESSAGES = ("gloo", "nccl", "connection closed by peer", "connection reset by peer")


class TrainingError(MmllmError):
    """The run must not continue; the message names the step and the examples."""


class GuardedStage(Protocol):
    """The part of a stage that the guards use."""

    @property
    def parts(self) -> Parts: ...
    def can_train(self, part: str, batch: Any) -> bool: ...
    def names(self, batch: Any) -> list[str]: ...
    def count(self, batch: Any) -> int: ...


def shown_names(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def module_of(name: str) -> str:
    """The name of the numbered layer that holds a parameter, or of its module if no layer is numbered."""
    layer = _NUMBERED_LAYER.match(name)
    return layer[1] if layer else name.rpartition(".")[0] or name


def trained_modules(parts: Parts) -> dict[tuple[str, str], list[nn.Parameter]]:
    """(part, module) -> its trained parameters. Rows of added tokens are left out: a batch may hold none of them."""
    modules: dict[tuple[str, str], list[nn.Parameter]] = {}
    for part, named in parts.items():
        for name, parameter in named:
            if "trainable_tokens" not in name:
                modules.setdefault((part, module_of(name)), []).append(parameter)
    return modules


@contextlib.contextmanager
def explain_lost_peers(step: Callable[[], int]) -> Iterator[None]:
    """Replaces torch's error about a lost process by a TrainingError; `step` returns the current step (from 0)."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, TrainingError) or not any(word in str(error).lower() for word in _LOST_PEER_MESSAGES):
            raise
        raise TrainingError(
            f"step {step() + 1}: another process of this run has ended or cannot be reached; its own message tells "
            "the cause. The same command resumes from the newest saved state"
        ) from error


class Guards:
    """Checks every step before its update. `warnings` holds this rank's warnings until the loop logs them.

    Attributes:
        modules: the trained parameters, as this process holds them, of each module whose gradient is checked.
    """

    def __init__(self, stage: GuardedStage, parts: Parts):
        self.stage = stage
        modules = trained_modules(parts)
        self.module_keys, self.modules = [*modules], [*modules.values()]
        self.idle: dict[tuple[str, str], int] = {}
        self.num_zero = 0
        self.remembered: deque[float] = deque(maxlen=NUM_REMEMBERED)
        self.warnings: list[dict[str, Any]] = []

    def _names(self, batches: Sequence[Any]) -> str:
        return shown_names([name for batch in batches for name in self.stage.names(batch)])

    def check(
        self, step: int, losses: Sequence[float], norm: float, batches: Sequence[Any],
        module_norms: Sequence[float] | None,
    ) -> None:  # fmt: skip
        """Checks one step. Raises TrainingError.

        Args:
            losses: the summed loss of each micro-batch.
            norm: the gradient norm over all parameters.
            module_norms: the gradient norm of each of `modules`; None if it is not known.
        """
        self._check_finite(step, losses, norm, batches)
        means = [(loss / count, batch) for loss, batch in zip(losses, batches, strict=True)
                 if (count := self.stage.count(batch))]  # fmt: skip
        self._check_zero(step, [mean for mean, _ in means], batches)
        if module_norms is not None:
            self._check_modules(step, module_norms, batches)
        for mean, batch in means:
            self._warn_of_outlier(step, mean, batch)

    def _check_finite(self, step: int, losses: Sequence[float], norm: float, batches: Sequence[Any]) -> None:
        wrong = [(loss, batch) for loss, batch in zip(losses, batches, strict=True) if not math.isfinite(loss)]
        if not wrong and math.isfinite(norm):
            return
        problem = f"loss is not finite ({wrong[0][0]})" if wrong else f"gradient is not finite ({norm})"
        raise TrainingError(
            f"step {step + 1}: the {problem}, the update was not made. Examples: "
            f"{self._names([batch for _, batch in wrong] or batches)}. Lower optim.learning_rates, or look at these "
            "examples with `mmllm check`"
        )

    def _check_zero(self, step: int, means: Sequence[float], batches: Sequence[Any]) -> None:
        if means:
            self.num_zero = 0 if any(means) else self.num_zero + 1
        if self.num_zero >= MAX_IDLE_STEPS:
            raise TrainingError(
                f"step {step + 1}: the loss was exactly 0 in {MAX_IDLE_STEPS} steps, so the model learns nothing more. "
                f"Are all answers the same, or known by heart? {self._names(batches)}"
            )

    def _check_modules(self, step: int, norms: Sequence[float], batches: Sequence[Any]) -> None:
        expects_gradient = {
            part: any(self.stage.can_train(part, batch) for batch in batches) for part in self.stage.parts
        }
        for key, norm in zip(self.module_keys, norms, strict=True):
            if norm > 0:
                self.idle[key] = 0
            elif expects_gradient[key[0]]:
                self.idle[key] = self.idle.get(key, 0) + 1
        self._raise_if_idle(step, batches)

    def _raise_if_idle(self, step: int, batches: Sequence[Any]) -> None:
        idle = [key for key, count in self.idle.items() if count >= MAX_IDLE_STEPS]
        if not idle:
            return
        idle_parts = [
            part for part in self.stage.parts if all(key in idle for key in self.module_keys if key[0] == part)
        ]
        names = idle_parts + [module for part, module in idle if part not in idle_parts]
        raise TrainingError(
            f"step {step + 1}: {shown_names(names)} got no gradient in {MAX_IDLE_STEPS} steps, so it learns nothing. "
            f"Does an answer follow the images of these examples? {self._names(batches)}"
        )

    def _warn_of_outlier(self, step: int, mean: float, batch: Any) -> None:
        """Warns of a micro-batch whose mean loss is far above those of recent ones."""
        if len(self.remembered) >= MIN_REMEMBERED:
            median = statistics.median(self.remembered)
            deviation = _STD_PER_MAD * statistics.median(abs(value - median) for value in self.remembered)
            if mean > median + OUTLIER_DEVIATIONS * max(deviation, _MIN_DEVIATION * median):
                names = self.stage.names(batch)
                text = f"step {step + 1}: the loss of {shown_names(names)} is {mean:.4g}, the median is {median:.4g}"
                self.warnings.append({"step": step + 1, "warning": text, "examples": names, "loss": mean})
        self.remembered.append(mean)
