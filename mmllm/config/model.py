"""The model: vision tower, projector, LLM, chat template, or a checkpoint that holds all of them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from mmllm.config.base import PathText, PositiveInt, Section


def _check_layers(value: Any) -> Any:
    layers = value if isinstance(value, list | tuple) else [value]
    if not layers or not all(isinstance(layer, int) and not isinstance(layer, bool) and layer < 0 for layer in layers):
        raise ValueError("layers are counted from the last: -1, -2 ..., or a list of such numbers")
    return value


class TowerConfig(Section):
    """One vision encoder.

    `source` is an open_clip model name, `local-dir:FOLDER`, a model config `FILE.json` or `hf-hub:ORG/NAME`;
    `transformers:FOLDER` or `transformers:ORG/NAME`; or `patches:16` for raw patches of 16 pixels and no encoder.
    """

    source: PathText
    pretrained: PathText | None = None  # an open_clip tag or a weights file; none where the source holds its own
    revision: str | None = None  # transformers: only: the commit, tag or branch
    layer: Annotated[int | tuple[int, ...], BeforeValidator(_check_layers)] = -2  # LLaVA reads the last but one
    image_size_px: PositiveInt | None = None  # default: that of the encoder's training

    @model_validator(mode="after")
    def _one_place_of_weights(self) -> TowerConfig:
        if self.pretrained and self.source.startswith(("local-dir:", "hf-hub:", "transformers:", "patches:")):
            raise ValueError(f"{self.source} holds its own weights, so pretrained ({self.pretrained}) must be left out")
        return self


class VisionConfig(TowerConfig):
    """The vision tower: an encoder, or two whose patches are concatenated by channel."""

    fit: Literal["stretch", "pad", "square", "tiles", "native"] = "pad"  # what is done where a picture is not square
    tile_grids: tuple[tuple[PositiveInt, PositiveInt], ...] | None = (
        None  # tiles: rows x columns; default: LLaVA-NeXT's
    )
    max_image_tokens: PositiveInt | None = None  # native: without those that end rows; default: as many as of a square
    fuse_with: TowerConfig | None = None

    @model_validator(mode="after")
    def _options_of_fit(self) -> VisionConfig:
        for name, fit in (("tile_grids", "tiles"), ("max_image_tokens", "native")):
            if getattr(self, name) is not None and self.fit != fit:
                raise ValueError(f"{name} is for fit: {fit}, but fit is {self.fit}; leave it out or change fit")
        if self.tile_grids == ():
            raise ValueError("tile_grids: give at least one pair of rows and columns, such as [1, 2]")
        return self


class ProjectorConfig(Section):
    """One of PROJECTORS and its options."""

    kind: str = "mlp"
    options: dict[str, Any] = Field(default_factory=dict)


class LanguageConfig(Section):
    """The LLM backbone: a folder or a hub name that AutoModelForCausalLM reads. Of a checkpoint's LLM, how it is held.

    `dtype` is that of its weights while they are frozen. What is trained is always kept in fp32; `optim.precision` is
    what is computed in. `stored` is the one that its files have, which is the default beside `model.checkpoint`.
    """

    source: PathText = ""
    revision: str | None = None  # of a hub name: a commit, so that it stays the same model
    attention: Literal["eager", "sdpa", "flash_attention_2", "flex_attention"] | None = None  # sdpa, or eager without
    dtype: Literal["stored", "fp32", "bf16", "fp16"] = "fp32"
    add_tokens: tuple[str, ...] = ()  # special tokens that a template needs and the LLM lacks, such as <|im_end|>
    vocab_multiple: PositiveInt = 1  # the embedding's rows are rounded up to a multiple of this

    @property
    def is_half(self) -> bool:
        """Whether `dtype` asks for 16 bits."""
        return self.dtype in ("bf16", "fp16")


_OF_A_CHECKPOINT = ("attention", "dtype")  # what `language` may say beside `checkpoint`


class ModelConfig(Section):
    """Either `checkpoint` (a model of an earlier stage) or all three parts.

    Beside `checkpoint`, `template` and of `language` dtype and attention may be given.
    """

    checkpoint: PathText | None = None
    vision: VisionConfig | None = None
    projector: ProjectorConfig | None = None
    language: LanguageConfig | None = None
    template: str | None = None  # a key of TEMPLATES; `tokenizer` is the tokenizer's own
    picture_label: str | None = None  # before each of several pictures of a question, {} is its number; "Picture {}: "

    @model_validator(mode="before")
    @classmethod
    def _as_stored(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("checkpoint") and isinstance(values.get("language"), dict):
            return {**values, "language": {"dtype": "stored", **values["language"]}}
        return values

    @model_validator(mode="after")
    def _one_origin(self) -> ModelConfig:
        parts = [name for name in ("vision", "projector", "language", "template") if getattr(self, name) is not None]
        if self.checkpoint:
            held = set(parts) - {"template", "language"}
            changed = set() if self.language is None else {*_changed(self.language)} - {*_OF_A_CHECKPOINT}
            if held or changed:
                names = [part for part in parts if part in held or (part == "language" and changed)]
                raise ValueError(
                    f"checkpoint already holds {', '.join(names)}; give either checkpoint or the parts (beside it "
                    f"template and of language {' and '.join(_OF_A_CHECKPOINT)} may stand)"
                )
        if not self.checkpoint and len(parts) < 4:
            raise ValueError(f"needs vision, projector, language and template, or checkpoint; got {parts or 'nothing'}")
        if not self.checkpoint and self.language and not self.language.source:
            raise ValueError("language.source: missing, and it has no default")
        return self


def _changed(section: Section) -> list[str]:
    """The settings of a section that are not what they are by default; a resolved YAML names them all."""
    return [name for name, field in type(section).model_fields.items() if getattr(section, name) != field.default]
