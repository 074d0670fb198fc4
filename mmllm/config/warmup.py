"""How the backbones of the embedded default are made."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from mmllm.config.base import Fraction, PathText, PositiveInt, Section
from mmllm.config.model import LanguageConfig
from mmllm.config.run import RunConfig
from mmllm.config.stage import check_precision


class WarmupVisionConfig(RunConfig):
    """Contrastive training of a small CLIP on the scenes world."""

    stage: Literal["warmup_vision"]
    clip: dict[str, Any]  # open_clip's model config: embed_dim, vision_cfg, text_cfg
    tokenizer: PathText  # folder of the text tower's tokenizer
    num_scenes: PositiveInt  # each with its near misses
    num_val_scenes: PositiveInt = 100
    words_weight: Annotated[float, Field(ge=0)] = 1.0  # of the loss on the words of regions, beside the contrastive one

    @model_validator(mode="after")
    def _rates(self) -> WarmupVisionConfig:
        self.validation.check_warmup(self.stage)
        self.check_rates(["vision"])
        self.check_memory_options()
        return self


class GuideConfig(Section):
    """Some heads of one layer, and what they read before an answer: see mmllm/warmup/attention_guidance.py."""

    layer: Annotated[int, Field(ge=0)]
    heads: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
    reads: Literal["first", "last", "named"]


class WarmupLanguageConfig(RunConfig):
    """Training of a small causal LM on descriptions of scenes and questions about them.

    `language` is a transformers config (model_type and its options) of an LM to be trained from random weights with a
    tokenizer of its own, or names the `source` of both, to go on from there.
    """

    stage: Literal["warmup_language"]
    language: LanguageConfig | dict[str, Any]
    vocab_size: PositiveInt = 512
    num_descriptions: PositiveInt
    num_turns: PositiveInt = 10
    retell: Fraction = 0.15  # share of conversations that only tell the scene again in other words
    ask_more: dict[str, PositiveInt] = Field(default_factory=dict)  # question type: how often it is asked, on top of 1
    guides: list[GuideConfig] = Field(default_factory=list)
    guide_weight: Annotated[float, Field(ge=0)] = 0.5  # of the loss that shows attention where an answer is read
    read_out: Annotated[int, Field(ge=0)] | None = None  # the layer behind which two compared values must be readable
    num_val_descriptions: PositiveInt = 400

    @model_validator(mode="after")
    def _rates(self) -> WarmupLanguageConfig:
        self.validation.check_warmup(self.stage)
        self.check_rates(["language"] if self.read_out is None else ["language", "read_out"])
        self.check_memory_options()
        if isinstance(self.language, LanguageConfig):
            if not self.language.source:
                raise ValueError("language.source: missing, and it has no default")
            check_precision(self.language, self.compute, is_trained=True)
        if isinstance(self.language, dict) and ("model_type" not in self.language or "source" in self.language):
            raise ValueError(
                f"language: needs a model_type and its options, or source, revision and attention of a trained LM; "
                f"got {sorted(self.language)}"
            )
        return self
