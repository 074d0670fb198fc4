"""The contract between a stage and the training loop: what every stage provides, and optional abilities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from mmllm.batching.sampler import Sampler
from mmllm.optimizers.optim import Parts
from mmllm.runs.flops import StepFlops


@dataclass(frozen=True)
class LossOutput:
    """The loss of one micro-batch.

    Attributes:
        total: summed over the items that the stage counts, such as supervised tokens: [].
        denominator: the number of these items. The loop divides by their number in the whole step, over all
            micro-batches and ranks, so that the loss does not depend on how a batch is split.
        metrics: further sums over the same items, by name: [] each. The log divides them as it divides the loss.
    """

    total: Tensor
    denominator: int
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


class Stage(Protocol):
    """What every stage provides. A new objective is one class with these members and one row in STAGES.

    Attributes:
        module: the module that the strategy wraps for several processes; `loss` receives the wrapped one.
        notes: lines to print when the run starts, such as what will not be measured, and why.
        num_examples: the number of training examples; None if they are streamed.
        parts: the trained parameters with their names, by part; each part has a learning rate.
        depths: how many layers lie between a trained parameter and the top of its part, by name; for `layer_decay`.
        num_workers: processes that prepare batches ahead of time; 0: the main process makes them.
    """

    module: nn.Module
    notes: list[str]
    num_workers: int

    @property
    def num_examples(self) -> int | None: ...
    @property
    def parts(self) -> Parts: ...
    @property
    def depths(self) -> Mapping[str, int]: ...

    def sampler(self, batch_size: int) -> Sampler:
        """The sampler for global batches of this size."""

    def batch(self, items: Sequence[Any]) -> Any:
        """The micro-batch of these sampler items. Raises MmllmError or OSError for data that cannot be used."""

    def loss(self, module: nn.Module, batch: Any) -> LossOutput:
        """The loss of a micro-batch, computed by the wrapped `module`."""

    def count(self, batch: Any) -> int:
        """The denominator that `loss` will return, before anything is computed."""

    def num_tokens(self, batch: Any) -> int:
        """The tokens of a batch without padding, for the log's tokens per second."""

    def can_train(self, part: str, batch: Any) -> bool:
        """Whether this batch gives the part a gradient: a text-only batch gives the projector none."""

    def names(self, batch: Any) -> list[str]:
        """The ids of the batch's examples, for messages."""

    def validate(self, step: int, *, writes: bool = True) -> dict[str, float]:
        """Every validation metric after `step` steps, by name. Writes files only if `writes`."""

    def save(self, out: Path, log: list[dict[str, Any]]) -> None:
        """Writes the trained model and the metrics of the run's `log` into `out`."""


@runtime_checkable
class CountsFlops(Protocol):
    """A stage whose FLOPs can be counted, for MFU."""

    def step_flops(self) -> StepFlops:
        """The FLOP counter. It must be built before the model is wrapped for several devices."""


@runtime_checkable
class StartsProjector(Protocol):
    """A stage that can train the projector alone before the run's first step."""

    def start_projector(self, device: Any) -> None:
        """Trains the projector before the first step. Every rank has to call it."""


@runtime_checkable
class PreparesFeatures(Protocol):
    """A stage that computes features once, before the first step, for all ranks."""

    def prepare_features(self, device: Any, *, rank: int, world_size: int) -> None:
        """Computes the missing features. Every rank has to call it."""
