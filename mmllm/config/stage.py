"""Stage 1 and stage 2: which parts of the model are trained, on which data."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from mmllm.config.base import PositiveInt, Section
from mmllm.config.compute import ComputeConfig
from mmllm.config.data import DataConfig
from mmllm.config.lora import LanguageLoraConfig, LoraConfig
from mmllm.config.model import LanguageConfig, ModelConfig
from mmllm.config.run import RunConfig


def check_precision(language: LanguageConfig, compute: ComputeConfig, *, is_trained: bool) -> None:
    """Raises ValueError where the LLM's weights cannot be trained, or computed with, as they are held."""
    if language.dtype == "fp16":
        raise ValueError(
            "model.language.dtype fp16 is for answers only, since small gradients vanish in it; train with fp32, or "
            "with bf16 where the LLM is frozen or has lora"
        )
    if language.is_half and is_trained:
        raise ValueError(
            f"model.language.dtype {language.dtype} would lose small updates of an LLM that is trained whole; leave it "
            "at fp32 and set compute.precision=bf16 to compute in bf16, or use lora"
        )
    if language.attention == "flash_attention_2" and compute.precision == "fp32" and not language.is_half:
        raise ValueError("model.language.attention flash_attention_2 has no fp32; set compute.precision=bf16")


class WordStartConfig(Section):
    """Before step 1: the projector learns which words of the answers its image tokens stand for, without the LLM."""

    steps: PositiveInt = 400
    """Updates of the projector."""
    num_examples: PositiveInt = 3000
    """Examples with pictures to learn from; the tower encodes each of them once."""
    learning_rate: Annotated[float, Field(gt=0)] = 4.0e-3
    """The rate at the start; it falls to a tenth."""


class StageConfig(RunConfig):
    """Stage 1 (projector on captions) and stage 2 (projector and LLM on conversations)."""

    stage: Literal["stage1", "stage2"]
    """What the run does: `stage1` trains on captions, `stage2` on conversations."""
    model: ModelConfig
    """The model: its parts, or a checkpoint."""
    data: DataConfig
    """What is trained and validated on."""
    train: Annotated[tuple[Literal["vision", "projector", "language"], ...], Field(min_length=1)]
    """The parts of the model that are trained."""
    freeze: tuple[str, ...] = ()
    """Patterns of parameter names, such as `*embed_tokens*`, that stay frozen within the parts that `train` lists."""
    word_start: WordStartConfig | None = None
    """Begin with a projector whose tokens lie near the embeddings of the words that they show; `{}` for its defaults.
    Default: a random projector, or that of the checkpoint."""
    vision_last_layers: PositiveInt | None = None
    """Of a trained vision tower, how many of its last layers are trained. Default: all of it."""
    lora: LanguageLoraConfig | None = None
    """Train LoRA adapters of the LLM in place of its weights. Default: the weights."""
    vision_lora: LoraConfig | None = None
    """Train LoRA adapters of the vision tower, which are merged at the end. Default: the weights."""

    @property
    def recomputes_language(self) -> bool:
        """Whether the layers of the LLM are computed again in the backward pass."""
        return "language" in self.compute.gradient_checkpointing

    @property
    def recomputes_vision(self) -> bool:
        """Whether the layers of the vision tower are computed again in the backward pass."""
        return "vision" in self.compute.gradient_checkpointing

    @model_validator(mode="after")
    def _combination(self) -> StageConfig:
        self.check_rates(self.train)
        if isinstance(self.optim.layer_decay, dict) and (unknown := set(self.optim.layer_decay) - set(self.train)):
            raise ValueError(
                f"optim.layer_decay has {sorted(unknown)}, but train lists {sorted(self.train)}; give parts of train"
            )
        if self.word_start and "projector" not in self.train:
            raise ValueError("word_start trains the projector, but train does not list it")
        if self.word_start and self.data.is_streamed:
            raise ValueError("word_start chooses among the examples, but data.train is streamed; take one of them out")
        if self.lora and "language" not in self.train:
            raise ValueError("lora adapts the LLM, but train does not list language")
        if self.vision_lora and self.vision_last_layers:
            raise ValueError("give vision_lora or vision_last_layers: a tower is adapted, or its last layers trained")
        if (self.vision_lora or self.vision_last_layers) and "vision" not in self.train:
            raise ValueError("vision_lora or vision_last_layers train the tower, but train does not list vision")
        if self.lora and self.lora.quantise and self.compute.liger:
            raise ValueError("lora.quantise ends on the CPU, where compute.liger has no kernels; take one of them out")
        if self.validation.text_probe and "language" not in self.train:
            raise ValueError("validation.text_probe shows what a trained LLM forgets, but train does not list language")
        if self.data.cache_features and "vision" in self.train:
            raise ValueError("data.cache_features keeps the frozen tower's output, but train lists vision")
        if "vision" in self.compute.gradient_checkpointing and "vision" not in self.train:
            raise ValueError(
                "compute.gradient_checkpointing lists vision, but train does not: a frozen tower keeps nothing for "
                "backward; leave it out"
            )
        if self.model.language:
            check_precision(self.model.language, self.compute, is_trained="language" in self.train and not self.lora)
        return self
