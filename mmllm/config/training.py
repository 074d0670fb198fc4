"""The settings of how a run trains and what it tells: optimizer, adapters, log."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from mmllm.config.base import Fraction, NonNegative, PathText, PositiveInt, Precision, Section

BITSANDBYTES_KINDS = ("adamw8bit", "paged_adamw", "paged_adamw8bit")  # of optimizers


def _parts_to_recompute(value: Any) -> Any:
    """`true` is the LLM, which has nearly all the memory."""
    return {True: ("language",), False: ()}[value] if isinstance(value, bool) else value


class OptimConfig(Section):
    """AdamW with cosine decay after a linear warm-up. `learning_rates` has one row for each trained part."""

    kind: Literal["adamw", "muon", "adamw8bit", "paged_adamw", "paged_adamw8bit"] = "adamw"
    learning_rates: dict[str, Annotated[float, Field(gt=0)]]
    matrix_learning_rate: Annotated[float, Field(gt=0)] = 0.02  # muon only: that of hidden matrices
    max_steps: PositiveInt
    batch_size: PositiveInt  # examples of one rank and micro-step
    accumulate_steps: PositiveInt = 1
    warmup_fraction: Fraction = 0.03
    decay_fraction: Fraction = 1.0  # the last part of the run, over which cosine decay happens
    layer_decay: Annotated[float, Field(gt=0, le=1)] | dict[str, Annotated[float, Field(gt=0, le=1)]] = 1.0
    rates_of: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)  # pattern of names: rate
    weight_decay: NonNegative = 0.0
    beta2: Fraction = 0.999
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    precision: Precision = "fp32"  # auto: bf16 where the device multiplies in it, see mmllm/runs/requirements.py
    gradient_checkpointing: Annotated[
        tuple[Literal["language", "vision"], ...], BeforeValidator(_parts_to_recompute)
    ] = ()
    compile: bool = False  # the LLM's layers, by torch.compile
    liger: bool = False  # Liger's kernels in the LLM, on a GPU
    loss_chunk_tokens: PositiveInt | None = None  # rows of logits that live at once; default: by the vocabulary


class LoraConfig(Section):
    """LoRA on linear layers through peft. Paper: https://arxiv.org/abs/2106.09685"""

    rank: PositiveInt = 16
    alpha: Annotated[float, Field(gt=0)] = 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"
    dora: bool = False  # direction and length of the weights apart: https://arxiv.org/abs/2402.09353
    rslora: bool = False  # scaled by alpha / sqrt(rank) and not alpha / rank: https://arxiv.org/abs/2312.03732


class LanguageLoraConfig(LoraConfig):
    """Of the LLM. `quantise`: what the adapters lie on is held in few bits while they are trained."""

    quantise: Literal["nf4", "int8"] | None = None


class LogConfig(Section):
    """How often things happen, in optimizer steps. 0 is never; the end of the run always validates and saves."""

    every_steps: PositiveInt = 10
    validate_every_steps: Annotated[int, Field(ge=0)] = 0
    save_every_steps: Annotated[int, Field(ge=0)] = 0
    keep_checkpoints: PositiveInt = 2  # saved states: the newest, and those before it should it be damaged
    keep_best: bool = True  # the model of the lowest val_loss so far, in `best/`
    stall_seconds: NonNegative = 300  # without progress, until each process says what it waits for; 0 is never
    num_samples: Annotated[int, Field(ge=0)] = 4  # answers shown at each validation, with their pictures
    max_val_examples: PositiveInt = 200
    tasks: tuple[PathText, ...] = ()  # asked at each validation: what `mmllm eval` takes
    task_questions: PositiveInt = 50
    min_image_reliance: float = 0.02  # nats per token; see reliance_alarm for the rule
    reliance_after: Fraction = 0.3  # of the run, in which the projector may still be blind
    reliance_validations: PositiveInt = 3
    text_probe: PathText | None = None  # conversations without pictures; default: those of data.val
    max_text_examples: PositiveInt = 32
    forgetting_budget: NonNegative = 0.1  # nats per token that a trained LLM's loss on them may rise
    fail_on_alarm: bool = False  # a run with an alarm is saved, and ends with status 1
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()  # beside log.jsonl, which always is

    @model_validator(mode="before")
    @classmethod
    def _older_name(cls, values: Any) -> Any:
        """Runs of before `trackers` say `tensorboard: true` or `false` in their config.yaml; they can still go on."""
        if isinstance(values, dict) and isinstance(asked := values.get("tensorboard"), bool):
            rest = {name: value for name, value in values.items() if name != "tensorboard"}
            return {**({"trackers": ["tensorboard"]} if asked else {}), **rest}
        return values

    def check_plain(self, stage: str) -> None:
        """Raises ValueError where a warm-up, which makes no model that can be asked, is to be asked."""
        if given := [name for name in ("tasks", "text_probe") if getattr(self, name)]:
            raise ValueError(f"log.{given[0]} is for stage1 and stage2; take it out of this {stage}")
