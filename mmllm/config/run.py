"""What every run has: a stage, a folder, a seed, an optimizer and a log."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

from pydantic import Field

from mmllm.config.base import PathText, PositiveInt, Section
from mmllm.config.training import LogConfig, OptimConfig


class RunConfig(Section):
    """What every run has. `stage` says which of CONFIGS this is."""

    stage: str
    out: PathText
    seed: Annotated[int, Field(ge=0)] = 0
    num_threads: PositiveInt | None = None  # CPU threads of one process; default: torch's own
    optim: OptimConfig
    log: LogConfig = LogConfig()

    def check_memory_options(self) -> None:
        """Raises ValueError for what a warm-up, whose models are small, does not have."""
        for name in ("gradient_checkpointing", "loss_chunk_tokens", "layer_decay", "compile", "liger"):
            if getattr(self.optim, name) != OptimConfig.model_fields[name].default:
                raise ValueError(f"optim.{name} is for stage1 and stage2; {self.stage} has none, leave it out")

    def check_rates(self, parts: Iterable[str]) -> None:
        """Raises ValueError where the trained parts are not those that have a learning rate."""
        if set(self.optim.learning_rates) != set(parts):
            raise ValueError(
                f"optim.learning_rates has {sorted(self.optim.learning_rates)} but this run trains {sorted(parts)}; "
                "give one rate a part"
            )
