"""What a run's figures say is wrong, though it goes on: it does not look at the picture, or it forgets how to talk.

Judged from the lines of the log alone, so that a run that goes on after a stop judges as if there had been none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmllm.config import AlarmsConfig, RunConfig
from mmllm.evaluation.reliance import RELIANCE, RELIANCE_ERROR
from mmllm.runs.run_log import figures_of

TEXT_LOSS = "text_loss"
NUM_ERRORS = 2  # standard errors below and above a figure that make its interval of 95%
LOW = 5  # times `alarms.min_image_reliance`: above it answers that gain nothing by the picture are no sign of blindness


def _task_gains(row: Mapping[str, float]) -> dict[str, tuple[float, float]]:
    """Of each task that shows pictures: by how much the right ones help, and the standard error of that.

    A task of which no answer is right says nothing of pictures.
    """
    names = [key.removesuffix("/gain") for key in row if key.startswith("task/") and key.endswith("/gain")]
    return {
        name: (row[f"{name}/gain"], row.get(f"{name}/gain_error", 0.0)) for name in names if row.get(f"{name}/exact")
    }


def _blindness(row: Mapping[str, float], alarms: AlarmsConfig) -> str | None:
    """Why this validation gives no proof that the model looks at the picture; None where it does."""
    reliance, error = row[RELIANCE], row.get(RELIANCE_ERROR, 0.0)
    if reliance - NUM_ERRORS * error < alarms.min_image_reliance:
        spread = f" (+-{NUM_ERRORS * error:.2g})" if error else ""
        return (
            f"with those of other examples its loss changes by {reliance:+.3g}{spread} nats per token; a rise above "
            f"{alarms.min_image_reliance:g} would be looking (alarms.min_image_reliance)"
        )
    gains = _task_gains(row)
    if not gains or reliance >= LOW * alarms.min_image_reliance:
        return None
    if any(gain > NUM_ERRORS * error for gain, error in gains.values()):
        return None
    told = ", ".join(f"{name} {gain:+.3f} (+-{NUM_ERRORS * error:.2g})" for name, (gain, error) in gains.items())
    return (
        f"with its own pictures it answers no more questions than with those of others: {told}; its loss is "
        f"{reliance:.3g} nats per token lower with its own"
    )


def reliance_alarm(rows: Sequence[Mapping[str, Any]], config: RunConfig) -> str | None:
    """What to say where the newest validation cannot show that the model looks at the picture.

    It cannot where the interval of 95% of image reliance reaches below `alarms.min_image_reliance`; nor where reliance
    is low and the tasks have no more right answers with the right pictures. Said once, until it was better again: after
    `alarms.reliance_validations` such validations in a row, all of them after `alarms.reliance_after` of the run. At
    the end of the run, where there were fewer validations, those there were are enough.
    """
    alarms, max_steps = config.alarms, config.optim.max_steps
    late = [row for row in rows if RELIANCE in row and row["step"] > alarms.reliance_after * max_steps]
    reasons = [_blindness(row, alarms) for row in late]
    num_flat = 0
    while num_flat < len(late) and reasons[-1 - num_flat] is not None:
        num_flat += 1
    is_end = bool(late) and late[-1]["step"] == max_steps and 0 < num_flat < alarms.reliance_validations
    if num_flat != alarms.reliance_validations and not is_end:
        return None
    trained = getattr(config, "train", ())
    advice = "does its learning rate fit" if "projector" in trained else "should `train` list projector"
    return (
        f"the model does not look at the picture: {reasons[-1]}, in {num_flat} validation(s). Does the projector "
        f"train, {advice}, can the answers be guessed from the questions, are there enough steps?"
    )


def forgetting_of(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """By how many nats per token the loss on text alone is above that of the run's beginning, at the newest look."""
    curve = figures_of(rows).get(TEXT_LOSS, [])
    return curve[-1][1] - curve[0][1] if len(curve) > 1 else None


def _against_forgetting(config: Any) -> list[str]:
    """What this run can change so that its LLM forgets less; settings by their names."""
    lora, data = getattr(config, "lora", None), getattr(config, "data", None)
    found = ["lower optim.learning_rates.language"]
    if data is not None:
        found.append("raise data.replay.fraction" if data.replay else "mix in text with data.replay")
    if lora is None:
        found.append("adapt the LLM with lora.rank=64 in place of training it whole")
    elif lora.rank > 1:
        found.append(f"lower lora.rank (it is {lora.rank})")
    return found


def forgetting_alarm(rows: Sequence[Mapping[str, Any]], config: RunConfig) -> str | None:
    """What to say where the newest look at text alone goes over `alarms.forgetting_budget`, once until it is back."""
    curve = [value for _, value in figures_of(rows).get(TEXT_LOSS, [])]
    budget = config.alarms.forgetting_budget
    is_over = [value - curve[0] > budget for value in curve]
    if not is_over or not is_over[-1] or is_over[-2]:  # the first is never over
        return None
    *advice, last = _against_forgetting(config)
    return (
        f"the LLM forgets how to talk: on text alone its loss is {curve[-1] - curve[0]:.3f} nats per token above that "
        f"of the beginning (alarms.forgetting_budget is {budget:g}). To keep more of it {', '.join(advice)}, or {last}"
    )


def new_alarms(rows: Sequence[Mapping[str, Any]], config: RunConfig) -> list[tuple[str, str]]:
    """(kind, text) of what the newest validation makes known."""
    found = ((RELIANCE, reliance_alarm(rows, config)), ("forgetting", forgetting_alarm(rows, config)))
    return [(kind, text) for kind, text in found if text is not None]
