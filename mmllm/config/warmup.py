"""How the backbones of the embedded default are made."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from mmllm.config.base import Fraction, NonNegative, NotNegativeInt, PathText, PositiveInt, Section
from mmllm.config.model import LanguageConfig
from mmllm.config.run import RunConfig
from mmllm.config.stage import check_precision


class WarmupVisionConfig(RunConfig):
    """Contrastive training of a small CLIP on the scenes world."""

    stage: Literal["warmup_vision"]
    """What the run does: it makes a small CLIP."""
    clip: dict[str, Any] | None = None
    """open_clip's model config of a CLIP to be trained from random weights: embed_dim, vision_cfg, text_cfg."""
    tokenizer: PathText | None = None
    """The folder of the text tower's tokenizer, for a CLIP from random weights."""
    source: PathText | None = None
    """The folder of a trained CLIP to go on from, with its config and tokenizer; instead of `clip` and `tokenizer`."""
    shown: Annotated[dict[Literal["objects", "text", "chart"], PositiveInt], Field(min_length=1)] = {
        "objects": 50, "text": 35, "chart": 15,
    }  # fmt: skip
    """Relative frequency of each kind of scene; kinds left out are not shown. Reading takes longest to learn."""
    num_scenes: PositiveInt
    """Scenes to train on, each with its near misses."""
    num_val_scenes: PositiveInt = 100
    """Scenes to validate on."""
    words_weight: NonNegative = 1.0
    """The weight of the loss on the words of regions; that of the contrastive loss is 1."""

    @property
    def tokenizer_folder(self) -> str:
        """The folder of the text tower's tokenizer, given or that of `source`."""
        return self.tokenizer or self.source or ""

    @model_validator(mode="after")
    def _rates(self) -> WarmupVisionConfig:
        if bool(self.source) == bool(self.clip or self.tokenizer) or bool(self.clip) != bool(self.tokenizer):
            raise ValueError("give source, or clip and tokenizer")
        self.validation.check_warmup(self.stage)
        self.check_rates(["vision"])
        self.check_memory_options()
        return self


class GuideConfig(Section):
    """Some heads of one layer, and what they read before an answer: see mmllm/warmup/attention_guidance.py."""

    layer: NotNegativeInt
    """The layer, counted from 0."""
    heads: Annotated[list[NotNegativeInt], Field(min_length=1)]
    """The heads of this layer, counted from 0."""
    reads: Literal["first", "last", "named"]
    """What these heads are taught to attend to where an answer is read."""


class WarmupLanguageConfig(RunConfig):
    """Training of a small causal LM on descriptions of scenes and questions about them.

    `language` is a transformers config (model_type and its options) of an LM to be trained from random weights with a
    tokenizer of its own, or names the `source` of both, to go on from there.
    """

    stage: Literal["warmup_language"]
    """What the run does: it makes a small LLM."""
    language: LanguageConfig | dict[str, Any]
    """A transformers config (model_type and its options) of an LM to be trained from random weights; or the `source` of
    a trained one."""
    vocab_size: PositiveInt = 512
    """Tokens of the tokenizer that is made for an LM from random weights."""
    new_vocab_size: PositiveInt | None = None
    """Tokens of a tokenizer that is made anew for a trained LM: old tokens keep their embeddings, a new one begins as
    the mean of its pieces. Default: the tokenizer of `source`."""
    num_descriptions: PositiveInt
    """Described scenes to train on."""
    num_turns: PositiveInt = 10
    """Questions in each conversation about a scene."""
    retell: Fraction = 0.15
    """The share of conversations that only tell the scene again in other words."""
    reworded: Fraction = 0.0
    """The share of questions in a person's own words; with any, it is also asked what no description answers."""
    seen: Fraction = 0.0
    """The share of conversations whose scenes are not described, but shown as a grid of words, as image tokens are."""
    renamed: Fraction = 0.0
    """The share of conversations whose colors have other names, so that no color is bound to what training shows with
    it."""
    ask_more: dict[str, PositiveInt] = Field(default_factory=dict)
    """Question type, such as `count`: how many times more it is drawn, where every type counts once."""
    guides: list[GuideConfig] = Field(default_factory=list)
    """Heads whose attention is taught. Default: none."""
    guide_weight: NonNegative = 0.5
    """The weight of the losses that teach attention and `read_out`; that of the loss on tokens is 1."""
    read_out: NotNegativeInt | None = None
    """The layer after which two compared values must be readable from the hidden states. Default: not taught."""
    num_val_descriptions: PositiveInt = 400
    """Described scenes to validate on."""

    @model_validator(mode="after")
    def _rates(self) -> WarmupLanguageConfig:
        self.validation.check_warmup(self.stage)
        self.check_rates(["language"] if self.read_out is None else ["language", "read_out"])
        self.check_memory_options()
        if self.new_vocab_size and isinstance(self.language, dict):
            raise ValueError(
                "new_vocab_size changes the tokenizer of a trained LM, but language has random weights; set vocab_size"
            )
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
