"""The contract between a stage and the training loop: what each stage brings, and what only some can do."""

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
        denominator: how many items that are. The loop divides by their number in the whole step, over all micro-batches
            and ranks, so that the loss does not depend on how a batch is divided.
        metrics: further sums over the same items, by name: [] each. The log shows them divided as the loss is.
    """

    total: Tensor
    denominator: int
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


class Stage(Protocol):
    """What every stage brings. A new objective is one class with these members and one row in STAGES.

    Attributes:
        module: what the strategy wraps for several processes; `loss` is given the wrapped one.
        notes: what the head of the run says, such as what will not be measured, and why.
        num_examples: None where they are streamed.
        parts: the trained parameters with their names, by part; each part has a learning rate.
        depths: how many layers stand between a trained parameter and the top of its part, by name; for `layer_decay`.
        num_workers: the processes that make batches ahead; 0: this one does.
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
        """The order of examples, in global batches of this size."""

    def batch(self, items: Sequence[Any]) -> Any:
        """The micro-batch of these items of the sampler."""

    def loss(self, module: nn.Module, batch: Any) -> LossOutput:
        """The loss of a micro-batch, by this wrapped module."""

    def count(self, batch: Any) -> int:
        """What `loss` gives as its denominator, known before anything is computed."""

    def num_tokens(self, batch: Any) -> int:
        """The tokens of a batch without padding, for tokens a second."""

    def can_train(self, part: str, batch: Any) -> bool:
        """Whether this batch gives the part a gradient: text alone teaches a projector nothing."""

    def names(self, batch: Any) -> list[str]:
        """The ids of the batch's examples, for messages."""

    def validate(self, step: int, *, writes: bool = True) -> dict[str, float]:
        """Every metric after `step` steps. Files are written where this process `writes`."""

    def save(self, out: Path, log: list[dict[str, Any]]) -> None:
        """Writes what the run has made, with the metrics of its log, into `out`."""


@runtime_checkable
class CountsFlops(Protocol):
    """A stage whose FLOPs can be counted, for MFU."""

    def step_flops(self) -> StepFlops:
        """The counter, built before the model is wrapped for several devices."""


@runtime_checkable
class PreparesFeatures(Protocol):
    """A stage that computes something once, before the first step, which the ranks share."""

    def prepare_features(self, device: Any, *, rank: int, world_size: int) -> None:
        """Computes what is missing. Every rank has to call it."""
