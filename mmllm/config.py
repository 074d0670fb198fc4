"""Every setting of a run, typed and checked before anything is loaded. mmllm/config_file.py reads them from YAML."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from mmllm.config_base import ConfigError as ConfigError
from mmllm.config_base import Fraction, PathText, PositiveInt, Section
from mmllm.config_training import BITSANDBYTES_KINDS as BITSANDBYTES_KINDS
from mmllm.config_training import LanguageLoraConfig as LanguageLoraConfig
from mmllm.config_training import LogConfig as LogConfig
from mmllm.config_training import LoraConfig as LoraConfig
from mmllm.config_training import OptimConfig as OptimConfig


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


class _DataFile(Section):
    """A file, a folder, or a pattern such as `{000..123}.tar` or `*.parquet`; local, or an fsspec URL."""

    path: PathText
    images: PathText | None = None  # the folder that image paths start from; default: the file's own
    prompt: str = "Describe the picture."  # what a caption answers, where rows are captions without a question
    max_examples: PositiveInt | None = None  # the first usable ones


class SourceConfig(_DataFile):
    """One of the sources that are mixed.

    `weight` is how often an epoch shows each row: 3 is three times, 0.5 is every second one, the others in the next
    epoch. With `streaming`, shards (a tar, a row group, megabytes of JSON lines) come in random order, unindexed, and
    the weight counts shards.
    """

    weight: Annotated[float, Field(gt=0)] = 1.0
    streaming: bool = False

    @model_validator(mode="after")
    def _stream_has_no_first(self) -> SourceConfig:
        if self.streaming and self.max_examples:
            raise ValueError("max_examples needs an index of the rows; take it or streaming out")
        return self


class ReplayConfig(_DataFile):
    """Data of another kind, such as conversations without pictures, as a share of all examples that training sees."""

    fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05

    def as_source(self) -> SourceConfig:
        return SourceConfig(**self.model_dump(exclude={"fraction"}))


class DataConfig(Section):
    train: tuple[SourceConfig, ...]
    val: tuple[SourceConfig, ...] = ()
    replay: ReplayConfig | None = None
    max_length_tokens: PositiveInt = 2048
    num_workers: Annotated[int, Field(ge=0)] = 0
    group_by_length: bool = True  # not where data are streamed: their lengths are not known before
    packing: Literal["auto", "always", "never"] = (
        "auto"  # several examples in one row: where it pays, or in every batch
    )
    cache_features: bool = False  # keep the frozen tower's output of every training image on disk
    cache_folder: PathText | None = None  # where; default: `cache` beside `out`, so that runs share it
    max_bad_fraction: Fraction = 0.01  # a run with more unusable examples than this does not start

    @model_validator(mode="after")
    def _streams(self) -> DataConfig:
        if self.is_streamed and not all(source.streaming for source in self.train):
            raise ValueError("train mixes streamed and indexed sources: set streaming for all or none (not for replay)")
        if any(source.streaming or source.weight != 1 for source in self.val):
            raise ValueError("val is read whole and once; set streaming and weight for train alone")
        if self.is_streamed and self.cache_features:
            raise ValueError("cache_features needs all pictures beforehand; take it or streaming out")
        return self

    @property
    def is_streamed(self) -> bool:
        return any(source.streaming for source in self.train)


class RunConfig(Section):
    """What every run has. `stage` says which of CONFIGS this is."""

    stage: str
    out: PathText
    seed: Annotated[int, Field(ge=0)] = 0
    num_threads: PositiveInt | None = None  # CPU threads of one process; default: torch's own
    optim: OptimConfig
    log: LogConfig = LogConfig()

    def check_memory_options(self) -> None:
        """Raises ValueError for what a warm-up, whose models are small, does not have."""
        for name in ("gradient_checkpointing", "loss_chunk_tokens", "layer_decay", "compile", "liger"):
            if getattr(self.optim, name) != OptimConfig.model_fields[name].default:
                raise ValueError(f"optim.{name} is for stage1 and stage2; {self.stage} has none, leave it out")

    def check_rates(self, parts: Iterable[str]) -> None:
        """Raises ValueError where the trained parts are not those that have a learning rate."""
        if set(self.optim.learning_rates) != set(parts):
            raise ValueError(
                f"optim.learning_rates has {sorted(self.optim.learning_rates)} but this run trains {sorted(parts)}; "
                "give one rate a part"
            )


def _check_precision(language: LanguageConfig, optim: OptimConfig, *, is_trained: bool) -> None:
    """Raises ValueError where the LLM's weights cannot be trained, or computed with, as they are held."""
    if language.dtype == "fp16":
        raise ValueError(
            "model.language.dtype fp16 is for answers only, since small gradients vanish in it; train with fp32, or "
            "with bf16 where the LLM is frozen or has lora"
        )
    if language.is_half and is_trained:
        raise ValueError(
            f"model.language.dtype {language.dtype} would lose small updates of an LLM that is trained whole; leave it "
            "at fp32 and set optim.precision=bf16 to compute in bf16, or use lora"
        )
    if language.attention == "flash_attention_2" and optim.precision == "fp32" and not language.is_half:
        raise ValueError("model.language.attention flash_attention_2 has no fp32; set optim.precision=bf16")


