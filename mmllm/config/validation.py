"""What is measured while a run goes on, and what of it is an alarm."""

from __future__ import annotations

from mmllm.config.base import Fraction, NonNegative, NotNegativeInt, PathText, PositiveInt, Section


class ValidationConfig(Section):
    """What each validation measures. The beginning and the end of a run are always validated."""

    every_steps: NotNegativeInt = 0
    """Optimizer steps between two validations. 0 is none but those before the first step and after the last."""
    num_samples: NotNegativeInt = 4
    """Answers that are shown at each validation, with their pictures."""
    max_examples: PositiveInt = 200
    """Examples of `data.val` that are validated on, evenly spaced over all of them."""
    tasks: tuple[PathText, ...] = ()
    """Tasks that are asked at each validation: what `mmllm eval` takes."""
    task_questions: PositiveInt = 50
    """Questions of each task that are asked at each validation."""
    text_probe: PathText | None = None
    """A file of conversations without pictures, on which a trained LLM's forgetting is measured. Default: those of
    `data.val`."""
    max_text_examples: PositiveInt = 32
    """Conversations of the text probe that are used, evenly spaced over all of them."""
    keep_best: bool = True
    """Keep the model of the lowest `val_loss` so far in the folder `best` of the run."""

    def check_warmup(self, stage: str) -> None:
        """Raises ValueError for what a warm-up, whose model answers no questions about pictures, cannot measure."""
        if given := [name for name in ("tasks", "text_probe") if getattr(self, name)]:
            raise ValueError(f"validation.{given[0]} is for stage1 and stage2; take it out of this {stage}")


class AlarmsConfig(Section):
    """When a validation raises an alarm: the model does not look at its pictures, or forgets how to talk."""

    min_image_reliance: float = 0.02
    """Nats per token by which another picture must raise the loss. Less is an alarm: see mmllm/runs/alarms.py."""
    reliance_after: Fraction = 0.3
    """The share of the run before which image reliance raises no alarm: the projector may still be blind then."""
    reliance_validations: PositiveInt = 3
    """Validations in a row that must have too little image reliance."""
    forgetting_budget: NonNegative = 0.1
    """Nats per token by which a trained LLM's loss on text alone may rise over that of step 0."""
    fail: bool = False
    """A run that had an alarm is saved as any other, but ends with exit status 1."""
