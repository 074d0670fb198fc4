"""Alarms of a run that goes on training: the model does not look at the picture, or the LLM forgets how to talk.

They depend on the log's rows alone, so a resumed run judges as if it had never stopped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmllm.config import AlarmsConfig, RunConfig
from mmllm.evaluation.reliance import RELIANCE, RELIANCE_ERROR
from mmllm.runs.run_log import metric_curves

TEXT_LOSS = "text_loss"
NUM_ERRORS = 2  # standard errors on each side of a metric; together its 95% interval
LOW = 5  # times `alarms.min_image_reliance`; from there on, tasks that gain nothing by the picture raise no alarm


def _task_gains(row: Mapping[str, float]) -> dict[str, tuple[float, float]]:
    """Task -> (its gain in exact answers from the right pictures, the gain's standard error).

    A task without any exact answer is left out, since it says nothing about the pictures.
    """
    names = [key.removesuffix("/gain") for key in row if key.startswith("task/") and key.endswith("/gain")]
    return {
        name: (row[f"{name}/gain"], row.get(f"{name}/gain_error", 0.0)) for name in names if row.get(f"{name}/exact")
    }


def _blindness(row: Mapping[str, float], alarms: AlarmsConfig) -> str | None:
    """Why this validation does not prove that the model looks at the picture; None if it does."""
    reliance, error = row[RELIANCE], row.get(RELIANCE_ERROR, 0.0)
    if reliance - NUM_ERRORS * error < alarms.min_image_reliance:
        spread = f" (+-{NUM_ERRORS * error:.2g})" if error else ""
        return (
            f"with pictures of other examples its loss changes by {reliance:+.3g}{spread} nats per token; a rise above "
            f"{alarms.min_image_reliance:g} would show that it looks (alarms.min_image_reliance)"
        )
    gains = _task_gains(row)
    if not gains or reliance >= LOW * alarms.min_image_reliance:
        return None
    if any(gain > NUM_ERRORS * error for gain, error in gains.values()):
        return None
    listed = ", ".join(f"{name} {gain:+.3f} (+-{NUM_ERRORS * error:.2g})" for name, (gain, error) in gains.items())
    return (
        f"it answers no more questions with the right pictures than with those of other examples: {listed}; the right "
        f"pictures lower its loss by only {reliance:.3g} nats per token"
    )


def reliance_alarm(rows: Sequence[Mapping[str, Any]], config: RunConfig) -> str | None:
    """The alarm if the newest validations do not prove that the model looks at the picture; otherwise None.

    A validation fails if the 95% interval of image reliance reaches below `alarms.min_image_reliance`, or if reliance
    is low and no task has significantly more exact answers with the right pictures. Validations count only after the
    share `alarms.reliance_after` of the run. The alarm is raised at `alarms.reliance_validations` failures in a row,
    and not again before a validation succeeds. At the last step a shorter series of failures is enough.
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
    advice = "Does its learning rate fit" if "projector" in trained else "Should `train` list projector"
    return (
        f"the model does not look at the picture: {reasons[-1]}, in {num_flat} validation(s). Does the projector "
        f"train? {advice}? Can the answers be guessed from the questions? Are there enough steps?"
    )


def forgetting_of(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """How many nats per token the newest text-only loss is above the first; None before there are two."""
    curve = metric_curves(rows).get(TEXT_LOSS, [])
    return curve[-1][1] - curve[0][1] if len(curve) > 1 else None


def _against_forgetting(config: Any) -> list[str]:
    """What this run can change so that its LLM forgets less, by setting names."""
    lora, data = getattr(config, "lora", None), getattr(config, "data", None)
    advice = ["lower optim.learning_rates.language"]
    if data is not None:
        advice.append("raise data.replay.fraction" if data.replay else "mix in text with data.replay")
    if lora is None:
        advice.append("adapt the LLM with lora.rank=64 in place of training it whole")
    elif lora.rank > 1:
        advice.append(f"lower lora.rank (it is {lora.rank})")
    return advice


def forgetting_alarm(rows: Sequence[Mapping[str, Any]], config: RunConfig) -> str | None:
    """The alarm when the text-only loss goes over `alarms.forgetting_budget`; repeated only after it was back below."""
    curve = [value for _, value in metric_curves(rows).get(TEXT_LOSS, [])]
    budget = config.alarms.forgetting_budget
    is_over = [value - curve[0] > budget for value in curve]
    if not is_over or not is_over[-1] or is_over[-2]:  # the first value is never over
        return None
    *advice, last = _against_forgetting(config)
    return (
        f"the LLM forgets how to talk: its loss on text alone is {curve[-1] - curve[0]:.3f} nats per token above the "
        f"first (alarms.forgetting_budget is {budget:g}). To forget less, {', '.join(advice)}, or {last}"
    )


def new_alarms(rows: Sequence[Mapping[str, Any]], config: RunConfig) -> list[tuple[str, str]]:
    """(kind, text) of each alarm that the newest validation raises."""
    alarms = ((RELIANCE, reliance_alarm(rows, config)), ("forgetting", forgetting_alarm(rows, config)))
    return [(kind, text) for kind, text in alarms if text is not None]
