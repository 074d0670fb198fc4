"""What a run's figures say is wrong, though it goes on: it does not look at the picture, or it forgets how to talk.

Judged from the lines of the log alone, so that a run that goes on after a stop judges as if there had been none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmllm.config import LogConfig
from mmllm.training.tracking import figures_of

RELIANCE, TEXT_LOSS = "image_reliance", "text_loss"


def reliance_alarm(rows: Sequence[Mapping[str, Any]], log: LogConfig, max_steps: int) -> str | None:
    """What to say where the newest validation makes image reliance flat.

    It is flat where the last `log.reliance_validations` validations, all of them after `log.reliance_after` of the
    run, are below `log.min_image_reliance`. Said once, until it has been above again. At the end of the run, where
    there were fewer such validations, those there were are enough.
    """
    late = [one for one in figures_of(rows).get(RELIANCE, []) if one[0] > log.reliance_after * max_steps]
    num_flat = 0
    while num_flat < len(late) and late[-1 - num_flat][1] < log.min_image_reliance:
        num_flat += 1
    is_end = bool(late) and late[-1][0] == max_steps and 0 < num_flat < log.reliance_validations
    if num_flat != log.reliance_validations and not is_end:
        return None
    return (
        f"the model does not look at the picture: with those of other examples its loss is only {late[-1][1]:.3f} nats "
        f"per token higher (log.min_image_reliance is {log.min_image_reliance:g}), in {num_flat} validation(s). Does "
        "the projector train, does its learning rate fit, can the answers be guessed from the questions?"
    )


def forgetting_of(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """By how many nats per token the loss on text alone is above that of the run's beginning, at the newest look."""
    curve = figures_of(rows).get(TEXT_LOSS, [])
    return curve[-1][1] - curve[0][1] if len(curve) > 1 else None


def forgetting_alarm(rows: Sequence[Mapping[str, Any]], log: LogConfig) -> str | None:
    """What to say where the newest look at text alone goes over `log.forgetting_budget`, said once until it is back."""
    curve = [value for _, value in figures_of(rows).get(TEXT_LOSS, [])]
    is_over = [value - curve[0] > log.forgetting_budget for value in curve]
    if not is_over or not is_over[-1] or is_over[-2]:  # the first is never over
        return None
    return (
        f"the LLM forgets how to talk: on text alone its loss is {curve[-1] - curve[0]:.3f} nats per token above that "
        f"of the beginning (log.forgetting_budget is {log.forgetting_budget:g}). Lower optim.learning_rates.language, "
        "mix in data.replay, or use lora"
    )


def new_alarms(rows: Sequence[Mapping[str, Any]], log: LogConfig, max_steps: int) -> list[tuple[str, str]]:
    """(kind, text) of what the newest validation makes known."""
    found = ((RELIANCE, reliance_alarm(rows, log, max_steps)), ("forgetting", forgetting_alarm(rows, log)))
    return [(kind, text) for kind, text in found if text is not None]
