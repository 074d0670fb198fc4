"""What every run has: a stage, a folder, a seed, and how it computes, trains, validates and logs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

from mmllm.config.base import RESUMABLE, NotNegativeInt, PathText, Section
from mmllm.config.compute import ComputeConfig
from mmllm.config.log import LogConfig
from mmllm.config.optim import OptimConfig
from mmllm.config.validation import AlarmsConfig, ValidationConfig


class RunConfig(Section):
    """What every run has. `stage` says which of CONFIGS this is."""

    stage: str
    """What the run does: stage1, stage2, warmup_vision or warmup_language."""
    out: Annotated[PathText, RESUMABLE]
    """The folder that the run writes: its log, its saved states, and in the end its checkpoint."""
    seed: NotNegativeInt = 0
    """Decides the order of the data, the initial weights and dropout."""
    compute: ComputeConfig
    """How a step is computed: batches, precision, memory."""
    optim: OptimConfig
    """The optimizer and its learning rates."""
    validation: Annotated[ValidationConfig, RESUMABLE] = ValidationConfig()
    """What is measured while the run goes on."""
    alarms: Annotated[AlarmsConfig, RESUMABLE] = AlarmsConfig()
    """When a validation raises an alarm."""
    log: Annotated[LogConfig, RESUMABLE] = LogConfig()
    """What the run writes while it goes on."""

    def check_memory_options(self) -> None:
        """Raises ValueError for what a warm-up, whose models are small, does not have."""
        for section, names in (
            ("compute", ("gradient_checkpointing", "loss_chunk_tokens", "compile", "liger")),
            ("optim", ("layer_decay",)),
        ):
            values: Section = getattr(self, section)
            for name in names:
                if getattr(values, name) != type(values).model_fields[name].default:
                    raise ValueError(f"{section}.{name} is for stage1 and stage2; {self.stage} has none, leave it out")

    def check_rates(self, parts: Iterable[str]) -> None:
        """Raises ValueError where the trained parts are not those that have a learning rate."""
        if set(self.optim.learning_rates) != set(parts):
            raise ValueError(
                f"optim.learning_rates has {sorted(self.optim.learning_rates)} but this run trains {sorted(parts)}; "
                "give one rate a part"
            )