class StageConfig(RunConfig):
    """Stage 1 (projector on captions) and stage 2 (projector and LLM on conversations)."""

    stage: Literal["stage1", "stage2"]
    model: ModelConfig
    data: DataConfig
    train: Annotated[tuple[Literal["vision", "projector", "language"], ...], Field(min_length=1)]
    freeze: tuple[str, ...] = ()  # patterns of names: of the parts in `train`, what is not trained after all
    vision_last_layers: PositiveInt | None = None  # of a trained tower, how many layers are; default: all of it
    lora: LanguageLoraConfig | None = None  # of the LLM
    vision_lora: LoraConfig | None = None  # of the tower

    @model_validator(mode="after")
    def _combination(self) -> StageConfig:
        self.check_rates(self.train)
        if isinstance(self.optim.layer_decay, dict) and (unknown := set(self.optim.layer_decay) - set(self.train)):
            raise ValueError(
                f"optim.layer_decay has {sorted(unknown)}, but train lists {sorted(self.train)}; give parts of train"
            )
        if self.lora and "language" not in self.train:
            raise ValueError("lora adapts the LLM, but train does not list language")
        if self.vision_lora and self.vision_last_layers:
            raise ValueError("give vision_lora or vision_last_layers: a tower is adapted, or its last layers trained")
        if (self.vision_lora or self.vision_last_layers) and "vision" not in self.train:
            raise ValueError("vision_lora or vision_last_layers train the tower, but train does not list vision")
        if self.lora and self.lora.quantise and self.optim.liger:
            raise ValueError("lora.quantise ends on the CPU, where optim.liger has no kernels; take one of them out")
        if self.log.text_probe and "language" not in self.train:
            raise ValueError("log.text_probe shows what a trained LLM forgets, but train does not list language")
        if self.data.cache_features and "vision" in self.train:
            raise ValueError("data.cache_features keeps the frozen tower's output, but train lists vision")
        if "vision" in self.optim.gradient_checkpointing and "vision" not in self.train:
            raise ValueError(
                "optim.gradient_checkpointing lists vision, but train does not: a frozen tower keeps nothing for "
                "backward; leave it out"
            )
        if self.model.language:
            _check_precision(self.model.language, self.optim, is_trained="language" in self.train and not self.lora)
        return self


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
        self.log.check_plain(self.stage)
        self.check_rates(["vision"])
        self.check_memory_options()
        return self


class GuideConfig(Section):
    """Some heads of one layer, and what they are shown to read before an answer: see mmllm/training/lookup.py."""

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
        self.log.check_plain(self.stage)
        self.check_rates(["language"] if self.read_out is None else ["language", "read_out"])
        self.check_memory_options()
        if isinstance(self.language, LanguageConfig):
            if not self.language.source:
                raise ValueError("language.source: missing, and it has no default")
            _check_precision(self.language, self.optim, is_trained=True)
        if isinstance(self.language, dict) and ("model_type" not in self.language or "source" in self.language):
            raise ValueError(
                f"language: needs a model_type and its options, or source, revision and attention of a trained LM; "
                f"got {sorted(self.language)}"
            )
        return self


CONFIGS: dict[str, type[RunConfig]] = {
    "stage1": StageConfig,
    "stage2": StageConfig,
    "warmup_vision": WarmupVisionConfig,
    "warmup_language": WarmupLanguageConfig,
}
