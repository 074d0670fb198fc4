"""What a run writes while it goes on, and how often."""

from __future__ import annotations

from typing import Literal

from mmllm.config.base import NonNegative, NotNegativeInt, PositiveInt, Section


class LogConfig(Section):
    """The log, the trackers and the saved states. The end of a run is always logged."""

    every_steps: PositiveInt = 10
    """Optimizer steps between two lines of the log."""
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Where metrics go besides `log.jsonl`, which is always written. Needs `mmllm[track]`, `mmllm[wandb]` or
    `mmllm[trackio]`."""
    stall_seconds: NonNegative = 300
    """Seconds without progress after which each process says what it waits for. 0 is never."""
    save_every_steps: NotNegativeInt = 0
    """Optimizer steps between two saved states, from which a stopped run is resumed. 0 is never."""
    keep_checkpoints: PositiveInt = 2
    """Saved states that are kept: the newest, and those before it, should it be damaged."""
