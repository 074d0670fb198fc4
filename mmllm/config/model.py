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


def _as_tuple(value: Any) -> Any:
    """YAML's list as the tuple that it becomes: of LanguageConfig and a plain mapping, pydantic takes what is exact."""
    return tuple(value) if isinstance(value, list) else value


class TowerConfig(Section):
    """One vision encoder."""

    source: PathText
    """An open_clip model name, `local-dir:FOLDER`, `hf-hub:ORG/NAME`, or a model config `FILE.json`;
    `transformers:FOLDER` or `transformers:ORG/NAME`; or `patches:16`: raw patches of 16 pixels without an encoder."""
    pretrained: PathText | None = None
    """An open_clip tag or a weights file. Default: none, for a source that holds its own weights."""
    revision: str | None = None
    """Of a `transformers:` source on the hub: the commit, tag or branch."""
    feature_layer: Annotated[int | tuple[int, ...], BeforeValidator(_check_layers)] = -2
    """The layer whose patches are read, counted from the last: -1, -2 ...; several are put side by side by channel.
    LLaVA reads the last but one."""
    image_size_px: PositiveInt | None = None
    """Height and width of the encoder's input, in pixels; position embeddings are interpolated. Default: the size that
    the encoder was trained on."""

    @model_validator(mode="after")
    def _one_place_of_weights(self) -> TowerConfig:
        if self.pretrained and self.source.startswith(("local-dir:", "hf-hub:", "transformers:", "patches:")):
            raise ValueError(f"{self.source} holds its own weights, so pretrained ({self.pretrained}) must be left out")
        return self


class VisionConfig(TowerConfig):
    """The vision tower: an encoder, or two whose patches are concatenated by channel."""

    image_mode: Literal["stretch", "pad", "crop", "anyres", "native"] = "pad"
    """How a picture that is not square is shown: `stretch` squeezes it, `pad` pads it with the mean color, `crop` cuts
    its middle out, `anyres` shows the whole and tiles of it as LLaVA-NeXT does, `native` keeps its aspect ratio."""
    tile_grids: tuple[tuple[PositiveInt, PositiveInt], ...] | None = None
    """With `image_mode: anyres`, the grids that may be chosen, as pairs of rows and columns. Default: LLaVA-NeXT's."""
    max_image_tokens: PositiveInt | None = None
    """With `image_mode: native`, the most tokens of a picture, without those that end its rows. Default: as many as of
    a square."""
    fuse_with: TowerConfig | None = None
    """A second encoder, whose patches are put beside those of the first one. Default: none."""

    @model_validator(mode="after")
    def _options_of_image_mode(self) -> VisionConfig:
        for name, mode in (("tile_grids", "anyres"), ("max_image_tokens", "native")):
            if getattr(self, name) is not None and self.image_mode != mode:
                raise ValueError(
                    f"{name} is for image_mode: {mode}, but image_mode is {self.image_mode}; leave it out or change "
                    "image_mode"
                )
        if self.tile_grids == ():
            raise ValueError("tile_grids: give at least one pair of rows and columns, such as [1, 2]")
        return self


class ProjectorConfig(Section):
    """The projector from patches to LLM tokens."""

    kind: str = "mlp"
    """One of linear, mlp, downsample, resampler and c_abstractor."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of this kind, such as `{depth: 2}` of mlp."""


class LanguageConfig(Section):
    """The LLM backbone, which transformers' AutoModelForCausalLM reads. Of a checkpoint's LLM, how it is held."""

    source: PathText = ""
    """A folder, a name on the hub, or a `FILE.gguf`, which is converted to full precision once."""
    revision: str | None = None
    """Of a name on the hub: the commit, so that it stays the same model."""
    attention: Literal["eager", "sdpa", "flash_attention_2", "flex_attention"] | None = None
    """How attention is computed. Default: sdpa, or eager where the LLM has no sdpa."""
    dtype: Literal["stored", "fp32", "bf16", "fp16"] = "fp32"
    """What its weights are held in while they are frozen; trained weights are fp32 in any case. `stored` is what its
    files have, and the default beside `model.checkpoint`. What is computed in is `compute.precision`."""
    extra_special_tokens: Annotated[tuple[str, ...], BeforeValidator(_as_tuple)] = ()
    """Special tokens that the template needs and the LLM lacks, such as `<|im_end|>`."""
    vocab_multiple: PositiveInt = 1
    """The rows of embedding and head are rounded up to a multiple of this; 64 suits tensor cores."""

    @property
    def is_half(self) -> bool:
        """Whether `dtype` asks for 16 bits."""
        return self.dtype in ("bf16", "fp16")


_OF_A_CHECKPOINT = ("attention", "dtype")  # what `language` may say beside `checkpoint`


class ModelConfig(Section):
    """Either `checkpoint`, or all of `vision`, `projector`, `language` and `template`.

    Beside `checkpoint` may stand `template`, and of `language` dtype and attention.
    """

    checkpoint: PathText | None = None
    """A checkpoint of an earlier stage, with all its parts. Default: the parts are put together anew."""
    vision: VisionConfig | None = None
    """The vision tower. Default: the checkpoint's."""
    projector: ProjectorConfig | None = None
    """The projector, with random weights. Default: the checkpoint's."""
    language: LanguageConfig | None = None
    """The LLM. Default: the checkpoint's."""
    template: str | None = None
    """The chat template: plain, vicuna_v1, llama_2, mistral_instruct, chatml or llama3, or `tokenizer` for the LLM's
    own. Default: the checkpoint's."""
    picture_label: str | None = None
    """The text before each of several pictures of a question, where {} is its number. Default: the checkpoint's, or
    `Picture {}: `."""

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
